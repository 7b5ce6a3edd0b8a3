"""Attention: rotary positions, and grouped-query attention for the encoder and the decoder alike."""

import functools

import numpy as np

from .blocks import row_blocks, side_by_side
from .layers import softmax


@functools.lru_cache(maxsize=4)
def rotary_table(length: int, head_dim: int, theta: float) -> np.ndarray:
    """`rotary` for the positions 0 … length - 1, computed once: every layer and every token asks."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)  # (head_dim / 2,)
    frequencies = 1 / np.float32(theta) ** exponents  # (head_dim / 2,)
    angles = np.arange(length, dtype=np.float32)[:, None] * frequencies  # (length, head_dim / 2)
    cosines, sines = np.cos(angles), np.sin(angles)  # (length, head_dim / 2)
    return np.stack([np.hstack([cosines, cosines]), np.hstack([-sines, sines])])  # (2, length, head_dim)


def rotary(positions: np.ndarray, head_dim: int, theta: float) -> np.ndarray:
    """Cosines and sines of rotary position embedding (Su et al. 2021, RoFormer, equation 34).

    Channel pair i of a head turns by the angle position * theta^(-2i / head_dim). positions: (tokens,) integers.
    Returns what `rotate` multiplies the channels with, (2, tokens, head_dim) float32: each cosine twice, and each sine
    first with the minus sign of equation 34, then without.
    """
    length = 1 << int(positions.max(initial=0)).bit_length()  # a power of two: few tables are made
    return rotary_table(length, head_dim, theta)[:, positions]


def rotate(x: np.ndarray, cosines: np.ndarray, sines: np.ndarray) -> np.ndarray:
    """Turn each channel pair of x by its angle. Hugging Face's Llama pairs channel i with i + head_dim / 2.

    x: (heads, tokens, head_dim); cosines and sines: (tokens, head_dim). Returns (heads, tokens, head_dim).
    """
    half = x.shape[-1] // 2
    turned = np.concatenate([x[..., half:], x[..., :half]], axis=-1)  # (heads, tokens, head_dim)
    turned *= sines
    turned += x * cosines
    return turned


def split_heads(x: np.ndarray, heads: int) -> np.ndarray:
    """(tokens, heads * head_dim) -> (heads, tokens, head_dim)."""
    return x.reshape(len(x), heads, x.shape[1] // heads).swapaxes(0, 1)


MOST_QUERIES = 128  # in a block: their scores are all that is ever held of (heads, new, tokens)


def attention(queries: np.ndarray, keys: np.ndarray, values: np.ndarray, sees: np.ndarray | None = None) -> np.ndarray:
    """Grouped-query attention (Ainslie et al. 2023): softmax(q k^T / sqrt(head_dim)) v.

    queries: (heads, new, head_dim); keys, values: (kv_heads, tokens, head_dim), heads a multiple of kv_heads; sees:
    (new,) integers, ascending, how many of the first keys each query may see; None: all of them.
    Returns the context, (new, heads * head_dim).
    """
    (heads, new, head_dim), (kv_heads, tokens, _) = queries.shape, keys.shape
    sees = np.full(new, tokens) if sees is None else sees  # (new,)
    scale = np.float32(head_dim**-0.5)
    # The heads that share a key head stand on an axis of their own, along which NumPy repeats the keys without copying.
    grouped = queries.reshape(kv_heads, heads // kv_heads, new, head_dim)  # (kv_heads, group, new, head_dim)
    context = np.empty((new, heads, head_dim), np.float32)  # (new, heads, head_dim)

    def work(rows: slice) -> None:
        first, last = sees[rows][0], sees[rows][-1]  # all see the keys before `first`, none those after `last`
        scores = (grouped[:, :, rows] * scale) @ keys[:, None, :last].swapaxes(-1, -2)  # (kv_heads, group, rows, last)
        if first < last:
            hidden = np.arange(first, last) >= sees[rows][:, None]  # (rows, last - first)
            np.copyto(scores[..., first:], np.float32(-np.inf), where=hidden)
        scores -= scores.max(axis=-1, keepdims=True)  # the largest exponent is 0: no overflow
        np.exp(scores, out=scores)
        part = scores @ values[:, None, :last]  # (kv_heads, group, rows, head_dim)
        part /= scores.sum(axis=-1, keepdims=True)  # divides the context, which is shorter than a row of scores
        context[rows] = part.reshape(heads, -1, head_dim).swapaxes(0, 1)

    side_by_side(work, row_blocks(new, MOST_QUERIES)[::-1])  # the rows that see most keys take longest: they go first
    return context.reshape(new, heads * head_dim)


def attention_probabilities(queries: np.ndarray, keys: np.ndarray, sees: np.ndarray | None = None) -> np.ndarray:
    """softmax(q k^T / sqrt(head_dim)) as it is written. Arguments as for `attention`. Returns (heads, new, tokens)."""
    (heads, new, head_dim), (kv_heads, tokens, _) = queries.shape, keys.shape
    keys = np.repeat(keys, heads // kv_heads, axis=0)  # (heads, tokens, head_dim)
    scores = (queries * np.float32(head_dim**-0.5)) @ keys.swapaxes(-1, -2)  # (heads, new, tokens)
    if sees is not None and new and sees.min() < tokens:  # else every query sees everything
        scores = np.where(np.arange(tokens) < sees[:, None], scores, np.float32(-np.inf))
    return softmax(scores)
