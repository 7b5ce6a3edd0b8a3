"""The report as one HTML page: no network, no files beside it."""

import base64
import io
import json
import pathlib
from html import escape
from typing import NamedTuple

import numpy as np
from PIL import Image

from .charts import COLORS, STYLE, cache_bars, line_chart, stacked_bars
from .settling import GROUPS

TEMPLATE = pathlib.Path(__file__).parent / "report.html"
PICTURE_SIDE = 640  # pixels; a larger picture is shown smaller


class Run(NamedTuple):
    """What was observed in one run over prompt and answer."""

    maps: np.ndarray  # (predictions, layers, visual tokens): attention of each answering token to the image
    shares: np.ndarray  # (layers, groups): attention of the text
    readings: list  # for each prediction and layer (0: before the first), the likeliest tokens as [text, probability]


class Story(NamedTuple):
    """All that a report tells; `page` only lays it out."""

    model: str
    picture: Image.Image
    question: str
    answers: dict  # {"withdrawn": text, "full": text}
    method: str | None  # its text
    layer: int | None  # the first that no visual token enters
    tokens: list[str]  # of the withdrawn answer; what the runs are about
    runs: dict  # {"withdrawn": Run, "full": Run}
    even: float  # the image's share if attention were even
    tiles: np.ndarray  # (tiles, 3, height, width), as the model sees the picture
    curve: np.ndarray  # (layers,) KL of the next token, nats
    worst: np.ndarray  # (layers,) KL of the answer's worst token
    eta: float
    stats: dict  # {"withdrawn": Result.stats, "full": Result.stats}


def data_url(image):
    """A Pillow image as the text of a PNG."""
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def as_seen(tiles, picture):
    """The tiles as pictures. The colours' scale is undone by giving each channel the mean and spread it had."""
    colours = np.asarray(picture, np.float32).reshape(-1, 3)
    mean, spread = tiles.mean((0, 2, 3), keepdims=True), tiles.std((0, 2, 3), keepdims=True)
    pixels = (tiles - mean) / np.maximum(spread, 1e-6) * colours.std(0)[:, None, None] + colours.mean(0)[:, None, None]
    return [Image.fromarray(tile.transpose(1, 2, 0)) for tile in np.clip(pixels + 0.5, 0, 255).astype(np.uint8)]


def tile_figure(image, side, number):
    """A tile under its grid of side x side patches, which the script colours."""
    step = 100 / side
    patches = "".join(
        f'<rect x="{column * step:.3f}" y="{row * step:.3f}" width="{step:.3f}" height="{step:.3f}" class="patch"/>'
        for row in range(side)
        for column in range(side)
    )
    url = data_url(image)
    return (
        f'<div class="tile"><img src="{url}" alt="what the model sees, part {number}">'
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none">{patches}</svg></div>'
    )


def tiles_html(story):
    """Every tile with its patches. Visual tokens lie row by row, tile after tile, the same number in each."""
    visual = story.runs["full"].maps.shape[-1]
    side = round((visual / len(story.tiles)) ** 0.5)
    return "".join(
        tile_figure(image, side, number) for number, image in enumerate(as_seen(story.tiles, story.picture), 1)
    )


def packed(maps):
    """Attention as bytes, 255 standing for the largest of a token's run over all layers. Returns (base64, largest)."""
    largest = maps.max((1, 2), keepdims=True)  # (predictions, 1, 1)
    scaled = np.round(255 * maps / np.maximum(largest, 1e-9)).astype(np.uint8)
    return base64.b64encode(scaled.tobytes()).decode(), [float(f"{value:.5g}") for value in largest.ravel()]


def script_data(story):
    """What the slider needs, as JSON that is safe inside a script element."""
    runs = {}
    for name, run in story.runs.items():
        values, largest = packed(run.maps)
        totals = np.round(run.maps.sum(-1), 4).tolist()  # (predictions, layers): the share that goes to the image
        runs[name] = {"maps": values, "largest": largest, "totals": totals, "readings": run.readings}
    predictions, layers, visual = story.runs["full"].maps.shape
    content = {"layers": layers, "visual": visual, "layer": story.layer, "tokens": story.tokens, "runs": runs}
    return json.dumps(content).replace("<", "\\u003c")


def savings_html(stats):
    """Rows of two bars each: with and without withdrawal."""
    now, full = stats["withdrawn"], stats["full"]
    rows = [
        ("prefill", "MFLOP", 1e-6, now["flops"]["prefill"], full["flops"]["prefill"]),
        ("prefill", "ms", 1e3, now["seconds"]["prefill"], full["seconds"]["prefill"]),
        ("decode", "ms", 1e3, now["seconds"]["decode"], full["seconds"]["decode"]),
        ("cache", "kB", 1e-3, now["cache"]["bytes"], full["cache"]["bytes"]),
    ]
    html = []
    for name, unit, scale, withdrawn, without in rows:
        change = 1 - withdrawn / without if without else 0
        words = f"{abs(change):.0%} {'less' if change >= 0 else 'more'}"
        width = 100 * withdrawn / max(without, withdrawn, 1e-12), 100 * without / max(without, withdrawn, 1e-12)
        html.append(
            f"<tr><th>{name}<small> {unit}</small></th><td><i class='now' style='width:{width[0]:.1f}%'></i>"
            f"<i class='full' style='width:{width[1]:.1f}%'></i></td>"
            f"<td>{scale * withdrawn:,.1f}<br>{scale * without:,.1f}</td><td class='change'>{words}</td></tr>"
        )
    return "".join(html)


def page(story):
    """The whole report, text of an HTML file."""
    stats, layers = story.stats["withdrawn"], list(range(len(story.curve)))
    held = stats["cache"]["tokens_per_layer"]
    text_tokens = held[0] - min(stats["tokens"]["visual"], held[0])
    picture = story.picture.copy()
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    lowest = np.log10(max(min(story.curve.min(), story.worst.min(), story.eta), 1e-6))
    decades = int(np.floor(lowest)), int(max(np.ceil(np.log10(max(story.worst.max(), 1e-6))), 0))
    order = [GROUPS.index(group) for group in ("visual", "sink", "nearest", "other")]
    bars = {
        name: stacked_bars(
            layers, [GROUPS[i] for i in order], run.shares[:, order], ("layer", "attention of the text"),
            even=story.even, layer=story.layer, label="where the text's attention goes, layer by layer",
        )
        for name, run in story.runs.items()
    }  # fmt: skip
    same = story.answers["withdrawn"] == story.answers["full"]
    parts = {
        "style": COLORS + STYLE,
        "model": escape(story.model),
        "picture": data_url(picture),
        "question": escape(story.question),
        "answer": escape(story.answers["withdrawn"]),
        "answer without withdrawal": "the same" if same else escape(story.answers["full"]),
        "same": "same" if same else "other",
        "where": (
            f"the visual ones are withdrawn before layer {story.layer} of {len(layers)}"
            if stats["withdraw_layer"] is not None
            else escape(f"under {story.method}" if story.method else "nothing is withdrawn")
        ),
        "visual tokens": str(stats["tokens"]["visual"]),
        "text tokens": str(stats["tokens"]["text"]),
        "savings": savings_html(story.stats),
        "tiles": tiles_html(story),
        "size": f"{story.tiles.shape[3]} × {story.tiles.shape[2]}",
        "columns": str(int(np.ceil(max(len(story.tiles) - 1, 1) ** 0.5))),
        "last layer": str(len(layers) - 1),
        "first layer": str(0 if story.layer is None else max(story.layer - 1, 0)),
        "even": f"{story.even:.0%}",
        "bars withdrawn": bars["withdrawn"],
        "bars full": bars["full"],
        "curve": line_chart(
            layers, [("next token", "visual", story.curve), ("worst token", "sink dashed", story.worst)],
            ("layer", "KL, nats"), decades, story.eta, story.layer, label="KL divergence for each withdrawal layer",
        ),
        "cache": cache_bars(
            [max(tokens - text_tokens, 0) for tokens in held], text_tokens, story.layer, label="tokens in each layer's cache"
        ),
        "data": script_data(story),
    }  # fmt: skip
    html = TEMPLATE.read_text(encoding="utf-8")
    for name, content in parts.items():
        html = html.replace(f"<!--{name}-->", content)
    return html
