"""Models of published sizes with random weights: for measurements, which depend on sizes and not on what was learned."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models

from ..checkpoints import clip, llama
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.layouts import CHATML
from ..checkpoints.parts import Parts, VisionParts
from ..model.vision import VisionConfig
from ..model.weights import DecoderConfig
from ..vlm import VLM

SIGLIP: dict[str, Any] = dict(
    activation="gelu_pytorch_tanh", layer_norm_eps=1e-6, class_token=False, pre_norm=False, drop_first=False
)
CLIP: dict[str, Any] = dict(
    activation="quick_gelu", layer_norm_eps=1e-5, class_token=True, pre_norm=True, drop_first=True
)
SIGLIP_512 = VisionConfig(512, 16, 768, 12, 12, 3072, post_norm=True, feature_layer=-1, **SIGLIP)
SMOLLM2: dict[str, Any] = dict(vocabulary=49280, head_dim=64, rms_norm_eps=1e-5, rope_theta=1e5, max_positions=8192)
# The vision tower; how many patches a side become one visual token; the decoder.
SHAPES = {
    "smolvlm-256m": (
        SIGLIP_512, 4, DecoderConfig(width=576, layers=30, heads=9, kv_heads=3, mlp_width=1536, **SMOLLM2),
    ),
    "smolvlm-500m": (
        SIGLIP_512, 4, DecoderConfig(width=960, layers=32, heads=15, kv_heads=5, mlp_width=2560, **SMOLLM2),
    ),
    "llava-0.5b": (
        VisionConfig(384, 14, 1152, 26, 16, 4304, post_norm=False, feature_layer=-1, **SIGLIP), 1,
        DecoderConfig(151936, 1024, 24, 16, 16, 64, 2816, 1e-6, 1e6, 32768, qkv_bias=True, tied_head=True),
    ),
    "llava-7b-layer": (
        VisionConfig(336, 14, 1024, 1, 16, 4096, post_norm=False, feature_layer=-1, **CLIP), 1,
        DecoderConfig(32064, 4096, 1, 32, 32, 128, 11008, 1e-5, 1e4, 4096),
    ),
}  # fmt: skip


class RandomWeights(Checkpoint):
    """A checkpoint without files: tensors of every name and size, random, and about as large as trained ones."""

    def __init__(self) -> None:
        self.shards, self.low_memory, self._names, self._taken, self._checked = {}, False, {}, [], True
        self._random = np.random.default_rng(0)

    def _take(self, *names: str, shapes: Sequence[tuple[int, ...]], out: tuple[int, ...]) -> np.ndarray:
        values = self._random.standard_normal(out, np.float32)
        values *= np.float32(0.02)
        return 1 + values if "norm" in names[0] and names[0].endswith("weight") else values


def random_model(shape: str) -> VLM:
    """A `VLM` of one of `SHAPES`. It has no tokenizer to speak of and no connector: it computes, and does not talk."""
    vision_config, _, decoder_config = SHAPES[shape]
    weights = RandomWeights()
    encoder = clip.vision(vision_config, weights, "")
    vision = VisionParts(encoder, connect=lambda features: features, tile=lambda images, most: (None, []))
    parts = Parts(llama.decoder(decoder_config, weights), CHATML, vision)
    return VLM(pathlib.Path(shape), parts, Tokenizer(models.BPE()), frozenset())
