"""An answer as a notebook shows it: the image with its patches, what was said, and what each layer did with the tokens."""

import base64
import contextlib
import math
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..errors import InputError
from ..inputs.opening import open_image
from ..vlm import Answer
from .charts import stacked_bars, standalone
from .page import data_url

SIDE = 250  # pixels of the image, at most
GROUPS = ("text", "visual", "frozen")


def with_patches(image: Any, patches: int) -> Image.Image:
    """An image, small, with the grid of its patches where they are a square."""
    small = open_image(image).copy()
    small.thumbnail((SIDE, SIDE))
    rows, draw = math.isqrt(patches), ImageDraw.Draw(small, "RGBA")
    for index in range(1, rows if rows * rows == patches else 0):
        x, y = small.width * index / rows, small.height * index / rows
        draw.line([(x, 0), (x, small.height)], (255, 255, 255, 90))
        draw.line([(0, y), (small.width, y)], (255, 255, 255, 90))
    return small


def work_chart(stats: dict[str, Any]) -> str:
    """A bar per layer of the prefill: the prompt's tokens that it worked on, visual or text, and those that it only read."""
    entered, worked = (np.array(stats["prefill"][what]) for what in ("entered", "worked"))  # (layers,)
    text = np.minimum(worked, stats["tokens"]["text"])
    tokens = stats["tokens"]["text"] + stats["tokens"]["visual"]
    shares = np.stack([text, worked - text, entered - worked], axis=1) / tokens  # (layers, groups)
    said = f"Tokens of the prompt in each of {stats['layers']} layers."
    names = ("layer", "tokens of the prompt")
    return stacked_bars(range(len(shares)), GROUPS, shares, names, layer=stats["withdraw_layer"], label=said)


def answer_html(answer: Answer) -> str:
    """What a notebook shows for an answer: a piece of HTML without scripts."""
    images: Sequence[Any] = answer.images if isinstance(answer.images, list | tuple) else [answer.images]
    patches, shown = answer.stats["tokens"]["visual"] // max(len(images), 1), []
    for image in images:
        with contextlib.suppress(InputError):  # of none, and of a file that has gone since
            shown.append(f'<img alt="image" src="{data_url(with_patches(image, patches))}">')
    chart = base64.b64encode(standalone(work_chart(answer.stats)).encode()).decode()
    bars = f'<img alt="tokens in each layer" width="420" src="data:image/svg+xml;base64,{chart}">'
    return f"<p><b>{escape(answer.text)}</b><br>{escape(repr(answer))}</p>" + "".join([*shown, bars])
