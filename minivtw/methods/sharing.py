"""Work shared among visual tokens that are alike: a layer works on a few, and what it changes in them the others take over."""

import numpy as np

from ..model.layers import rms_norm
from ..model.tokens import Tokens
from ..threads import one_blas_thread
from .looking import text_after_image
from .text import Layers, Method, Share, named

BLOCK = 64  # visual tokens, in the order of the prompt: a follower's leaders are in its own block
RIDGE = 0.03  # of the mean square of a state


@named
def share(layers: Layers, keep: Share = 0.35) -> Method:
    """In these layers `keep` of the visual tokens are worked on, and the others follow them: each takes over a mixture of
    what the layer changed in its leaders. Keys and values are made of all, and all can be read.

    Ours; nothing is fitted. What a layer changes in a visual token is nearly a linear map of its state, so a mixture
    of others is changed by nearly the same mixture of their changes. In every block of up to 64 visual tokens,
    one at least is worked on: they are chosen one after the other, each the one that is least like a mixture of those
    before it, weighted by how much the text after the image looked at it in the layer before. Merging tokens and copying
    the result back (ToMe for Stable Diffusion, arXiv 2303.17604) is near it, but a follower here keeps its own state.
    """

    def method(index: int, tokens: Tokens) -> Tokens:
        visual = np.flatnonzero(tokens.is_visual)  # (visual,)
        if index not in layers or not len(visual):
            return tokens
        decoder, text = tokens.previous_layer("states").decoder, text_after_image(tokens)  # (text,)
        weights = tokens.attention(text if len(text) else [-1]).mean((0, 1))  # (tokens,)
        normed = rms_norm(tokens.hidden, decoder.layers[index].input_norm, decoder.config.rms_norm_eps)
        blocks = np.array_split(visual, -(-len(visual) // BLOCK))
        for size in sorted({len(block) for block in blocks}):  # two at most, which differ by one
            places = np.stack([block for block in blocks if len(block) == size])  # (blocks, size)
            leads, follow, shares = mixtures(normed[places], weights[places], max(1, round(keep * size)))
            tokens.extra_flops.append(2 * normed.shape[1] * (places.size * size + shares.size))
            for block, lead, other, mixture in zip(places, leads, follow, shares):
                tokens = tokens.follow(block[other], block[lead], mixture)
        return tokens

    return method


@one_blas_thread()
def mixtures(states: np.ndarray, weights: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """In every block of tokens: who leads, (blocks, leaders), who follows, (blocks, followers), and each follower as a
    mixture of leaders, (blocks, followers, leaders).

    states: (blocks, tokens, width); weights: (blocks, tokens), how much each of them counts; count: of leaders.

    Pivoted Cholesky decomposition (Nystroem's method; Fine and Scheinberg 2001) of how alike the states are, and ridge
    regression of the followers on the leaders. A constant joins the states, so that a follower's shares add up to
    nearly one.
    """
    size, block = states.shape[1], np.arange(len(states))  # (blocks,)
    centred = states - states.mean(1, keepdims=True)  # (blocks, tokens, width)
    alike = centred @ centred.swapaxes(1, 2)  # (blocks, tokens, tokens)
    scale = np.maximum(alike.trace(axis1=1, axis2=2) / size, np.float32(1e-9))[:, None, None]  # (blocks, 1, 1)
    alike += scale
    unlike = alike.copy()  # (blocks, tokens, tokens) what no mixture of those chosen explains
    chosen = np.zeros(weights.shape, bool)  # (blocks, tokens)
    for _ in range(count):
        gains = unlike.diagonal(axis1=1, axis2=2) * weights  # (blocks, tokens)
        best = np.where(chosen, -np.inf, gains).argmax(1)  # (blocks,)
        chosen[block, best] = True
        row = unlike[block, best]  # (blocks, tokens)
        itself = row[block, best][:, None] + RIDGE * scale[:, 0]  # (blocks, 1)
        unlike -= row[:, :, None] * (row / itself)[:, None]
    leads = np.nonzero(chosen)[1].reshape(len(states), count)  # (blocks, leaders)
    follow = np.nonzero(~chosen)[1].reshape(len(states), size - count)  # (blocks, followers)
    rows = alike[block[:, None], leads]  # (blocks, leaders, tokens)
    among = np.take_along_axis(rows, leads[:, None], 2)  # (blocks, leaders, leaders)
    among += RIDGE * scale * np.eye(count, dtype=states.dtype)
    shares = np.linalg.solve(among, np.take_along_axis(rows, follow[:, None], 2))  # (blocks, leaders, followers)
    return leads, follow, shares.swapaxes(1, 2)
