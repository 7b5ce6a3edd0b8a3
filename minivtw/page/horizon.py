"""The picture that goes dark: one small image per layer, each patch as bright as the answer still depends on it."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from ..analysis.horizon import patch_worth
from ..errors import InputError
from ..vlm import VLM
from .charts import line, svg, text
from .page import data_url
from .watching import EmbeddedQuestion

MOST = 12  # images, at evenly spaced layers
COLUMNS, SIDE, GAP, TOP, ROW = 6, 64, 12, 26, 110  # images in a row; pixels: an image, between two, above them, a row
DARKEST, BRIGHTEST = 1e-5, 1e-1  # changes of the probability that are drawn black, and undimmed
BLACK = 242  # of 255: a trace of the image stays


def horizon(vlm: VLM, question: EmbeddedQuestion, leaves: int | None) -> str:
    """A drawing of what each patch is worth to the answer of the model that is left alone; leaves: K. Raises InputError."""
    urls, visual = question.image.urls, int(question.prompt.is_visual.sum())
    if len(urls) > 1 or round(visual**0.5) ** 2 != visual:
        raise InputError(f"the horizon is drawn for an image of one tile, each patch a token; this one has {len(urls)}")
    layers = range(0, vlm.config.layers, -(-vlm.config.layers // MOST))
    worth = patch_worth(vlm.decoder, question.embedded, question.answer.token_ids, layers)
    return drawn(urls[0], layers, worth, leaves)


def light(worth: np.ndarray) -> np.ndarray:
    """How brightly a change of the probability is drawn, from 0 to 1, by its logarithm; any shape."""
    return np.log(np.clip(np.abs(worth), DARKEST, BRIGHTEST) / DARKEST) / np.log(BRIGHTEST / DARKEST)


def drawn(tile: str, layers: Sequence[int], worth: np.ndarray, leaves: int | None) -> str:
    """The images, each with its layer above and the largest change below it, in percentage points.

    tile: the image, a `data:` URL; worth: (layers, patches) of `patch_worth`; leaves: K, a dashed line before its image.
    """
    body = [f'<defs><image id="undimmed" width="{SIDE}" height="{SIDE}" href="{tile}"/></defs>']
    across = round(worth.shape[1] ** 0.5)
    marked = next((layer for layer in layers if leaves is not None and layer >= leaves), None)
    for number, (layer, patches) in enumerate(zip(layers, worth)):
        x, y = GAP + number % COLUMNS * (SIDE + GAP), TOP + number // COLUMNS * ROW
        shade = np.zeros((across, across, 4), np.uint8)  # (rows, columns, channels) black, more or less transparent
        shade[..., 3] = np.round(BLACK * (1 - light(patches))).reshape(across, across)
        most = 100 * np.abs(patches).max()
        place = f'x="{x}" y="{y}" width="{SIDE}" height="{SIDE}"'
        body += [
            f'<use x="{x}" y="{y}" href="#undimmed"/>',
            f'<image {place} style="image-rendering: pixelated" href="{data_url(Image.fromarray(shade))}"/>',
            text(x + SIDE / 2, y - 4, layer if number else f"layer {layer}"),
            text(x + SIDE / 2, y + SIDE + 14, f"{most:.{1 if most >= 0.1 else 3}f}"),
        ]
        if layer == marked:
            body += [line(x - GAP / 2, y - 8, x - GAP / 2, y + SIDE + 6, "mark")]
            body += [text(x - GAP / 2, y - 13, f"K = {leaves}", "middle", "marked")]
    label = "one image per layer, each patch as bright as the answer depends on it there"
    return svg(body, TOP - (-len(layers) // COLUMNS) * ROW - GAP, label)
