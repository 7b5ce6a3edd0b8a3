"""Idefics3 and SmolVLM (Marafioti et al. 2025, arXiv 2504.05299): SigLIP on tiles, pixel shuffle, a Llama decoder.

`idefics3` and `smolvlm` are the same model under two names; SmolVLM, SmolDocling and Granite-Docling carry the first,
SmolVLM2 the second.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..inputs.images import Levels, resized
from ..model.connector import ShuffleConnector
from ..model.vision import Vision, VisionConfig
from ..model.weights import Decoder, DecoderConfig
from . import clip, llama
from .checkpoint import Checkpoint
from .fields import Fields
from .layouts import SMOLVLM, folder_layout
from .parts import MOST_TILES, Parts, Plan, Tiler, VisionParts, grid_within

NAMES = ("model.vision_model.", "model.connector.modality_projection.proj", "model.text_model.", "lm_head.weight")


def load(fields: Fields, folder: pathlib.Path, checkpoint: Checkpoint) -> Parts:
    """config.json's `Fields`, the folder and its `Checkpoint` -> Parts."""
    fields.refuse_unless(quantization_config=None)
    tied = fields.boolean("tie_word_embeddings", False)  # only what is said here counts
    text_config = llama.decoder_config(fields.section("text_config"))._replace(tied_head=tied)
    tower = fields.section("vision_config")
    vision_config = clip.vision_config(tower, -1, drop_first=False, post_norm=True, kind="idefics3_vision")
    pixels = pixel_settings(folder)
    factor = fields.positive_int("scale_factor", 2)
    fields.section("text_config").refuse_unless(pixel_shuffle_factor=factor)
    tokens = tile_tokens(fields, pixels.side // vision_config.patch_size, factor)  # per tile

    vision, connector, decoder = checkpoint.fill(lambda take: taken(take, text_config, vision_config, factor, NAMES))
    vision_parts = VisionParts(
        encoder=on_tiles(vision, pixels.side),
        connect=connector,
        tile=Tiler(pixels.side, text_config.max_positions, functools.partial(pixels.plan, tokens)),
        image_token_id=fields.integer("image_token_id", 128257),
    )
    return Parts(decoder, folder_layout(folder, SMOLVLM), vision_parts)


def taken(
    take: Checkpoint, text_config: DecoderConfig, vision_config: VisionConfig, factor: int, names: tuple[str, ...]
) -> tuple[Vision, ShuffleConnector, Decoder]:
    """The parts of these names, (vision, projection, decoder, head), out of a checkpoint."""
    vision, projection, decoder, head = names
    joined = take.linear(projection, into=vision_config.width * factor**2, out=text_config.width, bias=False)
    tower = clip.vision(vision_config, take, vision)
    return tower, ShuffleConnector(joined, factor), llama.decoder(text_config, take, decoder, head)


def stands_for(rows: int, columns: int, tokens: int) -> str:
    """The text of an image of rows x columns tiles: each tile named by its place, `tokens` visual tokens per tile."""
    around, visual = "<fake_token_around_image>", "<image>" * tokens
    text = ""
    for row in range(1, rows + 1) if rows * columns > 1 else []:
        text += "".join(f"{around}<row_{row}_col_{column}>{visual}" for column in range(1, columns + 1)) + "\n"
    return text + ("\n" if text else "") + f"{around}<global-img>{visual}{around}"


def tile_tokens(fields: Fields, side: int, factor: int) -> int:
    """Visual tokens of a tile of side x side patches, of which factor x factor become one."""
    if not 0 < side <= clip.MOST_PATCHES_PER_SIDE or side % factor:
        raise fields.error(f"joins {factor} x {factor} patches, into which a tile of {side} x {side} cannot be cut")
    return (side // factor) ** 2


def on_tiles(vision: Vision, side: int) -> Vision:
    """The tower for tiles of `side` pixels: its position table looked up where a tile's patches lie."""
    config = vision.config
    rows = fractional_positions(side // config.patch_size, config.image_size // config.patch_size)
    places = (rows[:, None] * (config.image_size // config.patch_size) + rows).ravel()  # (patches,)
    table = vision.position_embedding[places]  # (patches, width), a copy
    table.flags.writeable = False  # as in the checkpoint
    return dataclasses.replace(vision, config=config._replace(image_size=side), position_embedding=table)


def fractional_positions(patches: int, places: int) -> np.ndarray:
    """For each of a tile's `patches` rows, the row of the position table (of `places`) at the same relative height.

    Columns alike. With as many patches as places each takes its own, as long as float32 tells the fractions apart from
    the boundaries. It does for every published size (14, 16, 24, 26, 27 and 32 patches); for some others (19, 25, 31)
    PyTorch itself finds different rows on different processors.
    """
    fractions = np.arange(patches, dtype=np.float32) * (np.float32(1) / np.float32(patches))
    step = 1 / places
    boundaries = (step + step * np.arange(math.ceil((1 - step) / step))).astype(np.float32)  # (places - 1,)
    return np.searchsorted(boundaries, np.minimum(fractions, np.float32(1 - 1e-6)), side="right")


def pixel_settings(folder: pathlib.Path) -> "TiledPixels":
    """The settings of the folder's image processor -> TiledPixels."""
    fields = clip.image_processor_fields(folder)
    size = fields.section("size", {"longest_edge": 1456})
    return TiledPixels(
        size.positive_int("longest_edge", most=clip.MOST_SIDE) if fields.boolean("do_resize", True) else None,
        fields.section("max_image_size", {"longest_edge": 364}).positive_int("longest_edge", most=clip.MOST_SIDE),
        fields.boolean("do_image_splitting", True),
        fields.choice("resample", range(6), 1),
        clip.level_settings(fields, [0.5, 0.5, 0.5]),
    )


class TiledPixels(NamedTuple):
    """Idefics3's preprocessing: the image cut into square tiles, row by row, and last the overview.

    The image is resized twice: to its longest edge, keeping its shape, then to whole tiles. An image of one tile is its
    own overview.
    """

    longest_edge: int | None  # resize until the longer side is this long; None: leave it
    side: int  # of a tile
    splits: bool  # False: only the overview
    resample: int  # Pillow's number of the interpolation; 1 is Lanczos
    levels: Levels

    def tiles(self, image: Image.Image, edge: int | None, rows: int, columns: int) -> Iterator[np.ndarray]:
        """A Pillow RGB image, resized to this longest edge, to tiles (3, side, side) float32."""
        side = self.side
        if edge:
            height, width = scaled(image.height, image.width, edge)
            image = resized(image, (width, height), self.resample)
        image = resized(image, (columns * side, rows * side), self.resample)
        boxes = [(column * side, row * side) for row in range(rows) for column in range(columns)]
        for left, top in boxes:
            yield self.levels(image.crop((left, top, left + side, top + side)))
        if rows * columns > 1:
            yield self.levels(resized(image, (side, side), self.resample))

    def grid(self, height: int, width: int, edge: int | None) -> tuple[int, int]:
        """Rows and columns of tiles that an image of this size, brought to this longest edge, is stretched to."""
        if edge:
            height, width = scaled(height, width, edge)
        if not self.splits:
            return 1, 1
        ratio = width / height
        if width >= height:
            columns = math.ceil(width / self.side)
            return math.ceil(int(columns * self.side / ratio) / self.side), columns
        rows = math.ceil(height / self.side)
        return rows, math.ceil(int(rows * self.side * ratio) / self.side)

    def plan(self, tokens: int, height: int, width: int, most_tiles: int | None = None) -> Plan:
        """What an image of this size becomes, of which each tile becomes that many visual tokens."""
        longest = min((self.longest_edge or max(height, width)) - 1, self.side * MOST_TILES)
        edges = (self.longest_edge, *range(longest // self.side * self.side, 0, -self.side))
        edge, rows, columns, tiles = grid_within(most_tiles, edges, functools.partial(self.grid, height, width))
        cut = functools.partial(self.tiles, edge=edge, rows=rows, columns=columns)
        return Plan(tiles, tiles * tokens, cut, lambda *_: stands_for(rows, columns, tokens))


def scaled(height: int, width: int, longest_edge: int) -> tuple[int, int]:
    """(height, width) of an image whose longer side becomes `longest_edge`; the shorter is even, as in Idefics3."""
    ratio = width / height
    if width >= height:
        height = int(longest_edge / ratio)
        return max(height + height % 2, 1), longest_edge
    width = int(longest_edge * ratio)
    return longest_edge, max(width + width % 2, 1)
