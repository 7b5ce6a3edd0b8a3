"""The information horizon: what each patch is still worth to the answer, layer by layer (arXiv 2512.07580).

One visual token is left out from a layer on, and the answer's probability falls by what had not been read of it yet.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from ..model.decoder import Decoder, forward
from ..model.tokens import EmbeddedPrompt
from .migration import answer_probability, layer_inputs


def patch_worth(
    decoder: Decoder, prompt: EmbeddedPrompt, answer: Sequence[int], layers: Iterable[int] | None = None
) -> np.ndarray:
    """By how much an answer's probability falls if one visual token is left out from a layer on; below 0 where it rises.

    layers: the layers to try, None for all. Only the tokens after the one left out can change, so only they run, through
    the layers that remain. Returns (layers, visual tokens).
    """
    said = np.concatenate([prompt.hidden, decoder.embedding[list(answer[:-1])]])  # (tokens, width)
    whole = EmbeddedPrompt(said, np.pad(prompt.is_visual, (0, len(answer) - 1)))
    entering, visual = layer_inputs(decoder, whole), np.flatnonzero(prompt.is_visual)  # (visual,)
    chosen = list(range(len(decoder.layers)) if layers is None else layers)
    without = np.empty((len(chosen), len(visual)))  # the answer's probability
    for row, layer in enumerate(chosen):
        cache = copy.deepcopy(entering[layer].cache)  # all layers' keys and values; each pass needs fewer of them
        for column in reversed(range(len(visual))):
            cache.trim(int(visual[column]))
            after = entering[layer][np.arange(visual[column] + 1, len(said))]
            passed = forward(decoder, replace(after, cache=cache), start=layer)
            without[row, column] = answer_probability(decoder, passed.hidden, answer)
    return answer_probability(decoder, entering[-1].hidden, answer) - without
