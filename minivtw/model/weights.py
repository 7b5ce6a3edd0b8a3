"""A decoder's sizes and weights, in the names that the code uses for its axes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .layers import Linear

MOST_LAYERS = 1_000  # of a model, and in a method's text


class DecoderConfig(NamedTuple):
    """The sizes of a decoder, in the names that the code uses for its axes."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    rms_norm_eps: float
    rope_theta: float
    max_positions: int
    qkv_bias: bool = False  # Qwen2 has biases on q, k and v; Llama has none
    tied_head: bool = False  # the head is the embedding, transposed


class DecoderLayer(NamedTuple):
    """The weights of one layer. q, k and v are one matrix, and so are gate and up: one BLAS call instead of five."""

    input_norm: np.ndarray  # (width,)
    qkv: Linear  # (width, (heads + 2 * kv_heads) * head_dim)
    output: np.ndarray  # (heads * head_dim, width)
    mlp_norm: np.ndarray  # (width,)
    gate_up: np.ndarray  # (width, 2 * mlp_width)
    down: np.ndarray  # (mlp_width, width)


@dataclass(frozen=True)
class Decoder:
    """A decoder's config and weights."""

    config: DecoderConfig
    embedding: np.ndarray  # (vocabulary, width)
    layers: Sequence[DecoderLayer]
    norm: np.ndarray  # (width,)
    head: np.ndarray | None  # (width, vocabulary); None: tied, the head is the embedding transposed
