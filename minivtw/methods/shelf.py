"""The shelf: published ways of keeping some of the visual tokens inside the decoder, and every method by its name.

Each drops visual tokens before one or more layers, those of the lowest score; all text stays. Positions are kept unless
a method says otherwise: `+renumber:layer=K` renumbers any of them, `+own_positions` undoes that. Where a method's
published code departs from its paper, the docstring says so. Those that choose before the decoder stand in `before.py`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import InputError
from ..model.layers import softmax
from ..model.tokens import Tokens
from .before import divprune, fastervlm, smaller, visionzip
from .looking import coming_attention, keep_best, normed, product, text_after_image
from .sharing import share
from .text import Count, Layer, Layers, Method, Seed, Share, Until, named, parse
from .withdrawal import adaptive, freeze, own_positions, random_tokens, renumber, then, withdraw


def best_before(layer: int, keep: float, scores: Callable[[Tokens], np.ndarray]) -> Method:
    """Before one layer, round(keep N) of N visual tokens stay: those of the highest scores, (tokens,)."""

    def method(index: int, tokens: Tokens) -> Tokens:
        if index != layer or not tokens.is_visual.any():
            return tokens
        return keep_best(tokens, scores(tokens), round(keep * tokens.is_visual.sum()))

    return method


@named
def fastv(layer: Layer, keep: Share = 0.5) -> Method:
    """FastV (Chen et al. 2024, arXiv 2403.06764, section 4.1): those that the prompt's last token looked at most in the
    layer before; score_j = mean over heads of A[last, j] in layer K - 1, and n = round(N (1 - R)) stay, 1 - R = `keep`.

    The paper speaks of the attention from all other tokens; the published code takes the last token's, and so does
    this.
    """
    return best_before(layer, keep, lambda tokens: tokens.attention([-1]).mean((0, 1)))


@named
def looked_at(layer: Layer, keep: Share = 0.5) -> Method:
    """As FastV, but those that all of the text after the image looked at most; ours, after SparseVLM's raters."""
    return best_before(layer, keep, lambda tokens: tokens.attention(text_after_image(tokens)).mean((0, 1)))


@named
def pyramiddrop(layers: Layers, keep: Share = 0.5) -> Method:
    """PyramidDrop (Xing et al. 2024, arXiv 2410.17247, section 3.2): before each of a few layers (8, 16 and 24 of 32)
    the tokens leave that the last token would attend to least there; after stage s, floor(N keep^s) of N are left.

    score_j = mean over heads of softmax(q_last k_j / sqrt(d)), q and k those of the layer to come. From the first stage
    on positions are those of the shorter sequence; the paper does not mention it, the published code does it.
    """
    stages = sorted(layers)

    def method(index: int, tokens: Tokens) -> Tokens:
        if index in stages and tokens.is_visual.any():
            visual = tokens.notes.setdefault(method, int(tokens.is_visual.sum()))
            scores = coming_attention(tokens, [-1]).mean((0, 1))  # (tokens,)
            tokens = keep_best(tokens, scores, int(visual * keep ** (stages.index(index) + 1)))
        return shorter(index, tokens)

    shorter = renumber(stages[0]) if stages else renumber(0)
    return method


@named
def sparsevlm(layers: Layers, keep: Share = 0.5, raters: Layer = 0) -> Method:
    """SparseVLM (Zhang et al. 2024, arXiv 2410.04417, sections 3.2 and 3.3), its pruning: before each of a few layers
    the tokens leave that the raters attended to least in the layer before, mean over heads and raters; after stage s,
    round(N keep^s) of N are left.

    Raters are the text tokens after the image whose mean over visual rows of softmax(H_v H_t^T) exceeds the mean over
    text, H being what enters layer 0. The paper sets how many stay by the rank of the attention, the published code by
    fixed numbers (300, 200 and 110 of 576, in its second version 118; `keep=0.575` comes near), after layers 2, 6 and
    15: `layers=3/7/16` here. In its first version the code merges some of those dropped and renumbers; this keeps
    positions and merges nothing, like its second, which also weighs scores by the rotary angle and takes 14 of the
    heads: that is not done here.
    """
    stages = sorted(layers)
    if raters > min(stages, default=raters):
        raise InputError(f"raters must be chosen before the first of the layers, not before layer {raters}")

    def method(index: int, tokens: Tokens) -> Tokens:
        if index >= raters and method not in tokens.notes and tokens.is_visual.any():
            text = text_after_image(tokens)  # (text,)
            visual_text = product(tokens, tokens.hidden[tokens.is_visual], tokens.hidden[text].T)  # (visual, text)
            affinity = softmax(visual_text).mean(0)  # (text,)
            chosen = (affinity > affinity.mean()) | (affinity == np.max(affinity))  # (text,)
            tokens.notes[method] = int(tokens.is_visual.sum()), tokens.positions[text[chosen]]
        if index in stages and tokens.is_visual.any():
            visual, who = tokens.notes[method]  # (raters,)
            rows = np.flatnonzero(np.isin(tokens.positions, who))  # (rows,) another method may have let some go
            looks = tokens.attention(rows if len(rows) else [-1]).mean((0, 1))  # (tokens,)
            tokens = keep_best(tokens, looks, round(visual * keep ** (stages.index(index) + 1)))
        return tokens

    return method


@named
def dart(layer: Layer, keep: Share = 0.5, pivots: Count = 4) -> Method:
    """DART (Wen et al. 2025, arXiv 2502.11494, section 3): no scores, but duplicates leave. Pivots are the visual and
    the text tokens with the largest L1 norm of their keys in the layer before, `pivots` of each; the visual ones stay,
    and each pivot in turn adds those of the others that are least like it, by the cosine of their states.

    The states are taken after the decoder's last norm, as in the published code. That visits the pivots in the order
    of a Python set and lets each add as many, which keeps a few more or fewer than n. Here visual pivots come first,
    the largest norm first, and the first pivots add one more where n is not a multiple.
    """

    def is_chosen(tokens: Tokens) -> np.ndarray:
        visual = np.flatnonzero(tokens.is_visual)  # (visual,)
        text, count = text_after_image(tokens), round(keep * len(visual))  # (text,)
        norms = np.abs(tokens.keys).sum((0, 2))  # (tokens,)
        unit = normed(tokens)  # (tokens, width)
        unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)  # (tokens, width)
        chosen = visual[np.argsort(-norms[visual], kind="stable")][: min(pivots, count)]  # (visual pivots,)
        said = text[np.argsort(-norms[text], kind="stable")][:pivots]  # (text pivots,)
        likeness = product(tokens, unit[np.concatenate([chosen, said])], unit[visual].T)  # (pivots, visual)
        stays = np.isin(visual, chosen)  # (visual,)
        for row, part in zip(likeness, np.array_split(np.arange(count - len(chosen)), len(likeness))):
            stays[np.argsort(np.where(stays, np.inf, row), kind="stable")[: len(part)]] = True
        return np.isin(np.arange(len(tokens)), visual[stays]).astype(int)

    return best_before(layer, keep, is_chosen)


@named
def random(layer: Layer, keep: Share = 0.5, seed: Seed = 0) -> Method:
    """Any: the baseline that every score has to beat."""
    return best_before(layer, keep, lambda tokens: np.random.default_rng(seed).random(len(tokens)))


@named
def uniform(layer: Layer, keep: Share = 0.5) -> Method:
    """Evenly spaced: the other baseline. With a half, every second visual token in the order of the prompt."""

    def method(index: int, tokens: Tokens) -> Tokens:
        if index != layer or not tokens.is_visual.any():
            return tokens
        order = np.cumsum(tokens.is_visual) - 1  # (tokens,) which visual token each is
        crosses = np.floor((order + 1) * keep) > np.floor(order * keep)  # (tokens,) the running share passes an integer
        return tokens[~tokens.is_visual | crosses]

    return method


@named
def late(layer: Until) -> Method:
    """The image enters late: the layers before `layer` run on text alone, then the visual tokens come as they were embedded.

    HiDrop (arXiv 2602.23699) calls this late injection, and trains its models for it. Before `layer` no other method can
    look at attention or keys, since the image has none in the layer just passed.
    """

    def method(index: int, tokens: Tokens) -> Tokens:
        if index == 0 < layer and tokens.is_visual.any():
            image = tokens[tokens.is_visual]
            tokens.notes[method] = replace(image, works=np.ones(len(image), bool))
            return tokens[~tokens.is_visual]
        if index == layer and method in tokens.notes:
            return together(tokens, tokens.notes.pop(method))
        return tokens

    return method


def together(tokens: Tokens, entering: Tokens) -> Tokens:
    """Tokens and those that enter among them, in the order of their positions."""
    order = np.argsort(np.concatenate([tokens.positions, entering.positions]))  # (tokens,)
    arrays: dict[str, Any] = {
        name: np.concatenate([getattr(tokens, name), getattr(entering, name)])[order]
        for name in ("hidden", "positions", "is_visual", "rotary_positions", "works")
        if getattr(tokens, name) is not None
    }
    return replace(tokens, **arrays, previous=None)


IN_THE_DECODER = (withdraw, freeze, share, fastv, looked_at, pyramiddrop, sparsevlm, dart, adaptive)
BEFORE_THE_DECODER = (visionzip, fastervlm, divprune)
BASELINES = (random, uniform, smaller, late)
ABLATIONS = (random_tokens, renumber, own_positions)
METHODS = {make.__name__: make for make in (*IN_THE_DECODER, *BEFORE_THE_DECODER, *BASELINES, *ABLATIONS)}


def method_of(text: str, files: bool = True) -> Method:
    """A method from its text, such as `freeze:layers=18-23+withdraw:layer=24`; files: as for `parse`. Raises InputError."""
    methods = parse(text, METHODS, files)
    return methods[0] if len(methods) == 1 else then(*methods)
