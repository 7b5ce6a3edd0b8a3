"""The pages: what the browser is given. `minivtw.explore` serves the files of `pages/` and answers their questions;
`minivtw.report` writes one file with everything inside, no network, no files beside it. Both draw with `wall.js`.
"""

import base64
import io
import pathlib
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from ..checkpoints.parts import VisionParts
from .charts import COLORS, STYLE

PACKAGE = pathlib.Path(__file__).parent.parent
PAGES = pathlib.Path(__file__).parent / "files"
THUMBNAIL = 64, 192  # rows and columns at most; of larger arrays every so-many-th number is shown


def data_url(image: Image.Image) -> str:
    """A Pillow image as the text of a PNG."""
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def as_seen(vision: VisionParts, tiles: np.ndarray) -> list[Image.Image]:
    """The tiles as images: what the model makes of a black and of a white image tells its scale, which is undone."""
    flat = [vision.tile([Image.new("RGB", (32, 32), shade)], 1)[0][0] for shade in ("black", "white")]
    black, white = (tile[:, tile.shape[1] // 2, tile.shape[2] // 2, None, None] for tile in flat)  # (3, 1, 1)
    levels = 255 / np.where(black == white, 1, white - black)
    return [
        Image.fromarray(np.clip((tile - black) * levels + 0.5, 0, 255).astype(np.uint8).transpose(1, 2, 0))
        for tile in tiles
    ]


def patches(vision: VisionParts, tiles: int, visual: int) -> list[int]:
    """Of each of an image's tiles, how many patches are a visual token of their own, in the prompt's order.

    Where a family packs the tiles' tokens into one image, that holds for the first alone, the view of the whole.
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
    """An array as a small image: signed bytes, 127 standing for the largest magnitude, -128 for what is not finite.

    Of three axes the first four slices stand side by side.
    """
    with np.errstate(invalid="ignore"):  # what is still to be written into holds anything, signaling NaN too
        flat = np.atleast_2d(array.astype(np.float64))
    flat = np.concatenate(list(flat[:4]), axis=-1) if flat.ndim == 3 else flat
    rows, columns = (-(-size // most) for size, most in zip(flat.shape, THUMBNAIL))
    small = flat[::rows, ::columns]
    finite = np.isfinite(small)
    scale = np.abs(small[finite]).max(initial=1e-12)
    signed = np.where(finite, np.round(127 * np.where(finite, small, 0) / scale), -128).astype(np.int8)
    values = base64.b64encode(signed.tobytes()).decode()
    return {"shape": list(array.shape), "columns": small.shape[1], "values": values, "largest": float(f"{scale:.3g}")}


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
