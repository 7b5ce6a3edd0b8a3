"""Idefics3 and SmolVLM (Marafioti et al. 2025, arXiv 2504.05299): SigLIP on tiles, pixel shuffle, a Llama decoder.

`idefics3` and `smolvlm` are the same model under two names; SmolVLM-256M and 500M carry the first, SmolVLM2 the second.
"""

import dataclasses
import functools
import math

import numpy as np

from ..model.connector import ShuffleConnector, shuffle_connect
from ..inputs.images import TiledPixels
from ..model.layers import Linear
from . import clip, llama
from .llava import image_processor_fields
from .parts import VisionParts, Parts

MOST_LONGEST_EDGE = 4096  # transformers makes no picture longer


def load(fields, folder, checkpoint):
    """config.json's `Fields`, the folder and its `Checkpoint` -> Parts."""
    tied = fields.flag("tie_word_embeddings", False)
    text_config = llama.decoder_config(fields.part("text_config"))._replace(tied_head=tied)
    vision_config = clip.vision_config(
        fields.part("vision_config"), feature_layer=-1, drop_first=False, post_norm=True, default_type="idefics3_vision"
    )
    pixels = pixel_settings(folder)
    factor = fields.whole("scale_factor", 2)
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

    def tile(images, most_tiles):
        seen = [pixels(image, most_tiles) for image in images]
        return np.concatenate([tiles for tiles, _ in seen]), [stands_for(*grid, tokens) for _, grid in seen]

    vision_parts = VisionParts(
        encoder=on_tiles(vision, pixels.side),
        connect=functools.partial(shuffle_connect, connector),
        tile=tile,
        image_token_id=fields.index("image_token_id", 128257),
        mark="<image>",
    )
    return Parts(decoder=decoder, chat=chat, turn_end="<end_of_utterance>", vision=vision_parts)


def chat(turn, is_first):
    """SmolVLM's chat layout: a space before the question, unless an image comes first."""
    space = "" if turn.startswith("<image>") else " "
    return f"{'<|im_start|>' if is_first else chr(10)}User:{space}{turn}<end_of_utterance>\nAssistant:"


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
    table = vision.position_embedding[places]  # (patches, width)
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


def pixel_settings(folder):
    """The settings of the folder's image processor -> TiledPixels."""
    fields = image_processor_fields(folder)
    size, resizes = fields.part("size", {"longest_edge": 1456}), fields.flag("do_resize", True)
    normalises = fields.flag("do_normalize", True)
    settings = TiledPixels(
        longest_edge=size.whole("longest_edge") if resizes else None,
        side=fields.part("max_image_size", {"longest_edge": 364}).whole("longest_edge"),
        splits=fields.flag("do_image_splitting", True),
        resample=fields.choice("resample", range(6), 1),
        scale=fields.number("rescale_factor", 1 / 255) if fields.flag("do_rescale", True) else None,
        mean=fields.numbers("image_mean", 3, [0.5, 0.5, 0.5]) if normalises else None,
        std=fields.numbers("image_std", 3, [0.5, 0.5, 0.5]) if normalises else None,
    )
    longest = max(settings.longest_edge or 0, settings.side)
    if longest > MOST_LONGEST_EDGE:
        raise fields.error(f"makes pictures of {longest} pixels a side; at most {MOST_LONGEST_EDGE} are allowed")
    return settings
