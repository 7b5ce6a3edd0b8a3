"""The method's vocabulary: which tokens leave, before which layer, and what the paper compares that with.

The method itself is three lines of the loop in `decoder.py`.
"""

from typing import NamedTuple

import numpy as np

from .model.decoder import forward
from .errors import InputError


class Withdrawal(NamedTuple):
    """What is withdrawn, and where (Lin et al. 2024, section 3.2; the other choices are its ablations).

    layer: K; layers 0 … K-1 see every token, layers K … only those that stay. None: nothing ever leaves;
        "adaptive" until `search.forward_adaptive` has decided.
    positions: "keep" (the method): those that stay keep their positions; "reindex": they are renumbered from 0.
    tokens: "visual" (the method), or "random": as many tokens as there are visual ones, drawn by `seed`.
    """

    layer: int | str | None
    positions: str = "keep"
    tokens: str = "visual"
    seed: int = 0


def check(withdrawal, layers):
    """Raise InputError unless the withdrawal can be carried out in a decoder of this many layers."""
    layer, positions, tokens, _ = withdrawal
    if layer is not None and (isinstance(layer, bool) or not isinstance(layer, (int, np.integer))):
        raise InputError(f"the withdrawal layer must be a whole number or None, not {layer!r}")
    if layer is not None and not 0 <= layer <= layers:
        raise InputError(f"the withdrawal layer must be from 0 to {layers}, the number of layers, not {layer}")
    if positions not in ("keep", "reindex"):
        raise InputError(f"positions must be 'keep' or 'reindex', not {positions!r}")
    if tokens not in ("visual", "random"):
        raise InputError(f"tokens must be 'visual' or 'random', not {tokens!r}")
    return withdrawal


def staying(is_visual, withdrawal):
    """Which tokens of a prompt go on past the withdrawal layer. is_visual: (tokens,) booleans. Returns the same shape.

    The last token always stays: its hidden state becomes the answer's first token.
    """
    if withdrawal.tokens == "visual":
        return ~is_visual
    stays = np.ones(len(is_visual), bool)
    drawn = np.random.default_rng(withdrawal.seed).permutation(len(is_visual) - 1)
    stays[drawn[: is_visual.sum()]] = False
    return stays


def forward_with(decoder, hidden, positions, cache, withdrawal, stays, observe=None):
    """`decoder.forward` under any `Withdrawal`, the ablations included. Arguments and result as there.

    Renumbered, a token's position in layers K … is its place among the tokens that their caches hold.
    """
    layer = withdrawal.layer
    if withdrawal.positions == "keep" or layer in (None, len(decoder.layers)):
        return forward(decoder, hidden, positions, cache, layer, stays, observe=observe)
    hidden = forward(decoder, hidden, positions, cache, stop=layer, observe=observe)[stays]
    renumbered = len(cache[layer]) + np.arange(len(hidden))
    return forward(decoder, hidden, renumbered, cache, start=layer, observe=observe)
