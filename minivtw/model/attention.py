"""Attention: rotary positions, the causal mask, and grouped-query attention for the encoder and the decoder alike."""

import numpy as np

from .layers import softmax


def rotary(positions, head_dim, theta):
    """Cosines and sines of rotary position embedding (Su et al. 2021, RoFormer, equation 34).

    Channel pair i of a head turns by the angle position * theta^(-2i / head_dim).
    positions: (tokens,) integers. Returns two float32 arrays (tokens, head_dim / 2).
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = 1 / np.float32(theta) ** exponents  # (head_dim / 2,)
    angles = positions[:, None].astype(np.float32) * frequencies  # (tokens, head_dim / 2)
    return np.cos(angles), np.sin(angles)


def rotate(x, cosines, sines):
    """Turn each channel pair of x by its angle. Hugging Face's Llama pairs channel i with i + head_dim / 2.

    x: (heads, tokens, head_dim); cosines and sines: (tokens, head_dim / 2). Returns (heads, tokens, head_dim).
    """
    first, second = np.split(x, 2, axis=-1)  # (heads, tokens, head_dim / 2) each
    return np.concatenate([first * cosines - second * sines, second * cosines + first * sines], axis=-1)


def split_heads(x, heads):
    """(tokens, heads * head_dim) -> (heads, tokens, head_dim)."""
    tokens, width = x.shape
    return x.reshape(tokens, heads, width // heads).swapaxes(0, 1)


def attention(queries, keys, values, sees=None):
    """Grouped-query attention (Ainslie et al. 2023): softmax(q k^T / sqrt(head_dim)) v.

    queries: (heads, new, head_dim); keys, values: (kv_heads, tokens, head_dim), heads a multiple of kv_heads; sees:
    (new,) integers, how many of the first keys each query may see; None: all of them.
    Returns the context, (new, heads * head_dim).
    """
    heads, new, head_dim = queries.shape
    kv_heads, tokens, _ = keys.shape
    probabilities = attention_probabilities(queries, keys, sees)
    context = probabilities.reshape(kv_heads, heads // kv_heads * new, tokens) @ values
    return context.reshape(heads, new, head_dim).swapaxes(0, 1).reshape(new, heads * head_dim)


def attention_probabilities(queries, keys, sees=None):
    """softmax(q k^T / sqrt(head_dim)) as it is written. Arguments as for `attention`. Returns (heads, new, tokens)."""
    heads, new, head_dim = queries.shape
    kv_heads, tokens, _ = keys.shape
    # The heads that share a key head become rows of one matrix, so keys are never repeated: one product a key head.
    grouped = (queries * np.float32(head_dim**-0.5)).reshape(kv_heads, heads // kv_heads * new, head_dim)
    scores = (grouped @ keys.swapaxes(-1, -2)).reshape(heads, new, tokens)
    if sees is not None and new and sees[0] < tokens:  # else even the first query sees everything
        scores = np.where(np.arange(tokens) < sees[:, None], scores, np.float32(-np.inf))
    return softmax(scores)
