"""What every family hands over: the parts of a model, and the few things that only the family knows how to do."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..errors import InputError
from ..inputs.images import check_size
from ..model.decoder import Decoder
from ..model.vision import Vision
from .layouts import Layout

MOST_TILES = 4097  # of all images of a prompt: 64 x 64 of one, and its overview


class Plan(NamedTuple):
    """What an image becomes, as far as its size tells; the rest is made when it is known that there may be as much."""

    tiles: int
    tokens: int  # visual tokens
    cut: Callable  # Pillow RGB image -> the tiles one after the other, (3, side, side) float32
    text: Callable  # (index of the image, how many images there are) -> the text that stands for it


def tiler(side: int, positions: int, plan: Callable) -> Callable:
    """A family's `VisionParts.tile`. side: pixels of a tile; plan: (height, width, most tiles or None) -> `Plan`.

    Nothing is made, but InputError raised, where all images together become more tiles or pixels than there may be, or
    more visual tokens than the decoder has positions.
    """

    def tile(images, most_tiles):
        plans = [plan(image.height, image.width, most_tiles) for image in images]
        tiles, tokens = sum(one.tiles for one in plans), sum(one.tokens for one in plans)
        if tiles > MOST_TILES:
            raise InputError(f"the prompt has {tiles:,} tiles; at most {MOST_TILES:,} are cut, fewer with --max-tiles")
        check_size(side, side * tiles, "the column of all tiles")
        if tokens > positions:
            raise InputError(f"the prompt has {tokens:,} visual tokens; the model has {positions:,} positions")
        cut = (tile for image, one in zip(images, plans) for tile in one.cut(image))
        texts = [one.text(index, len(plans)) for index, one in enumerate(plans)]
        return np.fromiter(cut, np.dtype((np.float32, (3, side, side))), tiles), texts

    return tile


@dataclass(frozen=True)
class VisionParts:
    """How a model sees: the picture cut to tiles, the encoder, the connector."""

    encoder: Vision
    connect: Callable  # features of a tile (features, vision width) -> its visual tokens (visual tokens, decoder width)
    tile: Callable  # `tiler`'s: (Pillow RGB images, most tiles an image or None)
    # -> (tiles (tiles, 3, height, width) float32, for each image the text that stands for it)
    image_token: str = "<image>"  # the token that marks the place of a visual token …
    image_token_id: int | None = None  # … and its id, if the config tells it; the tokenizer must agree
    # (visual tokens of each tile, (height, width) of each image, most tiles) -> visual tokens; None: as they come
    pack: Callable | None = None


@dataclass(frozen=True)
class Parts:
    """A decoder, the parts that see if there are any, and how a conversation is written down."""

    decoder: Decoder
    layout: Layout
    vision: VisionParts | None = None
    extra_tokens: tuple[str, ...] = ()  # special tokens that follow those of the tokenizer's file
    tokenizer: str | None = None  # the model whose tokenizer this one uses, where its own folder has none
