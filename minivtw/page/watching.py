"""A question watched: what the model says under a method, what every layer carries, where a token looks.

One `Asked` holds what all methods share, the embedded prompt and the answer of the model that is left alone. `frame`
is one position of the wall: an answer with what it took. The page of `minivtw.explore` asks for frames as a hand moves,
`minivtw.report` writes all of them into its page beforehand.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from ..errors import InputError
from ..inputs.prompts import Prompt
from ..methods.text import Method, spec_of
from ..model.cache import KVCache
from ..model.decoder import Decoder, forward, logits
from ..model.layers import softmax
from ..model.tokens import EmbeddedPrompt, Tokens, arriving, embedded_text
from ..search.layer import divergence, log_softmax
from ..vlm import VLM, Answer, Chat

LONGEST_ANSWER = 32  # tokens
READINGS = 3  # tokens shown of what a layer would say
GONE, READ, WORKED = 0, 1, 2  # what becomes of a token in a layer: left before it, only read there, worked on


class Asked(NamedTuple):
    """A question about a picture, embedded, and what the model says to it when it is left alone."""

    prompt: Prompt
    embedded: EmbeddedPrompt
    answer: Answer
    logits: np.ndarray  # (vocabulary,) of the answer's first token

    def __sizeof__(self) -> int:
        """Bytes of its arrays, which are nearly all of it."""
        tower = self.embedded.tower
        arrays = self.embedded.hidden, self.logits, self.prompt.tiles, *(tower.entering if tower else [])
        return sum(array.nbytes for array in arrays if array is not None)


def ask(vlm: VLM, picture: Any, question: str) -> Asked:
    """Embed a question and answer it with every token in every layer. Raises InputError."""
    prompt = vlm.prepare(picture, question)
    embedded = vlm.embed(prompt)
    answer, first, _ = responded(vlm, embedded, None)
    return Asked(prompt, embedded, answer, first)


def responded(vlm: VLM, prompt: EmbeddedPrompt, method: Method | None) -> tuple[Answer, np.ndarray, np.ndarray]:
    """The greedy answer under a method, its first token's logits (vocabulary,), and what became of each token of the
    prompt in each layer: (layers, tokens) of GONE, READ, WORKED."""
    marks: list[np.ndarray] = []
    first: list[np.ndarray] = []

    def marking(index, tokens):
        tokens = method(index, tokens) if method else tokens
        if index == len(marks):  # the prompt comes first; tokens that are fed back find every layer marked
            marks.append(np.full(len(prompt.hidden), GONE, np.uint8))
            marks[index][tokens.positions] = READ
            marks[index][asking(tokens)] = WORKED
        return tokens

    def likeliest_token(scores):
        first.append(scores)
        return int(scores.argmax())

    answer = Chat(vlm, method=marking).respond(prompt, likeliest_token, LONGEST_ANSWER)
    return answer, first[0], np.array(marks)


def asking(tokens: Tokens) -> np.ndarray:
    """The positions of the tokens that the next layer works on."""
    return tokens.positions if tokens.works is None else tokens.positions[tokens.works]


def frame(vlm: VLM, asked: Asked, method: Method | None) -> dict[str, Any]:
    """One position of the wall: the answer under a method, what each layer carried, and what that cost and changed."""
    answer, first, marks = responded(vlm, asked.embedded, method)
    flops, cache = answer.stats["flops"], answer.stats["cache"]
    return {
        "method": spec_of(method),
        "answer": answer.text,
        "ids": answer.token_ids,
        "tokens": [token_text(vlm, token) for token in answer.token_ids],
        "layers": ["".join(map(str, mark)) for mark in marks],  # a digit a token
        "flops": [flops["prefill"], flops["prefill_without_withdrawal"]],
        "cache": [cache["bytes"], cache["bytes_without_withdrawal"]],
        "kl": max(float(divergence(first, asked.logits)), 0.0),  # nats; rounding can take it below 0
        "next": likeliest(vlm, first[None])[0],
    }


def probability(decoder: Decoder, prompt: EmbeddedPrompt, answer: Sequence[int], method: Method | None) -> float:
    """How likely a whole answer is under a method, token after token."""
    cache = KVCache(decoder.config)
    hidden = forward(decoder, arriving(prompt, cache), method).hidden[-1:]
    if len(answer) > 1:
        following = arriving(embedded_text(decoder, answer[:-1]), cache)
        hidden = np.concatenate([hidden, forward(decoder, following, method).hidden])
    said = log_softmax(logits(decoder, hidden))  # (answer, vocabulary)
    return float(np.exp(said[np.arange(len(answer)), answer].sum()))


def likeliest(vlm: VLM, scores: np.ndarray) -> list[list[tuple[str, float]]]:
    """The likeliest tokens by logits (rows, vocabulary), with their probabilities."""
    probabilities = softmax(scores)
    best = np.argsort(-probabilities, axis=1)[:, :READINGS]
    return [
        [(token_text(vlm, int(token)), round(float(row[token]), 4)) for token in tokens]
        for row, tokens in zip(probabilities, best)
    ]


def token_text(vlm: VLM, token: int) -> str:
    """A token as people would write it."""
    return vlm.tokenizer.decode([token], skip_special_tokens=False)


class Eyes(NamedTuple):
    """Some tokens of prompt and answer on their way. What a token does in a layer that it does not reach is zero."""

    looks: np.ndarray  # (chosen, layers, heads, tokens) where each looks
    seen: np.ndarray  # (chosen, layers, tokens) how much each other token looks at it; mean over heads
    states: np.ndarray  # (chosen, layers + 1, width) embedded, then after each layer; NaN where it is gone


def eyes(
    decoder: Decoder, prompt: EmbeddedPrompt, answer: Sequence[int], method: Method | None, chosen: Sequence[int]
) -> Eyes:
    """Where tokens look under a method, and who looks at them.

    chosen: places in the prompt and, behind it, in the answer, whose last token no layer sees. The answer follows the
    prompt through the cache, as it does when it is spoken.
    """
    config, cache = decoder.config, KVCache(decoder.config)
    total = len(prompt.hidden) + len(answer) - 1
    looks = np.zeros((len(chosen), config.layers, config.heads, total), np.float32)
    seen = np.zeros((len(chosen), config.layers, total), np.float32)
    states = np.full((len(chosen), config.layers + 1, config.width), np.nan, np.float32)
    said = embedded_text(decoder, answer[:-1])
    for part in (prompt, said)[: 1 + (len(answer) > 1)]:
        tokens = arriving(part, cache)
        note_states(states[:, 0], chosen, tokens)
        for index in range(config.layers):
            tokens = method(index, tokens) if method else tokens
            rows, keys = asking(tokens), []
            tokens = forward(decoder, tokens, None, index, index + 1, lambda name, array: keys.append(array))
            attended = keys[0]  # (heads, rows, cached)
            cached = cache[index].positions
            for place, token in enumerate(chosen):
                if token in rows:
                    looks[place, index][:, cached] = attended[:, np.searchsorted(rows, token)]
                if token in cached:
                    seen[place, index, rows] = attended[:, :, np.searchsorted(cached, token)].mean(0)
            note_states(states[:, index + 1], chosen, tokens)
    return Eyes(looks, seen, states)


def note_states(states, chosen, tokens):
    """Write down the hidden states of the chosen tokens that are there. states: (chosen, width), written to."""
    for place, token in enumerate(chosen):
        if token in tokens.positions:
            states[place] = tokens.hidden[np.searchsorted(tokens.positions, token)]


def readings(vlm: VLM, states: np.ndarray) -> list[list[tuple[str, float]] | None]:
    """The lens: what each state (layers + 1, width) would say through the final norm and head; None for no state."""
    there = ~np.isnan(states).any(1)
    said = iter(likeliest(vlm, logits(vlm.decoder, states[there])))
    return [next(said) if one else None for one in there]


def without(gone: Sequence[int]) -> Method:
    """Visual tokens that are clicked away: they never enter. gone: their places in the prompt."""
    return lambda index, tokens: tokens[~(np.isin(tokens.positions, gone) & tokens.is_visual)] if index == 0 else tokens


def swapped(decoder: Decoder, prompt: EmbeddedPrompt, other: EmbeddedPrompt, first: int, stop: int) -> Method:
    """In layers first … stop - 1 the visual tokens are those of another picture with the same question.

    What is visual comes before the question and never sees it, so both pictures' tokens take their own way through the
    stack whatever the text does, and only the doors of the two layers need to do anything.
    """
    if not np.array_equal(prompt.is_visual, other.is_visual):
        raise InputError("only a picture that becomes as many tokens, at the same places, can be swapped in")
    ours, theirs = (visual_states(decoder, each, {first, stop}) for each in (prompt, other))

    def method(index: int, tokens: Tokens) -> Tokens:
        if index not in (first, stop) or first == stop or not tokens.is_visual.any():
            return tokens
        hidden = tokens.hidden.copy()
        hidden[tokens.is_visual] = (theirs if index == first else ours)[index][tokens.positions[tokens.is_visual]]
        return replace(tokens, hidden=hidden)

    return method


def visual_states(decoder: Decoder, prompt: EmbeddedPrompt, layers: set[int]) -> dict[int, np.ndarray]:
    """A prompt's states at the doors of some layers, each (tokens, width)."""
    states: dict[int, np.ndarray] = {}

    def noting(index, tokens):
        if index in layers:
            states[index] = tokens.hidden
        return tokens

    forward(
        decoder, arriving(prompt, KVCache(decoder.config)), noting, stop=min(max(layers) + 1, decoder.config.layers)
    )
    return states
