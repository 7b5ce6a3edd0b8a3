"""Where the image is read: a swap lets the text read another image in some layers (Lin et al. 2024, section 3.1, asks).

If the answer becomes that image's, the answer is read there. A prompt comes as `entering`, its tokens as they enter each
layer with nothing changed (`search.layer_by_layer`): one list serves every swap.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from ..errors import InputError
from ..methods.text import NamedMethod, written
from ..model.cache import KVCache
from ..model.decoder import Decoder, logits
from ..model.tokens import EmbeddedPrompt, Tokens, arriving
from ..search.layer import layer_by_layer, log_softmax


def layer_inputs(decoder: Decoder, prompt: EmbeddedPrompt) -> list[Tokens]:
    """A prompt as it enters each layer and, last, after all of them, with nothing changed: `entering`."""
    return layer_by_layer(decoder, arriving(prompt, KVCache(decoder.config)))


def answer_probability(decoder: Decoder, hidden: np.ndarray, answer: Sequence[int]) -> float:
    """The probability of a whole answer, token after token, from the hidden states after the last layer."""
    said = log_softmax(logits(decoder, hidden[-len(answer) :]))  # (answer tokens, vocabulary)
    return float(np.exp(said[np.arange(len(answer)), answer].sum()))


def swapped(own: Sequence[Tokens], other: Sequence[Tokens], layers: Collection[int]) -> NamedMethod:
    """Visual token swapping (arXiv 2509.24791): in `layers` the text reads the other image's visual tokens.

    own, other: `entering` of two prompts whose visual tokens stand in the same places, as with the same question about
    two images of one size. The method is for `own`'s prompt. Visual tokens come before the question and never see it,
    so those of both images take their own way through the stack whatever the text does: only where the layers of the
    swap begin and end are their hidden states exchanged. Raises InputError.
    """
    if not np.array_equal(np.flatnonzero(own[0].is_visual), np.flatnonzero(other[0].is_visual)):
        raise InputError("the visual tokens of two images can be swapped only if they stand in the same places")

    def method(index: int, tokens: Tokens) -> Tokens:
        if (index in layers) == (index - 1 in layers) or not tokens.is_visual.any():
            return tokens
        read, hidden = (other if index in layers else own)[index], tokens.hidden.copy()  # (tokens, width)
        hidden[tokens.is_visual] = read.hidden[tokens.positions[tokens.is_visual]]
        return replace(tokens, hidden=hidden)

    return NamedMethod(method, f"swapped:layers={written(layers)}", tuple(sorted(layers)))
