"""What each layer does with the visual tokens: their work is shared in the layers before K, and before K they leave.

That leaves one number to be found, the share of them that is worked on: by halving, with at most seven schedules. What
a schedule changes is how far the distributions of the answer's tokens move from those of the model that is left alone
(total variation), in the mean over an answer's tokens and over the samples: unlike a divergence it is bounded, so that
one lost answer is one lost answer, and a long answer counts as much as a word.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from ..counting import plain_run, prompt_flops
from ..errors import InputError
from ..methods.sharing import BLOCK, share
from ..methods.text import NamedMethod
from ..methods.withdrawal import then, withdraw
from ..model.decoder import Decoder
from .layer import FullRun, logits_from_layer, total_variation

STEPS = BLOCK.bit_length()  # schedules that a search tries, at most


class Trial(NamedTuple):
    """What a schedule changes and saves on the samples."""

    method: NamedMethod
    changed: float  # share of the answers' tokens, from 0 to 1
    saved: float  # share of the prefill FLOPs, from 0 to 1


def schedule(leaves: int, worked: int) -> NamedMethod:
    """Withdrawn before layer `leaves`, and in the layers between the first and that one `worked` of 64 are worked on."""
    if worked == BLOCK or leaves < 2:
        return replace(withdraw(leaves), layers=(min(leaves, 1),))  # begins where the others do
    return then(share(range(1, leaves), worked / BLOCK), withdraw(leaves))


def tried(decoder: Decoder, full_runs: Sequence[FullRun], method: NamedMethod) -> Trial:
    """Run a schedule on all samples, from the first layer that it changes."""
    changed, flops, plain = 0.0, 0, 0
    for full_run in full_runs:
        said, ran = logits_from_layer(decoder, full_run, method)
        changed += float(total_variation(said, full_run.full).mean()) / len(full_runs)
        flops += prompt_flops(decoder.config, ran)
        plain += prompt_flops(decoder.config, plain_run(decoder.config, len(full_run.entering[0])))
    return Trial(method, changed, 1 - flops / plain)


def search(
    decoder: Decoder,
    full_runs: Sequence[FullRun],
    leaves: int,
    save: float | None = None,
    threshold: float | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Trial]:
    """All schedules that were tried, with the visual tokens withdrawn before layer `leaves`; the one found last.

    save: the share of the prefill FLOPs to save, by as little sharing as will do; threshold: the share of the answers'
    tokens that may change, by as much sharing as it allows. Raises InputError where that share cannot be reached.
    """
    trials: dict[int, Trial] = {}  # by how many of 64 are worked on

    def trial(worked: int) -> Trial:
        if worked not in trials:
            trials[worked] = tried(decoder, full_runs, schedule(leaves, worked))
            progress(len(trials))
        return trials[worked]

    counts = range(BLOCK - 1, 0, -1) if leaves > 1 else range(0)  # fewer and fewer: more saved, more changed
    found, most = trial(BLOCK), float("inf") if threshold is None else threshold
    if save is None:
        place = bisect_left(counts, True, key=lambda worked: trial(worked).changed > most)
        found = trial(counts[place - 1]) if place else found
    elif found.saved < save:
        place = bisect_left(counts, save, key=lambda worked: trial(worked).saved)
        found = trial(counts[min(place, len(counts) - 1)]) if counts else found
    if save is not None and found.saved < save:
        raise InputError(f"no schedule saves {save:.0%}; with one in {BLOCK} worked on it is {found.saved:.1%}")
    if save is not None and found.changed > most:
        raise InputError(f"no schedule within the threshold saves {save:.0%}; it changes {found.changed:.2%}")
    return [*(one for one in trials.values() if one is not found), found]
