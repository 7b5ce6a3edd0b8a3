"""Instruments that these pictures and the tests alone use: redundancy, the lens, image maps, and what a swap says.

Redundancy: what is lost when the visual tokens leave before layer K, and when something else is done in their place.
Layers before the first one that a method names do the same for every method, so they run once (`search.run_in_full`). And the
greedy answers of two models are the same if and only if, along the answer of the one, the other's likeliest token is
the next one everywhere: that takes a single pass over prompt and answer. Only an answer that differs is decoded.
"""

import copy
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import NamedTuple

import knock_outs
import numpy as np

from minivtw.analysis import migration
from minivtw.analysis.tracing import traces
from minivtw.methods.text import Method, first_layer
from minivtw.model.cache import KVCache
from minivtw.model.decoder import Decoder, forward, logits
from minivtw.model.tokens import EmbeddedPrompt, Tokens, arriving, embedded_text
from minivtw.search.layer import FullRun, divergence, log_softmax, logits_from_layer, run_in_full


class Outcome(NamedTuple):
    """One prompt under one method."""

    answer: list[int]  # greedy token ids
    agrees: bool  # are they those of the model that is left alone?
    kl: float  # KL( under the method || left alone ) of the next token, nats


def decoded(
    decoder: Decoder, full_run: FullRun, method: Method | None, stop_ids: Collection[int], most_tokens: int
) -> list[int]:
    """The greedy answer under a method, from the prompt's part of the full run on. Returns token ids."""
    start, tokens, cache = first_layer(method), len(full_run.entering[0]), KVCache(decoder.config)
    cache.claim(tokens)
    for index in range(start):
        cache.layers[index] = copy.deepcopy(full_run.entering[0].cache[index])
        cache.layers[index].trim(tokens)
    prompt = replace(full_run.entering[start], cache=cache, notes={})
    answer = [int(logits(decoder, forward(decoder, prompt, method, start=start).hidden[-1:])[0].argmax())]
    while answer[-1] not in stop_ids and len(answer) < most_tokens:
        said = arriving(embedded_text(decoder, answer[-1:]), cache)
        answer.append(int(logits(decoder, forward(decoder, said, method).hidden)[0].argmax()))
    return answer


def redundancy(
    decoder: Decoder,
    prompt: EmbeddedPrompt,
    methods: Sequence[Method | None],
    stop_ids: Collection[int] = (),
    most_tokens: int = 64,
) -> list[Outcome]:
    """One `Outcome` for each of `methods`, compared with the model that is left alone."""
    full_run = run_in_full(decoder, prompt, most_tokens, stop_ids)
    outcomes = []
    for method in methods:
        if method is None or first_layer(method) == len(decoder.layers):
            outcomes.append(Outcome(full_run.answer, True, 0.0))
            continue
        said, _ = logits_from_layer(decoder, full_run, method)  # (answer, vocabulary)
        agrees = said.argmax(-1).tolist() == full_run.answer
        answer = full_run.answer if agrees else decoded(decoder, full_run, method, stop_ids, most_tokens)
        outcomes.append(Outcome(answer, agrees, float(divergence(said[0], full_run.full[0]))))
    return outcomes


def only_one_attends(
    decoder: Decoder, prompt: EmbeddedPrompt, answer: Sequence[int], layers: Collection[int]
) -> tuple[float, np.ndarray]:
    """The answer's probability, and what is left if in `layers` one token alone may attend to the image.

    Returns it for each of the prompt's text tokens after the first visual one, in their order; the answer's tokens
    count as the last of them.
    """
    image, question, last = knock_outs.roles(knock_outs.with_answer(decoder, prompt, answer).is_visual, len(answer))
    attending = [np.arange(len(image)) == word for word in np.flatnonzero(question)] + [last]
    return knock_outs.knock_outs(
        decoder, prompt, answer, [knock_outs.Cut((question | last) & ~word, image, layers) for word in attending]
    )


def says_after_swap(
    decoder: Decoder, own: Sequence[Tokens], other: Sequence[Tokens], answer: Sequence[int], layers: Collection[int]
) -> bool:
    """Whether, with the visual tokens swapped in `layers`, the greedy answer is `answer`.

    own: `entering` of the prompt with that answer; other: of the other prompt. Greedy decoding says an answer if and only if
    along it the likeliest token is the next one everywhere.
    """
    first = min(layers, default=len(decoder.layers))
    tokens = replace(own[first], cache=KVCache(decoder.config))
    hidden = forward(decoder, tokens, migration.swapped(own, other, layers), start=first).hidden[-len(answer) :]
    return logits(decoder, hidden).argmax(-1).tolist() == list(answer)


def last_states(
    decoder: Decoder, prompt: EmbeddedPrompt, method: Method | None = None, predictions: int = 1
) -> np.ndarray:
    """The last `predictions` tokens under a method: embedded, then after each layer.

    Returns (predictions, layers + 1, width).
    """
    last = range(len(prompt.hidden) - predictions, len(prompt.hidden))
    return traces(decoder, prompt, (), method, last).states


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


def image_maps(
    decoder: Decoder, prompt: EmbeddedPrompt, method: Method | None = None, predictions: int = 1
) -> np.ndarray:
    """What the last `predictions` tokens, those that answer, look at in the image; the mean over heads.

    Returns (predictions, layers, visual tokens).
    """
    last = range(len(prompt.hidden) - predictions, len(prompt.hidden))
    return traces(decoder, prompt, (), method, last).attention.mean(2)[:, :, prompt.is_visual]
