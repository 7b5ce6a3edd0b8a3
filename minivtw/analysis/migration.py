"""Information migration: in which layers the text takes over what the image says (Lin et al. 2024, section 3.1).

Two instruments. A knock-out cuts the text off from the visual tokens in some layers and leaves it free in the others:
if the answer's probability falls, something crossed there that did not cross elsewhere. The lens (nostalgebraist 2020)
reads the hidden state of the last prompt token after each layer, as if it were the last: when does the answer appear?
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..model.cache import KVCache
from ..model.decoder import Decoder, forward, logits
from ..model.tokens import EmbeddedPrompt, arriving
from ..search import log_softmax
from ..specs import Method


def knocked_out(decoder: Decoder, prompt: EmbeddedPrompt, first: int, stop: int) -> np.ndarray:
    """A prefill in which no text token attends to a visual one in layers first … stop - 1.

    It needs no mask. In those layers the text goes through the layer on its own, which is what it would compute if it
    saw no image; the visual tokens take their step in the whole sequence, as ever. From `stop` on the text sees them
    again. Returns the hidden states after the last layer, (tokens, width).
    """
    is_text, tokens = ~prompt.is_visual, arriving(*prompt, KVCache(decoder.config))
    for index in range(len(decoder.layers)):
        after = forward(decoder, tokens, start=index, stop=index + 1)
        if first <= index < stop:
            alone = replace(tokens[is_text], cache=KVCache(decoder.config))
            after.hidden[is_text] = forward(decoder, alone, start=index, stop=index + 1).hidden
        tokens = after
    return tokens.hidden


def with_answer(decoder: Decoder, prompt: EmbeddedPrompt, answer: Sequence[int]) -> EmbeddedPrompt:
    """The prompt with all but the last of the answer's token ids after it: the last positions predict the answer."""
    hidden = np.concatenate([prompt.hidden, decoder.embedding[answer[:-1]]])  # (tokens, width)
    return EmbeddedPrompt(hidden, np.concatenate([prompt.is_visual, np.zeros(len(answer) - 1, bool)]))


def answer_probability(decoder: Decoder, hidden: np.ndarray, answer: Sequence[int]) -> float:
    """The probability of a whole answer, token after token, from the hidden states after the last layer."""
    said = log_softmax(logits(decoder, hidden[-len(answer) :]))  # (answer tokens, vocabulary)
    return float(np.exp(said[np.arange(len(answer)), answer].sum()))


def knock_outs(
    decoder: Decoder, prompt: EmbeddedPrompt, answer: Sequence[int], ranges: Sequence[tuple[int, int]]
) -> tuple[float, np.ndarray]:
    """The answer's probability with nothing cut, and for each (first, stop) of `ranges` with those layers cut."""
    forced = with_answer(decoder, prompt, answer)
    probability = lambda cut: answer_probability(decoder, knocked_out(decoder, forced, *cut), answer)
    return probability((0, 0)), np.array([probability(cut) for cut in ranges])


def last_states(
    decoder: Decoder, prompt: EmbeddedPrompt, method: Method | None = None, predictions: int = 1
) -> np.ndarray:
    """The last `predictions` tokens on their way under a method: embedded, then after each layer.

    Returns (predictions, layers + 1, width).
    """
    states = [prompt.hidden[-predictions:]]

    def observe(name, array):
        if name.endswith("hidden"):
            states.append(array[-predictions:])

    forward(decoder, arriving(*prompt, KVCache(decoder.config)), method, observe=observe)
    return np.stack(states, axis=1)


def lens(decoder: Decoder, prompt: EmbeddedPrompt, method: Method | None = None) -> np.ndarray:
    """What the last prompt token would say after each layer: probabilities (layers + 1, vocabulary).

    The final norm and head, applied to its embedding (first) and to its hidden state after each layer.
    """
    return np.exp(log_softmax(logits(decoder, last_states(decoder, prompt, method)[0])))
