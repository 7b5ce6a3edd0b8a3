"""Which tokens go on, and on which of them a layer works: Visual Tokens Withdrawal, and what stands beside it.

A method is a function of two arguments, called before every layer, in prefill and in decode alike:

    method(index, tokens) -> tokens

It gives back the tokens that go on: all of them, some (`tokens[mask]`), or all with some of them only read and not
worked on (`tokens.freeze(mask)`). `tokens.attention(rows)` tells where tokens looked in the layer that they have just
passed; `tokens.notes` is a dict for what a method wants to remember until the prompt has reached the end. Decoded
tokens are text, so there is nothing to do for them; the prompt's last token must always stay and be worked on. The
published relatives, which keep some of the visual tokens, stand in `shelf.py` and `before.py`.
"""

from dataclasses import replace

import numpy as np

from ..model.tokens import Tokens
from .looking import text_after_image
from .text import Count, Layer, Layers, Method, NamedMethod, Seed, Share, known, named


@named
def withdraw(layer: Layer) -> Method:
    """Visual Tokens Withdrawal (Lin et al. 2024, section 3.2): before layer K every visual token leaves."""
    return lambda index, tokens: tokens[~tokens.is_visual] if index == layer else tokens


@named
def freeze(layers: Layers) -> Method:
    """ShortV (arXiv 2504.00502, section 3): in these layers visual tokens are read, but ask nothing and stay as they are."""
    return lambda index, tokens: tokens.freeze(tokens.is_visual) if index in layers else tokens


@named
def adaptive(share: Share = 0.1, quiet: Count = 2) -> Method:
    """Withdraw where this prompt's attention has left the image: after `quiet` layers in a row that gave the visual
    tokens less than `share` of the text's attention. Ours; it goes by the paper's first observation (section 3.1)."""

    def method(index: int, tokens: Tokens) -> Tokens:
        if index == 0 or not tokens.is_visual.any():
            return tokens
        tokens.notes[method] = tokens.notes.get(method, 0) + 1 if visual_share(tokens) < share else 0
        return tokens[~tokens.is_visual] if tokens.notes[method] >= quiet else tokens

    return method


def visual_share(tokens: Tokens) -> float:
    """How much of the text's attention went to visual tokens in the layer just passed: mean over heads, and over the
    text tokens after the first visual one. From 0 to 1; 0 where there is no such token."""
    rows = text_after_image(tokens)  # (rows,)
    return float(tokens.attention(rows)[:, :, tokens.is_visual].sum(-1).mean()) if len(rows) else 0.0


@named
def random_tokens(layer: Layer, seed: Seed = 0) -> Method:
    """The paper's ablation: before a layer, as many tokens leave as there are visual ones, drawn from all but the last."""

    def method(index: int, tokens: Tokens) -> Tokens:
        if index != layer or not tokens.is_visual.any():
            return tokens
        stays = np.ones(len(tokens), bool)  # (tokens,)
        stays[np.random.default_rng(seed).permutation(len(tokens) - 1)[: tokens.is_visual.sum()]] = False
        return tokens[stays]

    return method


@named
def renumber(layer: Layer) -> Method:
    """The paper's other ablation, after `withdraw`: from a layer on, a token's position is its place among the tokens
    that the layer's cache holds, as if nothing had stood between them."""

    def method(index: int, tokens: Tokens) -> Tokens:
        if index < layer:
            return tokens
        return replace(tokens, rotary_positions=len(tokens.cache[index]) + np.arange(len(tokens)))

    return method


@named
def own_positions() -> Method:
    """The way back from `renumber`, after a method that renumbers: every token at its place in the conversation."""
    return lambda index, tokens: replace(tokens, rotary_positions=tokens.positions)


def then(*methods: Method) -> NamedMethod:
    """Methods called one after the other before every layer, each with the tokens that the one before it gave back."""
    parts = [known(one) for one in methods]

    def method(index: int, tokens: Tokens) -> Tokens:
        for one in parts:
            tokens = one(index, tokens)
        return tokens

    leaves = min((one.withdraw_layer for one in parts if one.withdraw_layer is not None), default=None)
    return NamedMethod(method, "+".join(one.spec for one in parts), sum((one.layers for one in parts), ()), leaves)
