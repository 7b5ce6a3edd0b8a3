"""Where the image goes: what crosses from the visual tokens to the text, and in which layers.

A *knock-out* keeps some tokens from attending to some others in some layers (Lin et al. 2024, section 3.1, asks the
question): if the answer's probability falls, something crossed there that did not cross elsewhere.

A prompt comes as `entering`, its tokens as they enter each layer with nothing changed (`migration.layer_inputs`): one
list serves every knock-out.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from minivtw import InputError
from minivtw.analysis.migration import answer_probability, layer_inputs
from minivtw.model.cache import KVCache
from minivtw.model.decoder import Decoder, forward
from minivtw.model.tokens import EmbeddedPrompt, Tokens


class Roles(NamedTuple):
    """Who is who in a prompt with an answer after it; each: (tokens,) booleans."""

    image: np.ndarray  # the visual tokens
    question: np.ndarray  # the text after the first of them, up to the last token of the prompt
    last: np.ndarray  # that last token, and the answer: those whose states become the answer's words


def roles(is_visual: np.ndarray, predictions: int = 1) -> Roles:
    """The roles in a prompt whose last `predictions` tokens predict the answer; is_visual: (tokens,) booleans."""
    last = np.arange(len(is_visual)) >= len(is_visual) - predictions
    return Roles(is_visual, ~is_visual & ~last & (np.cumsum(is_visual) > 0), last)


def knocked_out(
    decoder: Decoder, entering: Sequence[Tokens], queries: np.ndarray, keys: np.ndarray, layers: Collection[int]
) -> np.ndarray:
    """The prompt with the tokens `queries` kept from attending to the tokens `keys` in `layers`; all else as ever.

    queries, keys: (tokens,) booleans. It needs no mask: in those layers the queries go through without the keys, which
    is what they would compute if these were not there. Returns the hidden states after the last layer, (tokens,
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
    """The prompt followed by all but the last of the answer's token ids: the last positions predict the answer."""
    hidden = np.concatenate([prompt.hidden, decoder.embedding[answer[:-1]]])  # (tokens, width)
    return EmbeddedPrompt(hidden, np.concatenate([prompt.is_visual, np.zeros(len(answer) - 1, bool)]))


class Cut(NamedTuple):
    """Which tokens may not attend to which, and in which layers."""

    queries: np.ndarray  # (tokens,) booleans
    keys: np.ndarray  # (tokens,) booleans
    layers: Collection[int]


def knock_outs(
    decoder: Decoder, prompt: EmbeddedPrompt, answer: Sequence[int], cuts: Sequence[Cut]
) -> tuple[float, np.ndarray]:
    """The answer's probability with nothing cut, and under each cut; their tokens are those of `with_answer`."""
    entering = layer_inputs(decoder, with_answer(decoder, prompt, answer))
    left = [answer_probability(decoder, knocked_out(decoder, entering, *cut), answer) for cut in cuts]
    return answer_probability(decoder, entering[-1].hidden, answer), np.array(left)
