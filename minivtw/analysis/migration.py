"""Where the image goes: what crosses from the visual tokens to the text, in which layers, and over which words.

Three instruments (Lin et al. 2024, section 3.1, asks the question). A *knock-out* forbids some tokens to look at some
others in some layers: if the answer's probability falls, something crossed there that did not cross elsewhere. A *swap*
lets the text read another picture in some layers: if the answer becomes that picture's, the answer is read there. The
*lens* reads a hidden state behind each layer as if it were the last: which word is there, and since when?

A prompt comes as `entering`, its tokens on their way through all layers with nothing changed (`search.layer_by_layer`):
one list serves every knock-out and every swap.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ..errors import InputError
from ..methods.text import Method, written
from ..model.cache import KVCache
from ..model.decoder import Decoder, forward, logits
from ..model.tokens import EmbeddedPrompt, Tokens, arriving
from ..search.layer import layer_by_layer, log_softmax


class Roles(NamedTuple):
    """Who is who in a prompt with an answer behind it; each: (tokens,) booleans."""

    image: np.ndarray  # the visual tokens
    question: np.ndarray  # the text behind the first of them, up to the last token of the prompt
    last: np.ndarray  # that last token, and the answer: those whose states become the answer's words


def roles(is_visual: np.ndarray, predictions: int = 1) -> Roles:
    """The roles in a prompt whose last `predictions` tokens predict the answer; is_visual: (tokens,) booleans."""
    last = np.arange(len(is_visual)) >= len(is_visual) - predictions
    return Roles(is_visual, ~is_visual & ~last & (np.cumsum(is_visual) > 0), last)


# --- knock-outs


def knocked_out(
    decoder: Decoder, entering: Sequence[Tokens], queries: np.ndarray, keys: np.ndarray, layers: Collection[int]
) -> np.ndarray:
    """The prompt with the tokens `queries` forbidden to look at the tokens `keys` in `layers`; all else as ever.

    queries, keys: (tokens,) booleans. It needs no mask: in those layers the forbidden ones go through without the keys,
    which is what they would compute if these were not there. Returns the hidden states after the last layer, (tokens,
    width). Raises InputError where a token is in both: each sees itself.
    """
    if (queries & keys).any():
        raise InputError("a token always sees itself: no token can be among the queries and the keys of a knock-out")
    if not queries.any() or not len(layers):
        return entering[-1].hidden
    untouched = np.cumsum(queries) == 0  # the tokens before the first query cannot notice
    tokens = entering[min(layers)]
    for index in range(min(layers), len(decoder.layers)):
        cut = queries if index in layers else np.zeros_like(queries)
        known = np.where(untouched[:, None], entering[index].hidden, tokens.hidden)  # (tokens, width)
        tokens = replace(tokens, hidden=known)
        after = one_layer(decoder, tokens.freeze(untouched | cut), index)
        if cut.any():
            after.hidden[cut] = one_layer(decoder, tokens[~keys].freeze(~cut[~keys]), index).hidden[cut[~keys]]
        tokens = after
    return np.where(untouched[:, None], entering[-1].hidden, tokens.hidden)


def one_layer(decoder: Decoder, tokens: Tokens, index: int) -> Tokens:
    """A whole prompt through one layer, with nothing before it in the cache."""
    return forward(decoder, replace(tokens, cache=KVCache(decoder.config)), start=index, stop=index + 1)


def with_answer(decoder: Decoder, prompt: EmbeddedPrompt, answer: Sequence[int]) -> EmbeddedPrompt:
    """The prompt with all but the last of the answer's token ids behind it: the last positions predict the answer."""
    hidden = np.concatenate([prompt.hidden, decoder.embedding[answer[:-1]]])  # (tokens, width)
    return EmbeddedPrompt(hidden, np.concatenate([prompt.is_visual, np.zeros(len(answer) - 1, bool)]))


def walk_through(decoder: Decoder, prompt: EmbeddedPrompt) -> list[Tokens]:
    """A prompt as it enters each layer and, last, after all of them, with nothing changed: `entering`."""
    return layer_by_layer(decoder, arriving(prompt, KVCache(decoder.config)))


def answer_probability(decoder: Decoder, hidden: np.ndarray, answer: Sequence[int]) -> float:
    """The probability of a whole answer, token after token, from the hidden states after the last layer."""
    said = log_softmax(logits(decoder, hidden[-len(answer) :]))  # (answer tokens, vocabulary)
    return float(np.exp(said[np.arange(len(answer)), answer].sum()))


class Cut(NamedTuple):
    """Who may not look at whom, in which layers."""

    queries: np.ndarray  # (tokens,) booleans
    keys: np.ndarray  # (tokens,) booleans
    layers: Collection[int]


def knock_outs(
    decoder: Decoder, prompt: EmbeddedPrompt, answer: Sequence[int], cuts: Sequence[Cut]
) -> tuple[float, np.ndarray]:
    """The answer's probability with nothing cut, and under each cut; their tokens are those of `with_answer`."""
    entering = walk_through(decoder, with_answer(decoder, prompt, answer))
    left = [answer_probability(decoder, knocked_out(decoder, entering, *cut), answer) for cut in cuts]
    return answer_probability(decoder, entering[-1].hidden, answer), np.array(left)


def only_one_looks(
    decoder: Decoder, prompt: EmbeddedPrompt, answer: Sequence[int], layers: Collection[int]
) -> tuple[float, np.ndarray]:
    """The answer's probability, and what is left if in `layers` one token alone may look at the image.

    Returns it for each of the prompt's text tokens behind the first visual one, in their order; the answer's tokens
    count as the last of them.
    """
    image, question, last = roles(with_answer(decoder, prompt, answer).is_visual, len(answer))
    looking = [np.arange(len(image)) == word for word in np.flatnonzero(question)] + [last]
    return knock_outs(decoder, prompt, answer, [Cut((question | last) & ~word, image, layers) for word in looking])


# --- the swap


def swapped(own: Sequence[Tokens], other: Sequence[Tokens], layers: Collection[int]) -> Method:
    """Visual token swapping (arXiv 2509.24791): in `layers` the text reads the other picture's keys and values.

    own, other: `entering` of two prompts whose visual tokens stand in the same places, as with the same question about
    two pictures of one size. In every layer visual tokens are as they were when nothing was swapped, those of the other
    picture in `layers`, and are only read. The method is for `own`'s prompt. Raises InputError.
    """
    if not np.array_equal(np.flatnonzero(own[0].is_visual), np.flatnonzero(other[0].is_visual)):
        raise InputError("the visual tokens of two pictures can be swapped only if they stand in the same places")

    def method(index: int, tokens: Tokens) -> Tokens:
        if not tokens.is_visual.any():
            return tokens
        read, hidden = (other if index in layers else own)[index], tokens.hidden.copy()  # (tokens, width)
        hidden[tokens.is_visual] = read.hidden[read.is_visual]
        return replace(tokens, hidden=hidden).freeze(tokens.is_visual)

    method.spec = f"swapped:layers={written(layers)}"  # type: ignore[attr-defined]
    method.layers = tuple(sorted(layers))  # type: ignore[attr-defined]
    return method


def followed_by(decoder: Decoder, entering: Sequence[Tokens], answer: Sequence[int]) -> list[Tokens]:
    """`entering` of the same prompt `with_answer`. The visual tokens come before it and are not computed again."""
    prompt = EmbeddedPrompt(entering[0].hidden, entering[0].is_visual)
    tokens, longer = arriving(with_answer(decoder, prompt, answer), KVCache(decoder.config)), []
    as_they_were = swapped(entering, entering, ())
    for index in range(len(decoder.layers)):
        tokens = as_they_were(index, tokens)
        longer.append(replace(tokens, works=None))
        tokens = one_layer(decoder, tokens, index)
    return [*longer, replace(as_they_were(len(longer), tokens), works=None)]


def says_after_swap(
    decoder: Decoder, own: Sequence[Tokens], other: Sequence[Tokens], answer: Sequence[int], layers: Collection[int]
) -> bool:
    """Whether, with the visual tokens swapped in `layers`, the greedy answer is `answer`.

    own: `followed_by` that answer; other: `entering` of the other prompt. Greedy decoding says an answer if and only if
    along it the likeliest token is the next one everywhere.
    """
    first = min(layers, default=len(decoder.layers))
    tokens = replace(own[first], cache=KVCache(decoder.config))
    hidden = forward(decoder, tokens, swapped(own, other, layers), start=first).hidden[-len(answer) :]
    return logits(decoder, hidden).argmax(-1).tolist() == list(answer)


# --- the lens


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

    forward(decoder, arriving(prompt, KVCache(decoder.config)), method, observe=observe)
    return np.stack(states, axis=1)


def lens(decoder: Decoder, prompt: EmbeddedPrompt, method: Method | None = None) -> np.ndarray:
    """What the last prompt token would say after each layer: probabilities (layers + 1, vocabulary).

    The final norm and head, applied to its embedding (first) and to its hidden state after each layer (nostalgebraist
    2020, "interpreting GPT: the logit lens").
    """
    return np.exp(log_softmax(logits(decoder, last_states(decoder, prompt, method)[0])))


class Words(NamedTuple):
    """The word that the lens reads from each visual token."""

    token_ids: np.ndarray  # (layers + 1, visual tokens) the likeliest
    probabilities: np.ndarray  # (layers + 1, visual tokens)


def visual_lens(decoder: Decoder, entering: Sequence[Tokens]) -> Words:
    """The lens on every visual token (arXiv 2410.07149): as it enters each layer and, last, after all of them."""
    read = [log_softmax(logits(decoder, tokens.hidden[tokens.is_visual])) for tokens in entering]
    return Words(np.array([row.argmax(-1) for row in read]), np.exp([row.max(-1) for row in read]))
