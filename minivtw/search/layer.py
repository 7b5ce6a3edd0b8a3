"""Which layer: the search for K, the layer before which the visual tokens can leave unnoticed.

Withdrawing before layer K changes nothing in layers 0 … K-1. So one prefill without withdrawal, which keeps the hidden
states that enter every layer, is the shared beginning of all candidates; what remains for each is its text-only tail,
from layer K up. With f(n) the FLOPs of one layer on n tokens, L layers and t text tokens among n, a prompt costs

    naive    L f(n)  +  sum over K of ( K f(n) + (L - K) f(t) )    every candidate from the bottom, as published
    shared   L f(n)  +  sum over K of            (L - K) f(t)      the same numbers

and L + 1 times the head, either way. `tests/bench_search.py` counts this.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ..errors import InputError
from ..methods.text import Method, first_layer
from ..methods.withdrawal import visual_share, withdraw
from ..model.cache import KVCache
from ..model.decoder import Decoder, forward, logits
from ..model.tokens import EmbeddedPrompt, LayerCount, Tokens, arriving, embedded_text

ETA = 0.003  # nats; the paper's threshold of the KL divergence
QUIET_SHARE = 0.1  # of the text's attention: less than this, and a layer hardly looks at the image


class FullRun(NamedTuple):
    """A prompt and its greedy answer, carried through all layers one at a time, with nothing withdrawn."""

    entering: list[Tokens]  # layers + 1: the prompt's tokens as they enter each layer and, last, after all of them
    answer_states: list[np.ndarray]  # layers + 1: the same of the answer's tokens but the last, (answer - 1, width)
    answer: list[int]  # greedy token ids
    full: np.ndarray  # (answer, vocabulary) the logits that predict each token of the answer


def layer_by_layer(decoder: Decoder, tokens: Tokens) -> list[Tokens]:
    """Tokens as they enter each layer and, last, after all of them: layers + 1 `Tokens`."""
    entering = [tokens]
    for index in range(len(decoder.layers)):
        entering.append(forward(decoder, entering[-1], start=index, stop=index + 1))
    return entering


def run_in_full(
    decoder: Decoder, prompt: EmbeddedPrompt, most_tokens: int = 1, stop_ids: Collection[int] = ()
) -> FullRun:
    """Prefill and greedy answer, without withdrawal: `FullRun`.

    The answer ends with a token of `stop_ids` or after `most_tokens`; 1 looks at the next token alone.
    """
    cache = KVCache(decoder.config)
    entering = layer_by_layer(decoder, arriving(prompt, cache))
    predictions, answer, steps = [logits(decoder, entering[-1].hidden[-1:])], [], []
    while True:
        answer.append(int(np.argmax(predictions[-1])))
        if answer[-1] in stop_ids or len(answer) >= most_tokens:
            break
        said = arriving(embedded_text(decoder, answer[-1:]), cache)
        steps.append([tokens.hidden for tokens in layer_by_layer(decoder, said)])
        predictions.append(logits(decoder, steps[-1][-1]))
    following = [np.concatenate(parts) for parts in zip(*steps)] or [prompt.hidden[:0]] * len(entering)
    return FullRun(entering, following, answer, np.concatenate(predictions))


def logits_from_layer(
    decoder: Decoder, full_run: FullRun, method: Method | None
) -> tuple[np.ndarray, tuple[LayerCount, ...]]:
    """Go on, under a method, from what entered the first layer that it names: before that layer it changes nothing.

    Returns the logits that predict the run's answer, (answer, vocabulary), and what each layer did with the prompt.
    """
    layer, cache = first_layer(method), KVCache(decoder.config)
    cache.next_position = len(full_run.entering[0])
    prompt = replace(full_run.entering[layer], cache=cache, notes={}, extra_flops=[])
    ended = forward(decoder, prompt, method, start=layer)
    hidden, said = [ended.hidden[-1:]], full_run.answer_states[layer]
    if len(said):  # a fixed answer: what was said is fed in as it is (teacher forcing)
        following = arriving(EmbeddedPrompt(said, np.zeros(len(said), bool)), cache)
        hidden.append(forward(decoder, following, method, start=layer).hidden)
    return logits(decoder, np.concatenate(hidden)), ended.ran


def divergence(withdrawn: np.ndarray, full: np.ndarray) -> np.ndarray:
    """KL( withdrawn || full ) = sum p_w (log p_w - log p_f), in nats. Logits (…, vocabulary) to (…,) float64."""
    withdrawn, full = log_softmax(withdrawn), log_softmax(full)
    return np.sum(np.exp(withdrawn) * (withdrawn - full), axis=-1)


def total_variation(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """1/2 sum |p - q|: the least probability with which tokens drawn from the two can differ.

    Logits (…, vocabulary) to (…,) float64 from 0 to 1.
    """
    return np.abs(np.exp(log_softmax(one)) - np.exp(log_softmax(other))).sum(axis=-1) / 2


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """log softmax over the last axis, in float64: divergences near the threshold are sums of tiny differences."""
    shifted = scores.astype(np.float64) - scores.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def kl_curve(
    decoder: Decoder, prompt: EmbeddedPrompt, most_tokens: int = 1, stop_ids: Collection[int] = ()
) -> np.ndarray:
    """For each K from 0 to layers - 1: the largest KL over the answer's tokens, teacher-forced. (layers,) nats.

    With `most_tokens` 1 this is the paper's criterion for one sample: the next token alone.
    """
    return kl_curve_of(decoder, run_in_full(decoder, prompt, most_tokens, stop_ids))


def kl_curve_of(decoder: Decoder, full_run: FullRun) -> np.ndarray:
    """`kl_curve` of a prompt and an answer that have been run in full already. (layers,) nats."""
    tails = (logits_from_layer(decoder, full_run, withdraw(layer)) for layer in range(len(decoder.layers)))
    return np.array([divergence(withdrawn, full_run.full).max() for withdrawn, _ in tails])


def changed_curve(decoder: Decoder, full_run: FullRun) -> np.ndarray:
    """For each K the share of the answer's tokens that a withdrawal before it changes, by `total_variation`. (layers,)"""
    tails = (logits_from_layer(decoder, full_run, withdraw(layer)) for layer in range(len(decoder.layers)))
    return np.array([total_variation(withdrawn, full_run.full).mean() for withdrawn, _ in tails])


def attention_curve(decoder: Decoder, prompt: EmbeddedPrompt) -> np.ndarray:
    """The image's share of the text's attention in each layer, nothing withdrawn. (layers,), from 0 to 1."""
    entering = layer_by_layer(decoder, arriving(prompt, KVCache(decoder.config)))
    return np.array([visual_share(tokens) for tokens in entering[1:]])


def first_at_most(curve: np.ndarray, threshold: float) -> int | None:
    """The paper's rule: the first layer whose value is at most the threshold; None if there is none."""
    met = np.flatnonzero(np.asarray(curve) <= threshold)
    return int(met[0]) if len(met) else None


def first_settled(curve: np.ndarray, threshold: float) -> int | None:
    """The first layer from which on every value stays under the threshold; None if the last one does not."""
    loud = np.flatnonzero(np.asarray(curve) >= threshold)
    layer = int(loud[-1]) + 1 if len(loud) else 0
    return layer if layer < len(curve) else None


class Criterion(NamedTuple):
    """A way to find K: a curve over the layers for each sample, and a rule on the mean of the curves."""

    curve: Callable[..., np.ndarray]  # (decoder, EmbeddedPrompt, stop_ids) -> (layers,)
    rule: Callable[..., int | None]  # (curve, threshold) -> layer or None
    threshold: float
    unit: str


LONGEST_ANSWER = 64  # tokens
CRITERIA = {
    "kl": Criterion(lambda decoder, prompt, _: kl_curve(decoder, prompt), first_at_most, ETA, "nats"),
    "answer": Criterion(
        lambda decoder, prompt, stop_ids: kl_curve(decoder, prompt, LONGEST_ANSWER, stop_ids),
        first_at_most,
        ETA,
        "nats",
    ),
    "attention": Criterion(
        lambda decoder, prompt, _: attention_curve(decoder, prompt), first_settled, QUIET_SHARE, "of it"
    ),
}


def mean_curve(
    decoder: Decoder, samples: Iterable[EmbeddedPrompt], criterion: str, stop_ids: Collection[int] = ()
) -> np.ndarray:
    """A criterion's curve, averaged over `samples`, any iterable of `EmbeddedPrompt`. (layers,)"""
    return np.mean([CRITERIA[criterion].curve(decoder, prompt, stop_ids) for prompt in samples], axis=0)


def choose_layer(curve: np.ndarray, criterion: str, threshold: float) -> int:
    """K by a criterion's rule. Raises InputError where no layer meets it."""
    layer = CRITERIA[criterion].rule(curve, threshold)
    if layer is None:
        lowest = int(np.argmin(curve))
        raise InputError(
            f"no layer meets the {criterion} criterion's threshold of {threshold:g}: "
            f"the lowest value is {curve[lowest]:.4g}, at layer {lowest}"
        )
    return layer
