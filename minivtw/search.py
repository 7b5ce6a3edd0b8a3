"""Which layer: the search for K, the layer before which the visual tokens can leave unnoticed.

Withdrawing before layer K changes nothing in layers 0 … K-1. So one prefill without withdrawal, which keeps the hidden
states at every layer's door, is the shared beginning of all candidates; what remains for each is its text-only tail,
from layer K up. With f(n) the FLOPs of one layer on n tokens, L layers and t text tokens among n, a prompt costs

    naive    L f(n)  +  sum over K of ( K f(n) + (L - K) f(t) )    every candidate from the bottom, as published
    shared   L f(n)  +  sum over K of            (L - K) f(t)      the same numbers

and L + 1 times the head, either way. `naive_flops` and `search_flops` count this.
"""

from typing import NamedTuple

import numpy as np

from .counting import layer_flops, prefill_flops
from .model.cache import KVCache
from .model.decoder import forward, logits
from .errors import InputError

ETA = 0.003  # nats; the paper's threshold of the KL divergence
QUIET_SHARE = 0.1  # of the text's attention: less than this, and a layer hardly looks at the image
QUIET_LAYERS = 2  # in a row, before the adaptive rule believes it


class Asked(NamedTuple):
    """A prompt as the decoder gets it."""

    hidden: np.ndarray  # (tokens, width), embedded
    is_visual: np.ndarray  # (tokens,) booleans


class Walk(NamedTuple):
    """A prompt, and perhaps an answer behind it, carried through all layers with nothing withdrawn."""

    doors: list[np.ndarray]  # layers + 1 arrays (tokens, width): hidden before each layer and, last, behind them all
    is_visual: np.ndarray  # (tokens,) booleans
    predictions: int  # how many of the last tokens predict a token of the answer
    answer: list[int]  # the greedy token at each prediction
    cache: KVCache


def carry(decoder, hidden, cache, observe=None):
    """One layer at a time. hidden: (tokens, width). Returns the `doors` of these tokens, as in `Walk`."""
    positions, doors = cache.claim(len(hidden)), [hidden]
    for index in range(len(decoder.layers)):
        doors.append(forward(decoder, doors[-1], positions, cache, start=index, stop=index + 1, observe=observe))
    return doors


def walk(decoder, asked, most_tokens=1, stop_ids=(), observe=None):
    """Prefill and greedy answer, without withdrawal: `Walk`.

    The answer stops with a token of `stop_ids` or after `most_tokens`; 1 looks at the next token alone.
    """
    cache, answer = KVCache(len(decoder.layers)), []
    parts = [carry(decoder, asked.hidden, cache, observe)]  # the prompt's doors, then each answer token's
    while True:
        answer.append(int(logits(decoder, parts[-1][-1][-1:])[0].argmax()))
        if answer[-1] in stop_ids or len(answer) >= most_tokens:
            break
        parts.append(carry(decoder, decoder.embedding[answer[-1:]], cache, observe))
    doors = [np.concatenate(pieces) for pieces in zip(*parts)]
    is_visual = np.concatenate([asked.is_visual, np.zeros(len(answer) - 1, bool)])
    return Walk(doors, is_visual, len(answer), answer, cache)


def tail(decoder, walked, layer):
    """Withdraw before `layer` and go on from that layer's door with the text alone.

    Returns the logits of the walk's predictions, (predictions, vocabulary).
    """
    stays = ~walked.is_visual
    cache = KVCache(len(decoder.layers))
    hidden = forward(decoder, walked.doors[layer][stays], np.flatnonzero(stays), cache, start=layer)
    return logits(decoder, hidden[-walked.predictions :])


def divergence(withdrawn, full):
    """KL( withdrawn || full ) = sum p_w (log p_w - log p_f), in nats. Logits (…, vocabulary) to (…,) float64."""
    withdrawn, full = log_softmax(withdrawn), log_softmax(full)
    return np.sum(np.exp(withdrawn) * (withdrawn - full), axis=-1)


def log_softmax(scores):
    """log softmax over the last axis, in float64: divergences near the threshold are sums of tiny differences."""
    shifted = scores.astype(np.float64) - scores.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def kl_curve(decoder, asked, most_tokens=1, stop_ids=()):
    """For each K from 0 to layers - 1: the largest KL over the answer's tokens, teacher-forced. (layers,) nats.

    With `most_tokens` 1 this is the paper's criterion for one sample: the next token alone.
    """
    walked = walk(decoder, asked, most_tokens, stop_ids)
    full = logits(decoder, walked.doors[-1][-walked.predictions :])  # (predictions, vocabulary)
    return np.array([divergence(tail(decoder, walked, layer), full).max() for layer in range(len(decoder.layers))])


def visual_share(attended, is_visual):
    """How much of the text's attention goes to visual tokens: mean over heads, and text queries behind the first one.

    attended: (heads, queries, keys) attention probabilities; is_visual: (keys,) booleans, the queries being the last
    of the keys. Returns 0 … 1; a prompt without visual tokens has 0.
    """
    if not is_visual.any():
        return 0.0
    queries = attended.shape[1]
    can_see = ~is_visual & (np.cumsum(is_visual) > 0)  # (keys,)
    seen = attended[:, can_see[-queries:]][:, :, is_visual].sum(-1)  # (heads, such queries)
    return float(seen.mean()) if seen.size else 0.0


def attention_curve(decoder, asked):
    """`visual_share` of each layer, nothing withdrawn. (layers,)"""
    shares = []

    def observe(name, array):
        if name.endswith("attention"):
            shares.append(visual_share(array, asked.is_visual))

    carry(decoder, asked.hidden, KVCache(len(decoder.layers)), observe)
    return np.array(shares)


def forward_adaptive(decoder, hidden, positions, cache, is_visual, observe=None):
    """A prefill that decides as it goes: `decoder.forward`, with K found for this prompt.

    The visual tokens leave once `QUIET_LAYERS` layers in a row gave them less than `QUIET_SHARE` of the text's
    attention. Reading the share is one sum over probabilities that the layer computed anyway.
    Returns the hidden states of the tokens that reached the end, and K, None if the image was looked at to the end.
    """
    before, quiet = len(cache[0]), 0
    keys = np.concatenate([np.zeros(before, bool), is_visual])  # (cached,): what a conversation holds so far is text
    share = 0.0

    def watch(name, array):
        nonlocal share
        if name.endswith("attention"):
            share = visual_share(array, keys)
        if observe:
            observe(name, array)

    for index in range(len(decoder.layers)):
        hidden = forward(decoder, hidden, positions, cache, start=index, stop=index + 1, observe=watch)
        quiet = quiet + 1 if share < QUIET_SHARE else 0
        if quiet == QUIET_LAYERS and index + 1 < len(decoder.layers):
            hidden, positions = hidden[~is_visual], positions[~is_visual]
            return forward(decoder, hidden, positions, cache, start=index + 1, observe=observe), index + 1
    return hidden, None


def first_at_most(curve, threshold):
    """The paper's rule: the first layer whose value is at most the threshold; None if there is none."""
    met = np.flatnonzero(np.asarray(curve) <= threshold)
    return int(met[0]) if len(met) else None


def first_settled(curve, threshold):
    """The first layer from which on every value stays under the threshold; None if the last one does not."""
    loud = np.flatnonzero(np.asarray(curve) >= threshold)
    layer = int(loud[-1]) + 1 if len(loud) else 0
    return layer if layer < len(curve) else None


class Criterion(NamedTuple):
    """A way to find K: a curve over the layers for each sample, and a rule on the mean of the curves."""

    curve: callable  # (decoder, Asked, stop_ids) -> (layers,)
    rule: callable  # (curve, threshold) -> layer or None
    threshold: float
    unit: str


LONGEST_ANSWER = 64  # tokens
CRITERIA = {
    "kl": Criterion(lambda decoder, asked, stop_ids: kl_curve(decoder, asked), first_at_most, ETA, "nats"),
    "answer": Criterion(
        lambda decoder, asked, stop_ids: kl_curve(decoder, asked, LONGEST_ANSWER, stop_ids), first_at_most, ETA, "nats"
    ),
    "attention": Criterion(
        lambda decoder, asked, stop_ids: attention_curve(decoder, asked), first_settled, QUIET_SHARE, "of it"
    ),
}


def mean_curve(decoder, samples, criterion, stop_ids=()):
    """A criterion's curve, averaged over `samples`, any iterable of `Asked`. (layers,)"""
    return np.mean([CRITERIA[criterion].curve(decoder, asked, stop_ids) for asked in samples], axis=0)


def choose(curve, criterion, threshold):
    """K by a criterion's rule. Raises InputError where no layer meets it."""
    layer = CRITERIA[criterion].rule(curve, threshold)
    if layer is None:
        lowest = int(np.argmin(curve))
        raise InputError(
            f"no layer meets the {criterion} criterion's threshold of {threshold:g}: "
            f"the lowest value is {curve[lowest]:.4g}, at layer {lowest}"
        )
    return layer


def search_flops(config, tokens, staying):
    """FLOPs of `kl_curve` for a prompt of `tokens`, `staying` of them text: the naive search less the beginnings."""
    beginnings = sum(layer * layer_flops(config, tokens, tokens) for layer in range(config.layers))
    return naive_flops(config, tokens, staying) - beginnings


def naive_flops(config, tokens, staying):
    """FLOPs of the published search: one prefill without withdrawal, and one from the bottom for every candidate."""
    return prefill_flops(config, tokens) + sum(prefill_flops(config, tokens, staying, k) for k in range(config.layers))
