"""nanoVLM, Hugging Face's teaching model: SigLIP, pixel shuffle, SmolLM2; in its first layout and in the later one.

The first (nanoVLM-222M) sees one small picture and asks in plain words. The later (nanoVLM-450M) cuts pictures into
tiles that extra tokens name, and asks in ChatML. The config is flat, and the folder has no tokenizer of its own.
"""

import functools

import numpy as np

from ..model.connector import ShuffleConnector, shuffle_connect
from ..model.decoder import Decoder, DecoderConfig, DecoderLayer
from ..inputs.images import ClipPixels, GridPixels
from ..model.layers import LayerNorm, Linear
from ..model.vision import Vision, VisionConfig, VisionLayer
from .idefics3 import tile_tokens
from .llava import chatml
from .parts import VisionParts, Parts

BILINEAR = 2  # Pillow's number


def load(fields, folder, checkpoint):
    """config.json's `Fields`, the folder and its `Checkpoint` -> Parts."""
    vision_config, text_config = vision_fields(fields), text_fields(fields)
    factor = fields.whole("mp_pixel_shuffle_factor", 2)
    tokens = tile_tokens(fields, vision_config.image_size // vision_config.patch_size, factor)

    def form(take):
        projection = take.matrix("MP.proj.weight", into=vision_config.width * factor**2, out=text_config.width)
        return vision(vision_config, take), ShuffleConnector(Linear(projection), factor), decoder(text_config, take)

    tower, connector, text = checkpoint.fill(form)
    is_first_layout = not fields.has("vlm_extra_tokens")
    extra = {"image_token": "<image>"} if is_first_layout else fields.part("vlm_extra_tokens").texts()
    tile = first_tile(vision_config, tokens) if is_first_layout else later_tile(fields, vision_config, tokens, extra)
    return Parts(
        decoder=text,
        chat=question_and_answer if is_first_layout else chatml,
        turn_end="<|endoftext|>" if is_first_layout else "<|im_end|>",
        vision=VisionParts(tower, functools.partial(shuffle_connect, connector), tile, extra["image_token"], mark="<image>"),
        extra_tokens=tuple(extra.values()),
        tokenizer=fields.text("lm_tokenizer", "HuggingFaceTB/cosmo2-tokenizer"),
    )


def first_tile(config, tokens):
    """One picture, squeezed to a square, levels from 0 to 1: `VisionParts.tile` of the first layout."""
    side = (config.image_size, config.image_size)
    pixels = ClipPixels(None, side, BILINEAR, crop=None, scale=1 / 255, mean=None, std=None)
    return lambda images, _: (np.stack([pixels(image) for image in images]), ["<image>" * tokens] * len(images))


def later_tile(fields, config, tokens, extra):
    """Tiles, the view of it all first, each with the token of its place: `VisionParts.tile` of the later layout."""
    pixels = GridPixels(
        side=config.image_size,
        longest_edge=fields.whole("max_img_size"),
        fills=fields.flag("resize_to_max_side_len", False),
        views="global_image_token" in extra,
    )
    most = pixels.longest_edge // pixels.side  # tiles a side
    named = {"image_token", *(f"r{row}c{column}" for row in range(1, most + 1) for column in range(1, most + 1))}
    if pixels.longest_edge % pixels.side or named - extra.keys():
        raise fields.error(f"cannot name every tile of {pixels.side} pixels in a picture of {pixels.longest_edge}")
    visual = extra["image_token"] * tokens

    def stands_for(rows, columns):
        whole = f"{extra['global_image_token']}{visual}" if pixels.views else ""
        if pixels.views and rows * columns == 1:  # a single tile is the view of it all
            return whole
        places = [(row, column) for row in range(1, rows + 1) for column in range(1, columns + 1)]
        return whole + "".join(f"{extra[f'r{row}c{column}']}{visual}" for row, column in places)

    def tile(images, most_tiles):
        seen = [pixels(image, most_tiles) for image in images]
        texts = [stands_for(*grid) for _, grid in seen]
        if len(texts) > 1:
            texts = [f"<image: {index}>{text}" for index, text in enumerate(texts)]
        return np.concatenate([tiles for tiles, _ in seen]), texts

    return tile


def question_and_answer(turn, is_first):
    """The first layout's way to ask. It was trained on pictures before the question, so there they go."""
    images = "<image>" * turn.count("<image>")
    return f"{images}Question: {turn.replace('<image>', '').strip()} Answer:"


def vision_fields(fields):
    """The `vit_*` keys -> VisionConfig."""
    fields.choice("vit_cls_flag", (False,), False)
    return VisionConfig(
        image_size=fields.whole("vit_img_size"),
        patch_size=fields.whole("vit_patch_size"),
        width=fields.whole("vit_hidden_dim"),
        layers=fields.whole("vit_n_blocks"),
        heads=fields.whole("vit_n_heads"),
        mlp_width=fields.whole("vit_inter_dim"),
        activation="gelu_pytorch_tanh",
        layer_norm_eps=fields.number("vit_ln_eps", 1e-6),
        class_token=False,
        pre_norm=False,
        post_norm=True,
        feature_layer=-1,
        drop_first=False,
    )


def text_fields(fields):
    """The `lm_*` keys -> DecoderConfig."""
    fields.choice("lm_attn_scaling", (1, 1.0), 1.0)
    width, heads = fields.whole("lm_hidden_dim"), fields.whole("lm_n_heads")
    return DecoderConfig(
        vocabulary=fields.whole("lm_vocab_size"),
        width=width,
        layers=fields.whole("lm_n_blocks"),
        heads=heads,
        kv_heads=fields.whole("lm_n_kv_heads"),
        head_dim=width // heads,
        mlp_width=fields.whole("lm_inter_dim"),
        rms_norm_eps=fields.number("lm_rms_eps", 1e-5),
        rope_theta=fields.number("lm_re_base", 100_000),
        max_positions=fields.whole("lm_max_position_embeddings", 8192),
        tied_head=fields.flag("lm_tie_weights", True),
    )


def vision(config, take):
    """The tensors `vision_encoder.*` -> Vision."""
    width, tower = config.width, "vision_encoder."

    def norm(name):
        return LayerNorm(take.vector(f"{name}.weight", size=width), take.vector(f"{name}.bias", size=width))

    def linear(name, into=width, out=width, kernel=()):
        weight = take.matrix(f"{name}.weight", into=into, out=out, kernel=kernel)
        return Linear(weight, take.vector(f"{name}.bias", size=out))

    def layer(index):
        name = f"{tower}blocks.{index}."
        return VisionLayer(
            attention_norm=norm(f"{name}ln1"),
            qkv=linear(f"{name}attn.qkv_proj", out=3 * width),
            output=linear(f"{name}attn.out_proj"),
            mlp_norm=norm(f"{name}ln2"),
            up=linear(f"{name}mlp.fc1", out=config.mlp_width),
            down=linear(f"{name}mlp.fc2", into=config.mlp_width),
        )

    kernel = (3, config.patch_size, config.patch_size)
    return Vision(
        config=config,
        patch_embedding=linear(f"{tower}patch_embedding.conv", into=3 * config.patch_size**2, kernel=kernel),
        class_embedding=None,
        position_embedding=take.table(f"{tower}patch_embedding.position_embedding", config.patches, width, batch=True),
        pre_norm=None,
        layers=take.layers(config.layers, layer),
        post_norm=norm(f"{tower}layer_norm"),
    )


def decoder(config, take):
    """The tensors `decoder.*` -> Decoder."""
    width, key_value = config.width, config.kv_heads * config.head_dim

    def layer(index):
        name = f"decoder.blocks.{index}."
        projections = [f"{name}attn.{letter}_proj.weight" for letter in "qkv"]
        gate_up = [f"{name}mlp.{part}_proj.weight" for part in ("gate", "up")]
        return DecoderLayer(
            input_norm=take.vector(f"{name}norm1.weight", size=width),
            qkv=Linear(take.matrix(*projections, into=width, out=(width, key_value, key_value))),
            output=take.matrix(f"{name}attn.out_proj.weight", into=width, out=width),
            mlp_norm=take.vector(f"{name}norm2.weight", size=width),
            gate_up=take.matrix(*gate_up, into=width, out=config.mlp_width),
            down=take.matrix(f"{name}mlp.down_proj.weight", into=config.mlp_width, out=width),
        )

    embedding, head = "decoder.token_embedding.weight", "decoder.head.weight"
    if config.tied_head:  # the file holds the shared tensor once, under either name
        embedding, head = (embedding if embedding in take else head), None
    return Decoder(
        config=config,
        embedding=take.table(embedding, config.vocabulary, width),
        layers=take.layers(config.layers, layer),
        norm=take.vector("decoder.norm.weight", size=width),
        head=take.matrix(head, into=width, out=config.vocabulary) if head else None,
    )
