"""Ways of choosing among visual tokens before layer 0 of the decoder, without the question.

What they drop no layer ever sees: the prompt is shorter, and its positions are renumbered, as in the papers. `smaller`
averages instead, and keeps the positions.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ..model.tokens import Tokens
from .looking import keep_best, known_tower, product, tower_looks
from .text import Count, Method, Share, named
from .withdrawal import renumber


def beforehand(kept: Callable[[Tokens], Tokens]) -> Method:
    """A method that keeps some of the visual tokens before layer 0, and renumbers those that stay."""
    shorter = renumber(0)

    def method(index: int, tokens: Tokens) -> Tokens:
        return shorter(index, kept(tokens) if index == 0 and tokens.is_visual.any() else tokens)

    return method


@named
def fastervlm(keep: Share = 0.5) -> Method:
    """FasterVLM (Zhang et al. 2024, arXiv 2412.01818, section 3.3): those that the vision tower's class token looked at
    most in the last layer that is used, mean over heads; round(keep N) of N stay.

    A tower without a class token, such as SigLIP, has no place in the paper: here all patches ask in its stead. Where an
    image is cut to tiles the best of all tiles stay; the published code keeps as many of each.
    """

    def most_looked_at(tokens: Tokens) -> Tokens:
        scores = np.zeros(len(tokens), np.float32)  # (tokens,)
        scores[tokens.is_visual] = tower_looks(tokens)[0]
        return keep_best(tokens, scores, round(keep * tokens.is_visual.sum()))

    return beforehand(most_looked_at)


@named
def visionzip(keep: Share = 0.5, merged: Share = 10 / 64) -> Method:
    """VisionZip (Yang et al. 2024, arXiv 2412.04467, section 3.2): of round(keep N) tokens the *dominant* are those
    that the tower looked at most, as for `fastervlm`. The others, a share `merged`, are *contextual*: evenly spaced
    among what is left, each with the mean of those added that are most like it, by the cosine of the tower's keys.

    The paper merges the tower's features, this the visual tokens made from them: the same where the connector is linear
    (Idefics3, nanoVLM), not where it is a perceptron (LLaVA). The published code adds the mean to the target, and so
    does this; it keeps the class token as well, which LLaVA's decoder never sees, and puts the contextual tokens after
    the dominant, where here all stay in the order of the image.
    """

    def dominant_and_contextual(tokens: Tokens) -> Tokens:
        visual = np.flatnonzero(tokens.is_visual)  # (visual,)
        count = round(keep * len(visual))
        contextual = round(merged * count)
        looks, keys = tower_looks(tokens)
        ranked = np.argsort(-looks, kind="stable")  # (visual,)
        rest = np.sort(ranked[count - contextual :])  # (rest,) those of the visual tokens that are not dominant
        targets = rest[:: max(1, len(rest) // max(contextual, 1))][:contextual]  # (targets,)
        others = np.setdiff1d(rest, targets)  # (others,)
        hidden = tokens.hidden.copy()  # (tokens, width)
        if len(targets):
            unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)  # (visual, channels)
            nearest = product(tokens, unit[others], unit[targets].T).argmax(1)  # (others,)
            for number in np.unique(nearest):
                hidden[visual[targets[number]]] += tokens.hidden[visual[others[nearest == number]]].mean(0)
        stays = ~tokens.is_visual  # (tokens,)
        stays[visual[np.concatenate([ranked[: count - contextual], targets])]] = True
        return replace(tokens, hidden=hidden)[stays]

    return beforehand(dominant_and_contextual)


@named
def divprune(keep: Share = 0.5) -> Method:
    """DivPrune (Alvar et al. 2025, arXiv 2503.02175, section 3.2): the most diverse, max-min of the distance
    d(i, j) = 1 - cos(v_i, v_j) between visual tokens, chosen greedily: first the one whose nearest neighbour is
    farthest, then each time the one that is farthest from all those chosen; round(keep N) of N stay.
    """

    def most_diverse(tokens: Tokens) -> Tokens:
        visual = np.flatnonzero(tokens.is_visual)  # (visual,)
        count, hidden = round(keep * len(visual)), tokens.hidden[visual]  # (visual, width)
        unit = hidden / np.linalg.norm(hidden, axis=1, keepdims=True)  # (visual, width)
        distances = 1 - product(tokens, unit, unit.T)  # (visual, visual)
        nearest = np.sort(distances, axis=0)[min(1, len(visual) - 1)]  # (visual,) of each, but for itself
        scores = np.zeros(len(tokens))  # (tokens,)
        for rank in range(count):
            best = nearest.argmax()
            scores[visual[best]] = count - rank
            nearest = np.minimum(nearest, distances[best]) if rank else distances[best].copy()
            nearest[scores[visual] > 0] = -np.inf
        return keep_best(tokens, scores, count)

    return beforehand(most_diverse)


@named
def smaller(side: Count = 4) -> Method:
    """A smaller image: side x side visual tokens per tile, each the mean of those in the area that it covers.

    It stands at the position of the token in the middle of that area. VTC-Bench (arXiv 2510.07143) makes the image itself
    smaller; the towers here take one size only, so what the connector makes of it is averaged, and the tower saves nothing.
    """

    def method(index: int, tokens: Tokens) -> Tokens:
        visual = np.flatnonzero(tokens.is_visual)  # (visual,)
        if index or not len(visual):
            return tokens
        tiles = len(known_tower(tokens).entering)
        across = math.isqrt(len(visual) // tiles)  # tokens along a side of a tile
        if side >= across:
            return tokens
        new = np.arange(side)[:, None]  # (side, 1)
        old = np.arange(across)  # (across,)
        starts = np.maximum(new * across, old * side)  # (side, across) of the overlap, in parts of a tile's side
        ends = np.minimum((new + 1) * across, (old + 1) * side)  # (side, across)
        share = ((ends - starts).clip(0) / across).astype(np.float32)  # (side, across) of each old one in the mean
        areas = np.kron(share, share)  # (side^2, across^2)
        grids = tokens.hidden[visual].reshape(tiles, across**2, -1)  # (tiles, across^2, width)
        middle = (2 * new + 1) * across // (2 * side)  # (side, 1)
        places = visual.reshape(tiles, across, across)[:, middle, middle.T].ravel()  # (tiles side^2,)
        hidden = tokens.hidden.copy()  # (tokens, width)
        hidden[places] = np.concatenate([product(tokens, areas, grid) for grid in grids])  # (tiles side^2, width)
        return replace(tokens, hidden=hidden)[np.union1d(np.flatnonzero(~tokens.is_visual), places)]

    return method
