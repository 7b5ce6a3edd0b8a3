"""Tokens followed through the layers under a method: what they attend to, what attends to them, their hidden states."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..methods.text import Method
from ..model.cache import KVCache
from ..model.decoder import Decoder, forward
from ..model.tokens import EmbeddedPrompt, Tokens, arriving, embedded_text


class Traces(NamedTuple):
    """Some tokens of prompt and answer, followed through the layers; zero in a layer that a token does not reach."""

    attention: np.ndarray  # (chosen, layers, heads, tokens) of each
    received: np.ndarray  # (chosen, layers, tokens) how much each other token attends to it; mean over heads
    states: np.ndarray  # (chosen, layers + 1, width) embedded, then after each layer; NaN where it is gone


def traces(
    decoder: Decoder, prompt: EmbeddedPrompt, answer: Sequence[int], method: Method | None, chosen: Sequence[int]
) -> Traces:
    """What tokens attend to under a method, and what attends to them.

    chosen: places in the prompt and, after it, in the answer, whose last token no layer sees. The answer follows the
    prompt through the cache, as it does when it is spoken.
    """
    config, cache, said = decoder.config, KVCache(decoder.config), answer[:-1]
    total = len(prompt.hidden) + len(said)
    attention = np.zeros((len(chosen), config.layers, config.heads, total), np.float32)
    received = np.zeros((len(chosen), config.layers, total), np.float32)
    states = np.full((len(chosen), config.layers + 1, config.width), np.nan, np.float32)
    followed = np.array(chosen)
    for part in (prompt, embedded_text(decoder, said)) if len(said) else (prompt,):
        tokens = arriving(part, cache)
        note_states(states[:, 0], followed, tokens)
        for index in range(config.layers):
            tokens = method(index, tokens) if method else tokens
            rows, seen = worked_on(tokens), list[np.ndarray]()
            tokens = forward(decoder, tokens, None, index, index + 1, lambda name, array: seen.append(array))
            cached, attended = cache[index].positions, seen[0]  # attended: (heads, rows, cached)
            attends, is_cached = np.isin(followed, rows), np.isin(followed, cached)  # (chosen,) booleans
            theirs = attended[:, np.searchsorted(rows, followed[attends])].swapaxes(0, 1)  # (chosen, heads, cached)
            attention[:, index][np.ix_(attends, np.arange(config.heads), cached)] = theirs
            to_them = attended.mean(0)[:, np.searchsorted(cached, followed[is_cached])]  # (rows, chosen)
            received[:, index][np.ix_(is_cached, rows)] = to_them.T
            note_states(states[:, index + 1], followed, tokens)
    return Traces(attention, received, states)


def worked_on(tokens: Tokens) -> np.ndarray:
    """The positions of the tokens that the next layer works on."""
    return tokens.positions if tokens.works is None else tokens.positions[tokens.works]


def note_states(states: np.ndarray, chosen: np.ndarray, tokens: Tokens) -> None:
    """Write down the hidden states of the chosen tokens that are there. states: (chosen, width), written to."""
    there = np.isin(chosen, tokens.positions)
    states[there] = tokens.hidden[np.searchsorted(tokens.positions, chosen[there])]
