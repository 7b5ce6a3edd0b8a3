"""Information migration: in which layers the text takes over what the image says (Lin et al. 2024, section 3.1).

Two instruments. A knock-out cuts the text off from the visual tokens in some layers and leaves it free in the others:
if the answer's probability falls, something crossed there that did not cross elsewhere. The lens (nostalgebraist 2020)
reads the hidden state of the last prompt token after each layer, as if it were the last: when does the answer appear?
"""

import numpy as np

from ..model.cache import KVCache
from ..model.decoder import forward, logits
from ..search import Asked, log_softmax


def knocked_out(decoder, asked, first, stop):
    """A prefill in which no text token attends to a visual one in layers first … stop - 1.

    It needs no mask. In those layers the text goes through the layer on its own, which is what it would compute if it
    saw no image; the visual tokens take their step in the whole sequence, as ever. From `stop` on the text sees them
    again. Returns the hidden states behind the last layer, (tokens, width).
    """
    is_text, layers = ~asked.is_visual, len(decoder.layers)
    hidden, positions = asked.hidden, np.arange(len(asked.hidden))
    for index in range(layers):
        after = forward(decoder, hidden, positions, KVCache(layers), start=index, stop=index + 1)  # (tokens, width)
        if first <= index < stop:
            alone = hidden[is_text], positions[is_text]
            after[is_text] = forward(decoder, *alone, KVCache(layers), start=index, stop=index + 1)
        hidden = after
    return hidden


def with_answer(decoder, asked, answer):
    """The prompt with all but the last of the answer's token ids behind it: the last positions predict the answer."""
    hidden = np.concatenate([asked.hidden, decoder.embedding[answer[:-1]]])  # (tokens, width)
    return Asked(hidden, np.concatenate([asked.is_visual, np.zeros(len(answer) - 1, bool)]))


def answer_probability(decoder, hidden, answer):
    """The probability of a whole answer, token after token, from the hidden states behind the last layer."""
    said = log_softmax(logits(decoder, hidden[-len(answer) :]))  # (answer tokens, vocabulary)
    return float(np.exp(said[np.arange(len(answer)), answer].sum()))


def knock_outs(decoder, asked, answer, ranges):
    """The answer's probability with nothing cut, and for each (first, stop) of `ranges` with those layers cut."""
    forced = with_answer(decoder, asked, answer)
    probability = lambda cut: answer_probability(decoder, knocked_out(decoder, forced, *cut), answer)
    return probability((0, 0)), np.array([probability(cut) for cut in ranges])


def last_states(decoder, asked, layer=None, predictions=1):
    """The last `predictions` tokens on their way: embedded, then behind each layer. (predictions, layers + 1, width)

    The visual tokens leave before `layer`.
    """
    states = [asked.hidden[-predictions:]]

    def observe(name, array):
        if name.endswith("hidden"):
            states.append(array[-predictions:])

    cache = KVCache(len(decoder.layers))
    positions = cache.claim(len(asked.hidden))
    forward(decoder, asked.hidden, positions, cache, layer, ~asked.is_visual, observe=observe)
    return np.stack(states, axis=1)


def lens(decoder, asked, layer=None):
    """What the last prompt token would say after each layer: probabilities (layers + 1, vocabulary).

    The final norm and head, applied to its embedding (first) and to its hidden state behind each layer.
    """
    return np.exp(log_softmax(logits(decoder, last_states(decoder, asked, layer)[0])))
