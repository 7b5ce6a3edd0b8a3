"""Redundancy: what is lost when the visual tokens leave at K, and when something else is done in their place.

The ablations are those of `Withdrawal`: positions renumbered, or as many tokens chosen at random.
"""

from typing import NamedTuple

import numpy as np

from ..cache import KVCache
from ..decoder import logits
from ..search import divergence
from ..withdrawal import Withdrawal, forward_with, staying


class Outcome(NamedTuple):
    """One prompt under one withdrawal."""

    answer: list[int]  # greedy token ids
    agrees: bool  # are they those of the full model?
    kl: float  # KL( withdrawn || full ) of the next token, nats


def greedy(decoder, asked, withdrawal, ends, most_tokens):
    """The greedy answer's token ids, and the logits of its first token (vocabulary,)."""
    cache = KVCache(len(decoder.layers))
    stays = staying(asked.is_visual, withdrawal)
    hidden = forward_with(decoder, asked.hidden, cache.claim(len(asked.hidden)), cache, withdrawal, stays)
    first = scores = logits(decoder, hidden[-1:])[0]  # (vocabulary,)
    answer = [int(scores.argmax())]
    while answer[-1] not in ends and len(answer) < most_tokens:
        token = decoder.embedding[answer[-1:]]  # (1, width)
        hidden = forward_with(decoder, token, cache.claim(1), cache, withdrawal, np.ones(1, bool))
        answer.append(int(logits(decoder, hidden)[0].argmax()))
    return answer, first


def redundancy(decoder, asked, withdrawals, ends=(), most_tokens=64):
    """One `Outcome` for each of `withdrawals`, compared with the model that withdraws nothing."""
    full, full_first = greedy(decoder, asked, Withdrawal(None), ends, most_tokens)
    outcomes = []
    for withdrawal in withdrawals:
        answer, first = greedy(decoder, asked, withdrawal, ends, most_tokens)
        outcomes.append(Outcome(answer, answer == full, float(divergence(first, full_first))))
    return outcomes
