"""The shelf: published ways of keeping some of the visual tokens, and every method by its name.

Each drops visual tokens before a layer and keeps a share of them, the rows of the highest score; positions are kept.
"""

import numpy as np

from .methods import adaptive, freeze, random_tokens, renumber, then, withdraw
from .model.tokens import Tokens
from .specs import Layer, Method, named, parse


def keep_best(tokens: Tokens, scores: np.ndarray, keep: float) -> Tokens:
    """Of the visual tokens, the share `keep` with the highest scores, in their order; all other tokens stay.

    scores: (tokens,), those of text do not matter. At a tie the earlier token stays.
    """
    visual = np.flatnonzero(tokens.is_visual)
    ranked = visual[np.argsort(-scores[visual], kind="stable")]
    stays = np.ones(len(tokens), bool)
    stays[ranked[round(keep * len(visual)) :]] = False
    return tokens[stays]


@named
def fastv(layer: Layer, keep: float = 0.5) -> Method:
    """FastV (Chen et al. 2024, arXiv 2403.06764, section 4.1): those that the prompt's last token looked at most in the
    layer before, mean over heads."""

    def method(index: int, tokens: Tokens) -> Tokens:
        if index != layer or not tokens.is_visual.any():
            return tokens
        return keep_best(tokens, tokens.attention([-1]).mean((0, 1)), keep)

    return method


@named
def looked_at(layer: Layer, keep: float = 0.5) -> Method:
    """As FastV, but those that all of the text after the image looked at most; ours, after SparseVLM's raters."""

    def method(index: int, tokens: Tokens) -> Tokens:
        if index != layer or not tokens.is_visual.any():
            return tokens
        rows = np.flatnonzero(~tokens.is_visual & (np.cumsum(tokens.is_visual) > 0))
        return keep_best(tokens, tokens.attention(rows).mean((0, 1)), keep)

    return method


@named
def random(layer: Layer, keep: float = 0.5, seed: int = 0) -> Method:
    """Any: the baseline that every score has to beat."""

    def method(index: int, tokens: Tokens) -> Tokens:
        if index != layer or not tokens.is_visual.any():
            return tokens
        return keep_best(tokens, np.random.default_rng(seed).random(len(tokens)), keep)

    return method


@named
def uniform(layer: Layer, keep: float = 0.5) -> Method:
    """Evenly spaced: the other baseline. With a half, every second visual token in the order of the prompt."""

    def method(index: int, tokens: Tokens) -> Tokens:
        if index != layer or not tokens.is_visual.any():
            return tokens
        order = np.cumsum(tokens.is_visual) - 1  # which visual token each is
        crosses = np.floor((order + 1) * keep) > np.floor(order * keep)  # where the running share passes a whole number
        return tokens[~tokens.is_visual | crosses]

    return method


METHODS = {
    make.__name__: make
    for make in (withdraw, freeze, adaptive, fastv, looked_at, random, uniform, random_tokens, renumber)
}


def method_of(text: str) -> Method:
    """A method from its text, such as `freeze:layers=18-23+withdraw:layer=24`. Raises InputError."""
    methods = parse(text, METHODS)
    return methods[0] if len(methods) == 1 else then(*methods)
