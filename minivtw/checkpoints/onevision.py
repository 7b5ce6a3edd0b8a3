"""LLaVA-OneVision (Li et al. 2024, arXiv 2408.03326): LLaVA at any resolution, "AnyRes-9".

The image is seen whole, and again larger in a grid of tiles, with black borders where their shape is not its own. The
tiles' visual tokens are put together as one image, the borders cut off, and, where there are many, shrunk; each row
ends with a learned token for the end of a line.
"""

import functools
import math
import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..inputs.images import resized
from ..model.connector import Connector
from ..model.decoder import Decoder
from ..model.vision import Vision, VisionConfig
from . import clip, llava
from .checkpoint import Checkpoint
from .fields import Fields
from .layouts import CHATML, folder_layout
from .parts import Parts, Plan, Tiler, VisionParts


class Grid(NamedTuple):
    """How an image is cut, and what is kept of its visual tokens."""

    rows: int  # of tiles; 0: the image is seen whole only
    columns: int
    borders: tuple[int, int] = (0, 0)  # visual tokens cut off above and below, left and right
    kept: tuple[int, int] = (0, 0)  # (height, width) in visual tokens, without the ends of lines


class AnyResolution(NamedTuple):
    """The settings of the image processor and of the way back."""

    pinpoints: tuple[tuple[int, int], ...]  # (height, width) of the images to choose from
    side: int  # pixels of a tile
    patches: int  # per side of a tile
    most: int  # tiles' worth of visual tokens, above which they are shrunk
    pixels: clip.ClipPixels

    def grid(self, height: int, width: int, most_tiles: int | None = None) -> Grid:
        """The grid for an image of this size: the one that shows most of it, and of these the smallest."""
        allowed = [
            (tall, wide) for tall, wide in self.pinpoints
            if most_tiles is None or tall * wide // self.side**2 + 1 <= most_tiles
        ]  # fmt: skip
        if not allowed:
            return Grid(0, 0)

        def fit(pinpoint: tuple[int, int]) -> tuple[int, int]:
            scale = min(pinpoint[1] / width, pinpoint[0] / height)
            shown = min(int(width * scale) * int(height * scale), width * height)
            return shown, shown - pinpoint[0] * pinpoint[1]

        tall, wide = max(allowed, key=fit)
        rows, columns = tall // self.side, wide // self.side
        tokens = [rows * self.patches, columns * self.patches]
        shorter = 0 if width / height > tokens[1] / tokens[0] else 1  # the axis that has borders
        inner = int(round((height, width)[shorter] * (tokens[1 - shorter] / (height, width)[1 - shorter]), 7))
        borders = [0, 0]
        borders[shorter] = (tokens[shorter] - inner) // 2
        kept = [size - 2 * border for size, border in zip(tokens, borders)]
        ratio = math.sqrt(kept[0] * kept[1] / (self.most * self.patches**2))
        if ratio > 1.1:
            kept = [max(int(size // ratio), 1) for size in kept]
        return Grid(rows, columns, (borders[0], borders[1]), (kept[0], kept[1]))

    def plan(self, height: int, width: int, most_tiles: int | None = None) -> Plan:
        """What an image of this size becomes."""
        grid = self.grid(height, width, most_tiles)
        tokens = self.patches**2 + (grid.kept[0] * (grid.kept[1] + 1) if grid.rows else 1)
        tiles = 1 + grid.rows * grid.columns
        return Plan(tiles, tokens, lambda image: self.tiles(image, grid), lambda *_: "<image>" * tokens)

    def tiles(self, image: Image.Image, grid: Grid) -> Iterator[np.ndarray]:
        """A Pillow RGB image -> 1 + rows * columns tiles (3, side, side) float32: the whole, then row by row."""
        views = [resized(image, (self.side, self.side), self.pixels.resample)]
        if grid.rows:
            tall, wide = grid.rows * self.side, grid.columns * self.side
            by_width, by_height = wide / image.width, tall / image.height
            if by_width < by_height:
                height, width = min(math.ceil(image.height * by_width), tall), wide
            else:
                height, width = tall, min(math.ceil(image.width * by_height), wide)
            framed = Image.new("RGB", (wide, tall))
            fitted = resized(image, (width, height), self.pixels.resample)
            framed.paste(fitted, ((wide - width) // 2, (tall - height) // 2))
            corners = [(left, top) for top in range(0, tall, self.side) for left in range(0, wide, self.side)]
            views += [framed.crop((left, top, left + self.side, top + self.side)) for left, top in corners]
        return map(self.pixels.levels, views)

    def pack(
        self, newline: np.ndarray, visual: list[np.ndarray], sizes: list[tuple[int, int]], most_tiles: int | None
    ) -> np.ndarray:
        """Visual tokens of each tile, a list of (patches^2, width), of images of these sizes -> (tokens, width)."""
        packed, visual = [], list(visual)
        for height, width in sizes:
            grid = self.grid(height, width, most_tiles)
            packed.append(visual.pop(0))
            if not grid.rows:
                packed.append(newline[None])
                continue
            count, (above, left) = grid.rows * grid.columns, grid.borders
            tiles = np.stack(visual[:count]).reshape(grid.rows, grid.columns, self.patches, self.patches, -1)
            whole = tiles.swapaxes(1, 2).reshape(grid.rows * self.patches, grid.columns * self.patches, -1)
            whole = whole[above : len(whole) - above, left : whole.shape[1] - left]
            whole = shrunk(shrunk(whole, grid.kept[0]).swapaxes(0, 1), grid.kept[1]).swapaxes(0, 1)
            ends = np.broadcast_to(newline, (grid.kept[0], 1, len(newline)))
            packed.append(np.concatenate([whole, ends], axis=1).reshape(-1, len(newline)))
            del visual[:count]
        return np.concatenate(packed)


def shrunk(rows: np.ndarray, count: int) -> np.ndarray:
    """`count` of the rows of an array, each between two of them: bilinear, as PyTorch's `interpolate` places them."""
    if count == len(rows):
        return rows
    places = (np.arange(count, dtype=np.float32) + np.float32(0.5)) * np.float32(len(rows) / count) - np.float32(0.5)
    places = np.maximum(places, 0)
    above = places.astype(int)
    below = np.minimum(above + 1, len(rows) - 1)
    share = (places - above)[:, None, None]
    return rows[above] * (1 - share) + rows[below] * share


def load(fields: Fields, folder: pathlib.Path, checkpoint: Checkpoint) -> Parts:
    """config.json's `Fields`, the folder and its `Checkpoint` -> Parts."""
    text_config, vision_config = llava.configs(fields, feature_layer=-1, selects="full")
    settings = pixel_settings(fields, folder, vision_config)

    def form(take: Checkpoint) -> tuple[Vision, Connector, Decoder, np.ndarray]:
        newline = "model.image_newline" if "model.image_newline" in take else "image_newline"
        taken = llava.taken(take, fields, text_config, vision_config)
        return *taken, take.vector(newline, size=text_config.width)

    vision, connector, decoder, newline = checkpoint.fill(form)
    vision_parts = VisionParts(
        encoder=vision,
        connect=connector,
        tile=Tiler(settings.side, text_config.max_positions, settings.plan),
        image_token_id=fields.integer("image_token_index", fields.integer("image_token_id", 151646)),
        pack=functools.partial(settings.pack, newline),
    )
    return Parts(decoder, folder_layout(folder, CHATML), vision_parts)


def pixel_settings(config_fields: Fields, folder: pathlib.Path, vision_config: VisionConfig) -> AnyResolution:
    """The settings of the folder's image processor -> AnyResolution."""
    pixels = clip.pixel_settings(folder, vision_config.image_size)
    fields = clip.image_processor_fields(folder)
    pinpoints = fields.pairs("image_grid_pinpoints", 1000, clip.MOST_SIDE)
    config_fields.refuse_unless(image_grid_pinpoints=fields.raw("image_grid_pinpoints"))
    ratio = re.fullmatch(r"anyres_max_([1-9]\d?)", config_fields.text("vision_aspect_ratio", "anyres_max_9"))
    if ratio is None:
        raise config_fields.error("has no vision_aspect_ratio of the kind anyres_max_9")
    side, patches = vision_config.image_size, vision_config.image_size // vision_config.patch_size
    for point in pinpoints:
        if point[0] % side or point[1] % side:
            raise fields.error(f"has image_grid_pinpoints that tiles of {side} pixels do not fill: {list(point)}")
    return AnyResolution(pinpoints, side, patches, int(ratio[1]), pixels)
