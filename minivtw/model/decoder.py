"""The decoder: a stack of Llama layers, and in its loop the withdrawal of the visual tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .attention import attention, rotary, rotate, split_heads
from .layers import Linear, linear, rms_norm, swiglu


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


def decoder_layer(hidden, positions, layer, cache, config):
    """One pre-norm layer: attention over the cache and the new tokens, then the feed-forward, each added to `hidden`.

    hidden: (tokens, width) float32; positions: (tokens,); cache: this layer's `LayerCache`, which gains the tokens'
    keys and values. Returns the new hidden (tokens, width) and the attention probabilities (heads, tokens, cached).
    """
    heads, kv_heads = config.heads, config.kv_heads
    normed = rms_norm(hidden, layer.input_norm, config.rms_norm_eps)
    qkv = split_heads(linear(normed, layer.qkv), heads + 2 * kv_heads)  # (heads + 2 * kv_heads, tokens, head_dim)
    queries, keys, values = np.split(qkv, [heads, heads + kv_heads])

    cosines, sines = rotary(positions, config.head_dim, config.rope_theta)  # (tokens, head_dim / 2)
    keys, values = cache.append(rotate(keys, cosines, sines), values, positions)  # (kv_heads, cached, head_dim)
    context, probabilities = attention(rotate(queries, cosines, sines), keys, values, causal=True)
    hidden = hidden + context @ layer.output  # (tokens, width)

    normed = rms_norm(hidden, layer.mlp_norm, config.rms_norm_eps)
    return hidden + swiglu(normed, layer.gate_up, layer.down), probabilities


def forward(decoder, hidden, positions, cache, withdraw_layer=None, stays=None, start=0, stop=None, observe=None):
    """Carry tokens through the layers. Prefill and decode are this one function, with many tokens or with one.

    hidden: (tokens, width) embeddings; positions: (tokens,), each token's place in the whole prompt; cache: a
    `KVCache`. Before layer `withdraw_layer` (K) all tokens leave but those that `stays`, (tokens,) booleans, marks
    (Lin et al. 2024, section 3.2). `start` and `stop` run a part of the stack. `observe(name, array)` sees each
    layer's attention probabilities and its hidden states.
    Returns the hidden states of the tokens that reached the end, (staying tokens, width).
    """
    for index in range(start, len(decoder.layers) if stop is None else stop):
        if index == withdraw_layer:  # Visual Tokens Withdrawal
            hidden, positions = hidden[stays], positions[stays]
        hidden, attended = decoder_layer(hidden, positions, decoder.layers[index], cache[index], decoder.config)
        if observe:
            observe(f"decoder.layers.{index}.attention", attended)
            observe(f"decoder.layers.{index}.hidden", hidden)
    return hidden


def logits(decoder, hidden):
    """Final norm and head. hidden: (tokens, width). Returns (tokens, vocabulary)."""
    head = decoder.embedding.T if decoder.head is None else decoder.head
    return rms_norm(hidden, decoder.norm, decoder.config.rms_norm_eps) @ head
