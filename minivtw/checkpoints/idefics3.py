"""Idefics3 and SmolVLM (Marafioti et al. 2025, arXiv 2504.05299): SigLIP on tiles, pixel shuffle, a Llama decoder.

`idefics3` and `smolvlm` are the same model under two names; SmolVLM, SmolDocling and Granite-Docling carry the first,
SmolVLM2 the second.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import numpy as np

from ..inputs.images import normalised
from ..model.connector import ShuffleConnector, shuffle_connect
from ..model.layers import Linear
from . import clip, llama
from .layouts import SMOLVLM, folder_layout
from .parts import Parts, VisionParts


def load(fields, folder, checkpoint):
    """config.json's `Fields`, the folder and its `Checkpoint` -> Parts."""
    fields.refuse_unless(quantization_config=None)
    tied = fields.flag("tie_word_embeddings", False)  # only what is said here counts
    text_config = llama.decoder_config(fields.part("text_config"))._replace(tied_head=tied)
    vision_config = clip.vision_config(
        fields.part("vision_config"), feature_layer=-1, drop_first=False, post_norm=True, default_type="idefics3_vision"
    )
    pixels = pixel_settings(fields, folder)
    factor = fields.whole("scale_factor", 2)
    fields.part("text_config").refuse_unless(pixel_shuffle_factor=factor)
    tokens = tile_tokens(fields, pixels.side // vision_config.patch_size, factor)  # a tile

    def form(take):
        name, into = "model.connector.modality_projection.proj.weight", vision_config.width * factor**2
        projection = take.matrix(name, into=into, out=text_config.width)
        return (
            clip.vision(vision_config, take, "model.vision_model."),
            ShuffleConnector(Linear(projection), factor),
            llama.decoder(text_config, take, "model.text_model."),
        )

    vision, connector, decoder = checkpoint.fill(form)
    vision_parts = VisionParts(
        encoder=on_tiles(vision, pixels.side),
        connect=functools.partial(shuffle_connect, connector),
        tile=functools.partial(tile, pixels, tokens),
        image_token_id=fields.index("image_token_id", 128257),
    )
    return Parts(decoder, folder_layout(folder, SMOLVLM), vision_parts)


def tile(pixels, tokens, images, most_tiles):
    """Images -> their tiles, and the text that stands for each."""
    seen = [pixels(image, most_tiles) for image in images]
    return np.concatenate([tiles for tiles, _ in seen]), [stands_for(*grid, tokens) for _, grid in seen]


def stands_for(rows, columns, tokens):
    """The text of an image of rows x columns tiles: each tile named by its place, `tokens` visual tokens a tile."""
    around, visual = "<fake_token_around_image>", "<image>" * tokens
    text = ""
    for row in range(1, rows + 1):
        text += "".join(f"{around}<row_{row}_col_{column}>{visual}" for column in range(1, columns + 1)) + "\n"
    return f"{text}{chr(10) if rows else ''}{around}<global-img>{visual}{around}"


def tile_tokens(fields, side, factor):
    """Visual tokens of a tile of side x side patches, of which factor x factor become one."""
    if side == 0 or side % factor:
        raise fields.error(f"joins {factor} x {factor} patches, into which a tile of {side} x {side} cannot be cut")
    return (side // factor) ** 2


def on_tiles(vision, side):
    """The tower for tiles of `side` pixels: its position table looked up where a tile's patches lie."""
    config = vision.config
    rows = fractional_positions(side // config.patch_size, config.image_size // config.patch_size)
    places = (rows[:, None] * (config.image_size // config.patch_size) + rows).ravel()  # (patches,)
    table = vision.position_embedding[places]  # (patches, width), a copy
    table.flags.writeable = False  # as in the checkpoint
    return dataclasses.replace(vision, config=config._replace(image_size=side), position_embedding=table)


def fractional_positions(patches, places):
    """Which of `places` rows of positions each of a tile's `patches` rows takes: the one at its fraction of the way.

    Columns alike. With as many patches as places each takes its own, as long as float32 tells the fractions apart from
    the boundaries. It does for every published size (14, 16, 24, 26, 27 and 32 patches); for some others (19, 25, 31)
    PyTorch itself finds different rows on different processors.
    """
    fractions = np.arange(patches, dtype=np.float32) * (np.float32(1) / np.float32(patches))
    step = 1 / places
    boundaries = (step + step * np.arange(math.ceil((1 - step) / step))).astype(np.float32)  # (places - 1,)
    return np.searchsorted(boundaries, np.minimum(fractions, np.float32(1 - 1e-6)), side="right")


def pixel_settings(config_fields, folder):
    """The settings of the folder's image processor -> TiledPixels."""
    fields = clip.image_processor_fields(config_fields, folder)
    size = fields.part("size", {"longest_edge": 1456})
    settings = TiledPixels(
        size.whole("longest_edge", most=clip.MOST_PIXELS_A_SIDE) if fields.flag("do_resize", True) else None,
        fields.part("max_image_size", {"longest_edge": 364}).whole("longest_edge", most=clip.MOST_PIXELS_A_SIDE),
        fields.flag("do_image_splitting", True),
        fields.choice("resample", range(6), 1),
        *clip.level_settings(fields, [0.5, 0.5, 0.5]),
    )
    if (settings.longest_edge or 0) > clip.MOST_TILES_A_SIDE * settings.side:
        raise fields.error(f"cuts pictures of {settings.longest_edge} pixels into tiles of {settings.side}")
    return settings


class TiledPixels(NamedTuple):
    """Idefics3's preprocessing: the picture cut into square tiles, row by row, and last one small view of the whole.

    The picture is resized twice: to its longest edge, keeping its shape, then to whole tiles. A picture of one tile is
    its own view of the whole.
    """

    longest_edge: int | None  # resize until the longer side is this long; None: leave it
    side: int  # of a tile
    splits: bool  # False: only the view of the whole
    resample: int  # Pillow's number of the interpolation; 1 is Lanczos
    scale: float | None  # 1/255
    mean: tuple[float, float, float] | None
    std: tuple[float, float, float] | None

    def __call__(self, image, most_tiles=None):
        """A Pillow RGB image to tiles (tiles, 3, side, side) float32 and their grid (rows, columns), (0, 0) if uncut.

        `most_tiles` shortens the longest edge, by whole tiles, until there are no more tiles than that.
        """
        side = self.side
        edge = self.edge_within(image.height, image.width, most_tiles)
        if edge:
            height, width = scaled(image.height, image.width, edge)
            image = image.resize((width, height), self.resample)
        rows, columns = self.grid(image.height, image.width)
        image = image.resize((columns * side, rows * side), self.resample)
        if rows * columns == 1:
            return self.normalised(image)[None], (0, 0)
        boxes = [(column * side, row * side) for row in range(rows) for column in range(columns)]
        views = [image.crop((left, top, left + side, top + side)) for left, top in boxes]
        views.append(image.resize((side, side), self.resample))
        return np.stack([self.normalised(view) for view in views]), (rows, columns)

    def normalised(self, image):
        return normalised(image, self.scale, self.mean, self.std)

    def grid(self, height, width):
        """Rows and columns of tiles that a picture of this size is stretched to."""
        if not self.splits:
            return 1, 1
        ratio = width / height
        if width >= height:
            columns = math.ceil(width / self.side)
            return math.ceil(int(columns * self.side / ratio) / self.side), columns
        rows = math.ceil(height / self.side)
        return rows, math.ceil(int(rows * self.side * ratio) / self.side)

    def edge_within(self, height, width, most_tiles):
        """The longest edge under which the picture becomes at most so many tiles, the view of the whole included."""
        longest = self.longest_edge or max(height, width)
        for edge in (self.longest_edge, *range((longest - 1) // self.side * self.side, 0, -self.side)):
            rows, columns = self.grid(*(scaled(height, width, edge) if edge else (height, width)))
            if most_tiles is None or rows * columns == 1 or rows * columns + 1 <= most_tiles:
                break
        return edge


def scaled(height, width, longest_edge):
    """(height, width) of a picture whose longer side becomes `longest_edge`; the shorter is even, as in Idefics3."""
    ratio = width / height
    if width >= height:
        width = longest_edge
        height = int(width / ratio)
        height = max(height + height % 2, 1)
    else:
        height = longest_edge
        width = int(height * ratio)
        width = max(width + width % 2, 1)
    return height, width
