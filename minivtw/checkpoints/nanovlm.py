"""nanoVLM, Hugging Face's teaching model (github.com/huggingface/nanoVLM): SigLIP, pixel shuffle, SmolLM2.

Its files come in three layouts, which the config tells apart:

    to May 2025    nanoVLM-222M                  no `vlm_extra_tokens`: one small image, its features before the text
    from June      nanoVLM-450M                  an image token, still one small image
    from 11 July   nanoVLM-230M-8k and later     `max_img_size`: tiles, which further tokens name

Until 10 June prompts were plain words, since then in ChatML, and `lm_chat_template` is in the config. The config is
flat, and the folder has no tokenizer of its own.
"""

import functools
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..inputs.images import Levels, resized
from ..inputs.prompts import MARK
from . import clip, llama
from .checkpoint import Checkpoint
from .fields import Fields
from .idefics3 import taken, tile_tokens
from .layouts import CHATML, Layout, known_layout
from .parts import Parts, Plan, Tiler, VisionParts, grid_within, one_tile

BILINEAR = Image.Resampling.BILINEAR
# What transformers calls a key in the configs of SigLIP and Llama -> what it is called here
VISION_KEYS = {
    "image_size": "vit_img_size", "patch_size": "vit_patch_size", "hidden_size": "vit_hidden_dim",
    "num_hidden_layers": "vit_n_blocks", "num_attention_heads": "vit_n_heads", "intermediate_size": "vit_inter_dim",
    "layer_norm_eps": "vit_ln_eps",
}  # fmt: skip
TEXT_KEYS = {
    "vocab_size": "lm_vocab_size", "hidden_size": "lm_hidden_dim", "num_hidden_layers": "lm_n_blocks",
    "num_attention_heads": "lm_n_heads", "num_key_value_heads": "lm_n_kv_heads", "intermediate_size": "lm_inter_dim",
    "rms_norm_eps": "lm_rms_eps", "rope_theta": "lm_re_base", "max_position_embeddings": "lm_max_position_embeddings",
    "tie_word_embeddings": "lm_tie_weights",
}  # fmt: skip
PARTS = ("vision_encoder.", "MP.proj", "decoder.", "decoder.head.weight")
# What the tensors of SigLIP and Llama are called -> what they are called here
NAMES = {
    "encoder.encoder.layers.": "encoder.blocks.", "layer_norm1": "ln1", "layer_norm2": "ln2",
    "post_layernorm": "layer_norm", "embeddings.patch_embedding": "patch_embedding.conv",
    "embeddings.position_embedding.weight": "patch_embedding.position_embedding", "decoder.layers.": "decoder.blocks.",
    "input_layernorm": "norm1", "post_attention_layernorm": "norm2", "embed_tokens": "token_embedding",
    "self_attn.o_proj": "attn.out_proj", "self_attn.": "attn.",
}  # fmt: skip
# It was trained on images before the question, so there they go.
IN_PLAIN_WORDS = Layout("", " Answer:", turn_end="<|endoftext|>", image=MARK, words="Question: ", images_move=True)


def load(fields: Fields, folder: pathlib.Path, checkpoint: Checkpoint) -> Parts:
    """config.json's `Fields`, the folder and its `Checkpoint` -> Parts."""
    vision_fields = fields.renamed(VISION_KEYS)
    vision_config = clip.vision_config(vision_fields, -1, drop_first=False, post_norm=True, kind="siglip_vision_model")
    text_config = llama.decoder_config(fields.renamed(TEXT_KEYS))
    factor = fields.positive_int("mp_pixel_shuffle_factor", 2)
    tokens = tile_tokens(fields, vision_config.image_size // vision_config.patch_size, factor)
    fields.refuse_unless(mp_image_token_length=tokens, vit_cls_flag=False, lm_attn_scaling=1.0, lm_use_tokens=False)
    extra = fields.section("vlm_extra_tokens").texts() if fields.has("vlm_extra_tokens") else {"image_token": MARK}
    if "image_token" not in extra:
        raise fields.error("names no image_token among its vlm_extra_tokens")
    side = vision_config.image_size
    if fields.has("max_img_size"):
        plan = grid_plan(fields, side, tokens, extra)
    else:  # one image, squeezed to a square, levels from 0 to 1
        pixels = clip.ClipPixels(None, (side, side), BILINEAR, crop=None, levels=Levels())
        plan = functools.partial(one_tile, pixels, tokens, extra["image_token"] * tokens)
    template = fields.text("lm_chat_template", "") or None
    form = lambda take: taken(take, text_config, vision_config, factor, PARTS)
    tower, connector, decoder = checkpoint.fill(form, NAMES)
    return Parts(
        decoder=decoder,
        layout=known_layout(template, f"{folder}/config.json", CHATML) if template else IN_PLAIN_WORDS,
        vision=VisionParts(
            encoder=tower,
            connect=connector,
            tile=Tiler(side, text_config.max_positions, plan),
            image_token=extra["image_token"],
        ),
        extra_tokens=tuple(extra.values()),
        tokenizer=fields.text("lm_tokenizer", "HuggingFaceTB/cosmo2-tokenizer"),
    )


def grid_plan(fields: Fields, side: int, tokens: int, extra: dict[str, str]) -> Callable[..., Plan]:
    """Tiles, the overview first, each with the token of its place: the `Tiler`'s plan in the third layout."""
    edge = fields.positive_int("max_img_size", most=clip.MOST_SIDE)
    fills = fields.boolean("resize_to_max_side_len", False)
    places = range(1, edge // side + 1)  # of tiles, in a row or a column
    if edge % side or not all(f"r{row}c{column}" in extra for row in places for column in places):
        raise fields.error(f"cannot name every tile of {side} pixels in an image of {edge}")
    return functools.partial(GridPixels(side, edge, fills, "global_image_token" in extra).plan, tokens, extra)


def stands_for(rows: int, columns: int, has_view: bool, visual: str, extra: dict[str, str]) -> str:
    """The text of an image of rows x columns tiles, the overview first where there is one."""
    overview = f"{extra['global_image_token']}{visual}" if has_view else ""
    if has_view and rows * columns == 1:  # a single tile is the overview
        return overview
    places = [(row, column) for row in range(1, rows + 1) for column in range(1, columns + 1)]
    return overview + "".join(f"{extra[f'r{row}c{column}']}{visual}" for row, column in places)


class GridPixels(NamedTuple):
    """nanoVLM's preprocessing: an image of whole tiles, cut row by row, and first the overview.

    Levels go from 0 to 1. An image of one tile is its own overview.
    """

    side: int  # of a tile
    longest_edge: int  # no side becomes longer than this
    fills: bool  # make the longer side that long, even of a small image
    views: bool  # False: no overview

    def plan(self, tokens: int, extra: dict[str, str], height: int, width: int, most_tiles: int | None) -> Plan:
        """What an image of this size becomes; tokens: visual tokens per tile; extra: the tokens that name places."""
        edges, grid = range(self.longest_edge, 0, -self.side), functools.partial(self.grid, height, width)
        _, rows, columns, tiles = grid_within(most_tiles, edges, grid, self.views)
        text = stands_for(rows, columns, self.views, extra["image_token"] * tokens, extra)
        mark = lambda index, count: f"<image: {index}>" * (count > 1) + text
        return Plan(tiles, tiles * tokens, lambda image: self.tiles(image, rows, columns), mark)

    def tiles(self, image: Image.Image, rows: int, columns: int) -> Iterator[np.ndarray]:
        """A Pillow RGB image to tiles (3, side, side) float32."""
        side = self.side
        image = resized(image, (columns * side, rows * side), Image.Resampling.BICUBIC)
        pixels = Levels()(image)  # (3, rows * side, columns * side)
        if self.views and rows * columns > 1:  # the overview, shrunk in floats, not in levels
            shrunk = [resized(Image.fromarray(channel), (side, side), BILINEAR) for channel in pixels]
            yield np.stack([np.asarray(channel, np.float32) for channel in shrunk])
        grid = pixels.reshape(3, rows, side, columns, side).transpose(1, 3, 0, 2, 4)
        yield from grid.reshape(rows * columns, 3, side, side)

    def grid(self, height: int, width: int, longest_edge: int) -> tuple[int, int]:
        """Rows and columns of tiles: the longer side rounded up to whole tiles, then the shorter one in proportion."""
        longer, shorter = max(height, width), min(height, width)
        target = longest_edge if self.fills else min(longest_edge, math.ceil(longer / self.side) * self.side)
        other = max(math.ceil(shorter * (target / longer) / self.side), 1)
        return (other, target // self.side) if width >= height else (target // self.side, other)
