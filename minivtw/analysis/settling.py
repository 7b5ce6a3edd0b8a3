"""Attention settling: what the text attends to, layer by layer (Lin et al. 2024, section 3.1).

The paper sees the attention of deep layers settle on the first tokens, the sink (Xiao et al. 2023), and on the nearest
ones, and leave the visual tokens in the middle. Here every key that a text query sees belongs to one of four groups,
the first of these that it fits:

    sink       the prompt's first token
    visual     the visual tokens
    nearest    the query itself and the text tokens up to NEAREST - 1 before it
    other      all other text

The shares are means over heads and over the text queries after the first visual token; those before it see no image.
Even attention, spread over all the keys that a query sees, is the scale to read them by: nine tenths on the visual
tokens is nothing remarkable where they are nine tenths of the keys.
"""

import numpy as np

from ..methods.text import Method
from ..model.decoder import Decoder
from ..model.tokens import EmbeddedPrompt
from .tracing import traces

GROUPS = ("sink", "visual", "nearest", "other")
NEAREST = 4  # tokens, the query among them


def key_groups(is_visual: np.ndarray) -> np.ndarray:
    """Which group each key is in for each query: (tokens, tokens) indices into GROUPS, -1 where it lies ahead."""
    tokens = np.arange(len(is_visual))
    distance = tokens[:, None] - tokens[None, :]  # (queries, keys)
    groups = np.where(distance < NEAREST, GROUPS.index("nearest"), GROUPS.index("other"))
    groups[:, is_visual] = GROUPS.index("visual")
    groups[:, 0] = GROUPS.index("sink")
    groups[distance < 0] = -1
    return groups


def group_shares(attended: np.ndarray, is_visual: np.ndarray) -> np.ndarray:
    """The share of the text's attention that each of GROUPS gets in one layer: (4,), summing to 1.

    attended: (heads, tokens, tokens), the attention probabilities of a whole prompt.
    """
    groups, queries = key_groups(is_visual), ~is_visual & (np.cumsum(is_visual) > 0)  # after the first visual token
    by_query = attended.mean(0)  # (queries, keys)
    shares = [np.where(groups == group, by_query, 0)[queries].sum(-1).mean() for group in range(len(GROUPS))]
    return np.array(shares)


def even_shares(is_visual: np.ndarray) -> np.ndarray:
    """`group_shares` of attention that spreads evenly over everything a query sees."""
    tokens = len(is_visual)
    even = np.tri(tokens, dtype=np.float32) / np.arange(1, tokens + 1, dtype=np.float32)[:, None]
    return group_shares(even[None], is_visual)


def settling(decoder: Decoder, prompt: EmbeddedPrompt, method: Method | None = None) -> np.ndarray:
    """The shares of every layer under a method, (layers, 4) in the order of GROUPS."""
    everywhere = range(len(prompt.hidden))
    attention = traces(decoder, prompt, (), method, everywhere).attention  # (queries, layers, heads, keys)
    return np.array([group_shares(each, prompt.is_visual) for each in attention.transpose(1, 2, 0, 3)])
