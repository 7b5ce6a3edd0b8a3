"""The pages: what the browser is given. `minivtw.explore` serves the files of `pages/` and answers their questions;
`minivtw.report` writes one file with everything inside, no network, no files beside it. Both draw with `wall.js`.
"""

import base64
import hashlib
import io
import json
import pathlib
from html import escape
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..analysis.settling import GROUPS
from ..checkpoints.parts import VisionParts
from .charts import COLORS, STYLE, line_chart, stacked_bars

PACKAGE = pathlib.Path(__file__).parent.parent
PAGES = pathlib.Path(__file__).parent / "files"
THUMBNAIL = 64, 192  # rows and columns at most; of larger arrays every so-many-th number is shown


class Story(NamedTuple):
    """All that a report tells; `page` only lays it out."""

    model: str
    question: str
    tiles: list[Image.Image]  # the picture as the model sees it
    words: list[str | None]  # the prompt's tokens; None: a visual one
    patches: list[int]  # of each tile, those that are a visual token of their own
    frames: list[dict]  # `watching.frame` at every K from 0 to the number of layers
    layer: int | None  # the K to begin with; None: with `own`
    own: dict | None  # the frame of another method
    looks: (
        np.ndarray
    )  # (tokens, layers, tokens) where each looks, nothing left out; mean over heads; visual rows are zero
    shares: dict  # {"withdrawn": (layers, groups), "full": the same}: attention of the text
    even: float  # the image's share if attention were even
    worst: np.ndarray  # (layers,) KL of the answer's worst token, nats
    eta: float
    seconds: dict  # {"withdrawn": {phase: seconds}, "full": the same}


def data_url(image: Image.Image) -> str:
    """A Pillow image as the text of a PNG."""
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def as_seen(vision: VisionParts, tiles: np.ndarray) -> list[Image.Image]:
    """The tiles as pictures: what the model makes of a black and of a white picture tells its scale, which is undone."""
    flat = [vision.tile([Image.new("RGB", (32, 32), shade)], 1)[0][0] for shade in ("black", "white")]
    black, white = (tile[:, tile.shape[1] // 2, tile.shape[2] // 2, None, None] for tile in flat)  # (3, 1, 1)
    levels = 255 / np.where(black == white, 1, white - black)
    return [
        Image.fromarray(np.clip((tile - black) * levels + 0.5, 0, 255).astype(np.uint8).transpose(1, 2, 0))
        for tile in tiles
    ]


def patches(vision: VisionParts, tiles: int, visual: int) -> list[int]:
    """Of each of a picture's tiles, how many patches are a visual token of their own, in the prompt's order.

    Where a family packs the tiles' tokens into one picture, that holds for the first alone, the view of the whole.
    """
    return [vision.encoder.config.features] + [0] * (tiles - 1) if vision.pack else [visual // tiles] * tiles


def packed(values: np.ndarray) -> dict[str, Any]:
    """Numbers from 0 up as 16 bits each, little-endian, 65535 standing for the largest."""
    largest = max(float(values.max(initial=0)), 1e-9)
    return {
        "values": base64.b64encode(np.round(65535 * values / largest).astype("<u2").tobytes()).decode(),
        "largest": float(f"{largest:.7g}"),
    }


def thumbnail(array: np.ndarray) -> dict[str, Any]:
    """An array as a small picture: signed bytes, 127 standing for the largest magnitude, -128 for what is not finite.

    Of three axes the first four slices stand side by side.
    """
    flat = np.atleast_2d(array.astype(np.float64))
    flat = np.concatenate(list(flat[:4]), axis=-1) if flat.ndim == 3 else flat
    rows, columns = (-(-size // most) for size, most in zip(flat.shape, THUMBNAIL))
    small = flat[::rows, ::columns]
    finite = np.isfinite(small)
    scale = np.abs(small[finite]).max(initial=1e-12)
    signed = np.where(finite, np.round(127 * np.where(finite, small, 0) / scale), -128).astype(np.int8)
    values = base64.b64encode(signed.tobytes()).decode()
    return {"shape": list(array.shape), "columns": small.shape[1], "values": values, "largest": float(f"{scale:.3g}")}


def as_json(content: Any) -> str:
    """JSON that is safe inside a script element."""
    return json.dumps(content).replace("<", "\\u003c")


def part(name: str) -> str:
    """A file of `pages/`."""
    return (PAGES / name).read_text(encoding="utf-8")


def filled(name: str, parts: dict[str, str]) -> str:
    """A page of `pages/` with its gaps filled; the parts' order matters where one has gaps of its own."""
    html = part(name)
    for gap, content in parts.items():
        html = html.replace(f"<!--{gap}-->", content)
    return html


def explore_html() -> str:
    """The page of `minivtw.explore`."""
    return filled("explore.html", {"wall": part("wall.html"), "left": part("asking.html"), "tiles": ""})


def page_css() -> str:
    """The style sheet of both pages."""
    return COLORS + STYLE + part("page.css")


def source_html(name: str) -> str | None:
    """A file of this package with numbered lines, each with its own address; None if there is no such file."""
    if name not in {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")}:
        return None
    lines = (PACKAGE / name).read_text(encoding="utf-8").splitlines()
    listing = "".join(
        f'<li id="L{number}"><code>{escape(line) or " "}</code></li>' for number, line in enumerate(lines, 1)
    )
    up = "../" * (name.count("/") + 1)  # to the page itself
    return filled("source.html", {"name": escape(f"minivtw/{name}"), "up": up, "lines": listing})


def report_data(story: Story) -> dict[str, Any]:
    """What the script of the report needs."""
    layers = len(story.frames) - 1
    eyes = {
        token: packed(looks) | {"heads": 1, "tokens": looks.shape[-1]}
        for token, (looks, word) in enumerate(zip(story.looks, [*story.words, *[""] * len(story.looks)]))
        if word is not None
    }
    return {
        "layers": layers,
        "words": story.words,
        "patches": story.patches,
        "frames": story.frames,
        "layer": story.layer,
        "own": story.own,
        "eyes": eyes,
    }


def tiles_html(tiles: list[Image.Image]) -> str:
    """The pictures; the script lays the patches over them."""
    return "".join(f'<div class="tile"><img src="{data_url(tile)}" alt=""></div>' for tile in tiles)


def seconds_words(seconds: dict) -> str:
    now, full = seconds["withdrawn"], seconds["full"]
    return ", ".join(
        f"{phase} {now[phase] * 1e3:.1f} ms instead of {full[phase] * 1e3:.1f}" for phase in ("prefill", "decode")
    )


def page(story: Story) -> str:
    """The whole report, text of an HTML file."""
    curve = np.array([frame["kl"] for frame in story.frames[:-1]])
    layers = list(range(len(curve)))
    lowest = np.log10(max(min(curve.min(), story.worst.min(), story.eta), 1e-6))
    decades = int(np.floor(lowest)), int(max(np.ceil(np.log10(max(story.worst.max(), 1e-6))), 0))
    order = [GROUPS.index(group) for group in ("visual", "sink", "nearest", "other")]
    bars = {
        name: stacked_bars(
            layers, [GROUPS[i] for i in order], shares[:, order], ("layer", "attention of the text"),
            even=story.even, layer=story.layer if name == "withdrawn" else None,
            label="where the text's attention goes, layer by layer",
        )
        for name, shares in story.shares.items()
    }  # fmt: skip
    script = part("wall.js") + part("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return filled(
        "report.html",
        {
            "style": page_css(),
            "wall": part("wall.html"),
            "left": '<p class="question"><!--question--></p><div class="chips"><button type="button" id="own"></button></div>',
            "digest": digest,
            "script": script,
            "tiles": tiles_html(story.tiles),
            "curve": line_chart(
                layers, [("next token", "visual", curve), ("worst token", "sink dashed", story.worst)],
                ("layer", "KL, nats"), decades, story.eta, story.layer, label="KL divergence for each withdrawal layer",
            ),
            "bars withdrawn": bars["withdrawn"],
            "bars full": bars["full"],
            "even": f"{story.even:.0%}",
            "seconds": seconds_words(story.seconds),
            "model": escape(story.model),
            "question": escape(story.question),
            "data": as_json(report_data(story)),
        },
    )  # fmt: skip
