"""Redundancy: what is lost when the visual tokens leave before layer K, and when something else is done in their place.

Layers before the first one that a method names do the same for every method, so they run once (`search.run_in_full`). And the
greedy answers of two models are the same if and only if, along the answer of the one, the other's likeliest token is
the next one everywhere: that takes a single pass over prompt and answer. Only an answer that differs is decoded.
"""

import copy
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import NamedTuple

from ..methods.text import Method, first_layer
from ..model.cache import KVCache
from ..model.decoder import Decoder, forward, logits
from ..model.tokens import EmbeddedPrompt, arriving, embedded_text
from ..search.layer import FullRun, divergence, logits_from_layer, run_in_full


class Outcome(NamedTuple):
    """One prompt under one method."""

    answer: list[int]  # greedy token ids
    agrees: bool  # are they those of the model that is left alone?
    kl: float  # KL( under the method || left alone ) of the next token, nats


def decoded(
    decoder: Decoder, walked: FullRun, method: Method | None, stop_ids: Collection[int], most_tokens: int
) -> list[int]:
    """The greedy answer under a method, from the prompt's part of the walk on. Returns token ids."""
    start, tokens, cache = first_layer(method), len(walked.entering[0]), KVCache(decoder.config)
    cache.claim(tokens)
    for index in range(start):
        cache.layers[index] = copy.deepcopy(walked.entering[0].cache[index])
        cache.layers[index].trim(tokens)
    prompt = replace(walked.entering[start], cache=cache, notes={})
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
    walked = run_in_full(decoder, prompt, most_tokens, stop_ids)
    outcomes = []
    for method in methods:
        if method is None or first_layer(method) == len(decoder.layers):
            outcomes.append(Outcome(walked.answer, True, 0.0))
            continue
        said, _ = logits_from_layer(decoder, walked, method, first_layer(method))  # (answer, vocabulary)
        agrees = said.argmax(-1).tolist() == walked.answer
        answer = walked.answer if agrees else decoded(decoder, walked, method, stop_ids, most_tokens)
        outcomes.append(Outcome(answer, agrees, float(divergence(said[0], walked.full[0]))))
    return outcomes
