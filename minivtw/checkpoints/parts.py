"""What every family hands over: the parts of a model, and the few things that only the family knows how to do."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

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


def one_tile(pixels: Callable, tokens: int, text: str, *_: Any) -> Plan:
    """An image of any size as one tile that `pixels` makes of it, and `tokens` visual tokens."""
    return Plan(1, tokens, lambda image: [pixels(image)], lambda *_: text)


def grid_within(
    most_tiles: int | None, edges: Iterable, grid: Callable[[Any], tuple[int, int]], has_overview: bool = True
) -> tuple[Any, int, int, int]:
    """(Edge, rows, columns, how many tiles.) The first of some longest edges, each shorter than the one before, that
    yields at most `most_tiles` tiles, overview included; grid: an edge -> rows and columns. None: as many as there are.
    """
    for edge in edges:
        rows, columns = grid(edge)
        tiles = rows * columns + (has_overview and rows * columns > 1)
        if most_tiles is None or tiles <= most_tiles:
            break
    return edge, rows, columns, tiles


@dataclass(frozen=True)
class Tiler:
    """A family's `VisionParts.tile`: images to tiles.

    Nothing is made, but InputError raised, where all images together become more tiles or pixels than there may be, or
    more visual tokens than the decoder has positions.
    """

    side: int  # pixels of a tile
    positions: int  # of the decoder
    plan: Callable  # (height, width, most tiles or None) -> Plan

    def __call__(self, images: list, most_tiles: int | None) -> tuple[np.ndarray, list[str]]:
        """Pillow RGB images -> tiles (tiles, 3, side, side) float32, and for each image the text that stands for it."""
        plans = [self.plan(image.height, image.width, most_tiles) for image in images]
        tiles, tokens = sum(one.tiles for one in plans), sum(one.tokens for one in plans)
        if tiles > MOST_TILES:
            raise InputError(f"the prompt has {tiles:,} tiles; at most {MOST_TILES:,} are cut, fewer with --max-tiles")
        check_size(self.side, self.side * tiles, "the column of all tiles")
        if tokens > self.positions:
            raise InputError(f"the prompt has {tokens:,} visual tokens; the model has {self.positions:,} positions")
        cut = (tile for image, one in zip(images, plans) for tile in one.cut(image))
        texts = [one.text(index, len(plans)) for index, one in enumerate(plans)]
        return np.fromiter(cut, np.dtype((np.float32, (3, self.side, self.side))), tiles), texts


@dataclass(frozen=True)
class VisionParts:
    """How a model sees: the image cut to tiles, the encoder, the connector."""

    encoder: Vision
    connect: Callable  # features of a tile (features, vision width) -> its visual tokens (visual tokens, decoder width)
    tile: Callable  # a `Tiler`: (Pillow RGB images, most tiles per image or None) -> (tiles, texts)
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
