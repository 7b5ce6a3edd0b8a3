"""Models of published sizes with random weights: for measurements, which depend on sizes and not on what was learned."""

import functools
import pathlib
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models

from ..checkpoints.layouts import CHATML
from ..checkpoints.parts import Parts, VisionParts
from ..model.connector import Connector, ShuffleConnector, connect, shuffle_connect
from ..model.layers import LayerNorm, Linear
from ..model.vision import Vision, VisionConfig, VisionLayer
from ..model.weights import Decoder, DecoderConfig, DecoderLayer
from ..vlm import VLM

SIGLIP: dict[str, Any] = dict(
    activation="gelu_pytorch_tanh", layer_norm_eps=1e-6, class_token=False, pre_norm=False, drop_first=False
)
CLIP: dict[str, Any] = dict(
    activation="quick_gelu", layer_norm_eps=1e-5, class_token=True, pre_norm=True, drop_first=True
)
SIGLIP_512 = VisionConfig(512, 16, 768, 12, 12, 3072, post_norm=True, feature_layer=-1, **SIGLIP)
SMOLLM2: dict[str, Any] = dict(vocabulary=49280, head_dim=64, rms_norm_eps=1e-5, rope_theta=1e5, max_positions=8192)
# The vision tower; the patches a side that become one visual token, None for a connector of two layers; the decoder.
SHAPES = {
    "smolvlm-256m": (
        SIGLIP_512, 4, DecoderConfig(width=576, layers=30, heads=9, kv_heads=3, mlp_width=1536, **SMOLLM2),
    ),
    "smolvlm-500m": (
        SIGLIP_512, 4, DecoderConfig(width=960, layers=32, heads=15, kv_heads=5, mlp_width=2560, **SMOLLM2),
    ),
    "llava-0.5b": (
        VisionConfig(384, 14, 1152, 26, 16, 4304, post_norm=False, feature_layer=-1, **SIGLIP), None,
        DecoderConfig(151936, 1024, 24, 16, 16, 64, 2816, 1e-6, 1e6, 32768, qkv_bias=True, tied_head=True),
    ),
    "llava-7b-layer": (
        VisionConfig(336, 14, 1024, 1, 16, 4096, post_norm=False, feature_layer=-1, **CLIP), None,
        DecoderConfig(32064, 4096, 1, 32, 32, 128, 11008, 1e-5, 1e4, 4096),
    ),
}  # fmt: skip


class Weights:
    """Random weights, about as large as trained ones."""

    def __init__(self) -> None:
        self._random = np.random.default_rng(0)

    def array(self, *shape: int) -> np.ndarray:
        values = self._random.standard_normal(shape, np.float32)
        values *= np.float32(0.02)
        return values

    def matrix(self, into: int, out: int) -> np.ndarray:
        """(into, out), laid out as checkpoints store it: each output's weights side by side."""
        return self.array(out, into).T

    def linear(self, into: int, out: int, has_bias: bool = True) -> Linear:
        return Linear(self.matrix(into, out), self.array(out) if has_bias else None)

    def norm(self, width: int) -> LayerNorm:
        return LayerNorm(1 + self.array(width), self.array(width))


def random_vision(config: VisionConfig, weights: Weights) -> Vision:
    """A vision tower of these sizes."""
    width, patch = config.width, 3 * config.patch_size**2
    layers = [
        VisionLayer(
            attention_norm=weights.norm(width),
            qkv=weights.linear(width, 3 * width),
            output=weights.linear(width, width),
            mlp_norm=weights.norm(width),
            up=weights.linear(width, config.mlp_width),
            down=weights.linear(config.mlp_width, width),
        )
        for _ in range(config.layers)
    ]
    return Vision(
        config=config,
        patch_embedding=weights.linear(patch, width, has_bias=not config.class_token),
        class_embedding=weights.array(width) if config.class_token else None,
        position_embedding=weights.array(config.patches + config.class_token, width),
        pre_norm=weights.norm(width) if config.pre_norm else None,
        layers=layers,
        post_norm=weights.norm(width),
    )


def random_decoder(config: DecoderConfig, weights: Weights) -> Decoder:
    """A decoder of these sizes."""
    width, query, key_value = config.width, config.heads * config.head_dim, config.kv_heads * config.head_dim
    layers = [
        DecoderLayer(
            input_norm=1 + weights.array(width),
            qkv=weights.linear(width, query + 2 * key_value, config.qkv_bias),
            output=weights.matrix(query, width),
            mlp_norm=1 + weights.array(width),
            gate_up=weights.matrix(width, 2 * config.mlp_width),
            down=weights.matrix(config.mlp_width, width),
        )
        for _ in range(config.layers)
    ]
    head = None if config.tied_head else weights.matrix(width, config.vocabulary)
    return Decoder(config, weights.array(config.vocabulary, width), layers, 1 + weights.array(width), head)


def random_model(shape: str) -> VLM:
    """A `VLM` of one of `SHAPES`. It has no tokenizer to speak of, so it computes and does not talk."""
    vision_config, factor, decoder_config = SHAPES[shape]
    weights = Weights()
    wide, width = vision_config.width, decoder_config.width
    if factor:
        shuffle = ShuffleConnector(weights.linear(wide * factor**2, width, has_bias=False), factor)
        to_tokens = functools.partial(shuffle_connect, shuffle)
    else:
        connector = Connector(weights.linear(wide, width), weights.linear(width, width), "gelu")
        to_tokens = functools.partial(connect, connector)
    encoder = random_vision(vision_config, weights)
    vision = VisionParts(encoder=encoder, connect=to_tokens, tile=lambda images, most: (None, []))
    parts = Parts(random_decoder(decoder_config, weights), CHATML, vision)
    return VLM(pathlib.Path(shape), parts, Tokenizer(models.BPE()), frozenset())


def visual_tokens(shape: str) -> int:
    """Visual tokens of one tile."""
    vision, factor, _ = SHAPES[shape]
    return vision.features // (factor or 1) ** 2
