"""Redundancy: what is lost when the visual tokens leave at K, and when something else is done in their place.

The ablations are those of `Withdrawal`: positions renumbered, or as many tokens chosen at random.

Layers below K do the same for every withdrawal, so they are run once (`search.walk`). And the greedy answers of two
models are the same if and only if, along the answer of the one, the other's likeliest token is the next one everywhere:
that takes a single pass over prompt and answer. Only an answer that differs is decoded.
"""

import copy
from typing import NamedTuple

import numpy as np

from ..model.cache import KVCache
from ..model.decoder import forward, logits
from ..search import divergence, walk
from ..methods import forward_with, staying


class Outcome(NamedTuple):
    """One prompt under one withdrawal."""

    answer: list[int]  # greedy token ids
    agrees: bool  # are they those of the full model?
    kl: float  # KL( withdrawn || full ) of the next token, nats


def upper_layers(decoder, walked, withdrawal, stays, cache):
    """Layers K … on those of a walk's first tokens that stay: hidden states behind the last layer, (staying, width).

    stays: (tokens,) booleans, as many as are wanted of the walk's; cache: takes their keys and values.
    """
    layer, positions = withdrawal.layer, np.flatnonzero(stays)
    hidden = walked.doors[layer][: len(stays)][stays]  # (staying, width)
    if withdrawal.positions == "reindex":
        positions = np.arange(len(positions))
    return forward(decoder, hidden, positions, cache, start=layer)


def decoded(decoder, asked, walked, withdrawal, stop_ids, most_tokens):
    """The greedy answer under a withdrawal, from the prompt's part of the walk on. Returns token ids."""
    layer, tokens = withdrawal.layer, len(asked.hidden)
    cache = KVCache(len(decoder.layers))
    cache.claim(tokens)
    hidden = upper_layers(decoder, walked, withdrawal, staying(asked.is_visual, withdrawal), cache)
    for index in range(layer):
        cache.layers[index] = copy.deepcopy(walked.cache[index])
        cache.layers[index].trim(tokens)
    answer = [int(logits(decoder, hidden[-1:])[0].argmax())]
    while answer[-1] not in stop_ids and len(answer) < most_tokens:
        token = decoder.embedding[answer[-1:]]  # (1, width)
        hidden = forward_with(decoder, token, cache.claim(1), cache, withdrawal, np.ones(1, bool))
        answer.append(int(logits(decoder, hidden)[0].argmax()))
    return answer


def redundancy(decoder, asked, withdrawals, stop_ids=(), most_tokens=64):
    """One `Outcome` for each of `withdrawals`, compared with the model that withdraws nothing."""
    layers, walked = len(decoder.layers), walk(decoder, asked, most_tokens, stop_ids)
    full = logits(decoder, walked.doors[-1][-walked.predictions :])  # (predictions, vocabulary)
    outcomes = []
    for withdrawal in withdrawals:
        if withdrawal.layer in (None, layers):
            outcomes.append(Outcome(walked.answer, True, 0.0))
            continue
        stays = staying(asked.is_visual, withdrawal)
        along = np.concatenate([stays, np.ones(walked.predictions - 1, bool)])  # the answer's tokens stay
        hidden = upper_layers(decoder, walked, withdrawal, along, KVCache(layers))
        said = logits(decoder, hidden[-walked.predictions :])  # (predictions, vocabulary)
        agrees = said.argmax(-1).tolist() == walked.answer
        answer = walked.answer if agrees else decoded(decoder, asked, walked, withdrawal, stop_ids, most_tokens)
        outcomes.append(Outcome(answer, agrees, float(divergence(said[0], full[0]))))
    return outcomes
