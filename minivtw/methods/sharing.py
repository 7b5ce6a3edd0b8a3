"""Work shared among visual tokens that are alike: a layer works on a few, and what it changes in them the others take over."""

import numpy as np

from ..model.layers import rms_norm
from ..model.tokens import Tokens
from .looking import text_after_image
from .text import Layers, Method, Share, named

BLOCK = 64  # visual tokens, in the order of the prompt, among which each finds the one that it follows


@named
def share(layers: Layers, keep: Share = 0.35) -> Method:
    """In these layers `keep` of the visual tokens are worked on, and each of the others follows the one of them that is
    most like it: it takes over what the layer changed there. Keys and values are made of all, and all can be read.

    Ours; nothing is fitted. Likeness is the cosine of the states as the layer will read them, less their mean. Those
    worked on are chosen one after the other, each the one that brings all others closest to one that is chosen (greedy
    facility location, as in Nemhauser et al. 1978), in every block of up to 64 visual tokens, one at least; the others
    count as much as the text after the image looked at them in the layer before. Merging tokens and copying the result back (ToMe for Stable Diffusion, arXiv
    2303.17604) is near it, but a follower here keeps its own state. Where nobody is followed it is `freeze`.
    """

    def method(index: int, tokens: Tokens) -> Tokens:
        visual = np.flatnonzero(tokens.is_visual)  # (visual,)
        if index not in layers or not len(visual):
            return tokens
        decoder, text = tokens.previous_layer("states").decoder, text_after_image(tokens)  # (text,)
        weights = tokens.attention(text if len(text) else [-1]).mean((0, 1))[visual]  # (visual,)
        normed = rms_norm(tokens.hidden[visual], decoder.layers[index].input_norm, decoder.config.rms_norm_eps)
        centred = normed - normed.mean(0)  # (visual, width)
        unit = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-9)  # (visual, width)
        leaders = np.arange(len(tokens))  # (tokens,)
        leaders[visual] = visual[most_alike(tokens, unit, weights, keep)]
        return tokens.follow(leaders)

    return method


def most_alike(tokens: Tokens, unit: np.ndarray, weights: np.ndarray, keep: float) -> np.ndarray:
    """Whom each follows, (visual,) indices of those that lead: themselves, and others of their block.

    unit: (visual, width), vectors of length 1; weights: (visual,), how much it counts that one is close to a leader.
    """
    blocks = -(-len(unit) // BLOCK)
    size = -(-len(unit) // blocks)
    places = np.minimum(np.arange(blocks * size), len(unit) - 1).reshape(
        blocks, size
    )  # (blocks, size) the last may come twice
    count, block = max(1, round(keep * size)), np.arange(blocks)[:, None]  # (blocks, 1)
    distances = 1 - unit[places] @ unit[places].swapaxes(1, 2)  # (blocks, size, size)
    tokens.extra_flops.append(2 * distances.size * unit.shape[1])
    nearest = np.full((blocks, size), 2, np.float32)  # (blocks, size) to one that is chosen; no two are farther apart
    chosen = np.empty((blocks, count), int)  # (blocks, count)
    for turn in range(count):
        closer = np.maximum(nearest[:, None] - distances, 0)  # (blocks, size, size) if one were chosen, for each
        gains = (closer @ weights[places][:, :, None])[:, :, 0]  # (blocks, size)
        gains[block, chosen[:, :turn]] = -1
        chosen[:, turn] = gains.argmax(1)
        nearest = np.minimum(nearest, distances[block[:, 0], chosen[:, turn]])  # (blocks, size)
    to_chosen = np.take_along_axis(distances, chosen[:, None], 2)  # (blocks, size, count)
    leaders = np.arange(len(unit))  # (visual,)
    leaders[places] = places[block, np.take_along_axis(chosen, to_chosen.argmin(2), 1)]
    leads = places[block, chosen]  # (blocks, count)
    leaders[leads] = leads  # whatever is as close to another
    return leaders
