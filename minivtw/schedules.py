"""Which layers: the search for a schedule, for what each layer does with each visual token: work on it, read it, do without.

A schedule thins the visual tokens out before one layer, freezes what is left of them in some layers, and withdraws them
before layer K. There are 2^K sets of layers to freeze alone, so the search is greedy: from withdrawal at the first K that
costs next to nothing, it takes the step that changes the fewest tokens of the answers for the operations that it saves,
until enough is saved or no step is cheap enough. A step is to freeze one more layer, to withdraw one layer earlier, or to
thin out at another place or by more.

What a step costs is measured on samples: how far the distributions of the answer's tokens move from those of the model
that is left alone (total variation), in the mean over an answer's tokens and over the samples. Unlike a divergence it
has an end, so that one lost answer is one lost answer; and a long answer counts as much as a word. Up to the first layer
that a step changes, all samples are kept as they entered it. All steps are tried once, on every third sample. A step's
price seldom falls as others are taken, so from then on only the step that looks cheapest is measured, on all samples
(lazy greedy: Minoux 1978): if it still is the cheapest, the others need not be.
"""

import heapq
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from .counting import plain_run, prompt_flops
from .errors import InputError
from .methods import freeze, then, withdraw
from .model.decoder import Decoder, forward
from .search import Walk, from_layer, tail, total_variation
from .shelf import method_of
from .specs import Method, first_layer

KEPT = (0.75, 0.5)  # shares of the visual tokens that thinning out may keep
THINNERS = ("uniform", "looked_at")  # methods of the shelf
NOISE = 1e-4  # of the tokens: steps that change fewer differ in what they save alone
SIFTING = 3  # the first look at a step takes every third sample


class Schedule(NamedTuple):
    """What happens to the visual tokens on their way."""

    leaves: int  # K, the layer before which they all leave
    frozen: frozenset[int] = frozenset()  # layers before K in which they are read, and not worked on
    thinned: str | None = None  # a method of the shelf that keeps some of them, by its text

    def method(self) -> Method:
        """The schedule as a method, which is stored and used by its text."""
        steps = [method_of(self.thinned)] if self.thinned else []
        steps += [freeze(self.frozen)] if self.frozen else []
        return then(*steps, withdraw(self.leaves)) if steps else withdraw(self.leaves)

    def first_change(self, other: "Schedule") -> int:
        """The first layer that two schedules treat differently."""
        layers = set(self.frozen ^ other.frozen)
        if self.thinned != other.thinned:
            layers |= {first_layer(method_of(one)) for one in (self.thinned, other.thinned) if one}
        if self.leaves != other.leaves:
            layers.add(min(self.leaves, other.leaves))
        return min(layers, default=0)


class Measured(NamedTuple):
    """A schedule with what it costs and what it saves, in the mean over the samples."""

    schedule: Schedule
    changed: float  # share of the answers' tokens, from 0 to 1
    saved: float  # share of the prefill FLOPs


class Bench:
    """Samples on which schedules are measured, as they enter every layer under the schedule that was taken last."""

    def __init__(self, decoder: Decoder, walks: Sequence[Walk], start: Schedule, progress: Callable[[int], None]):
        self.decoder, self.walks, self.tried, self._progress = decoder, list(walks), 0, progress
        self.plain = [prompt_flops(decoder.config, plain_run(decoder.config, len(one.entering[0]))) for one in walks]
        self.taken = Measured(Schedule(decoder.config.layers), 0.0, 0.0)  # so far: everything stays as it is
        self.take(self.measure(start))

    def measure(self, schedule: Schedule, every: int = 1) -> Measured:
        """What a schedule costs and saves, on every n-th sample, from the first layer on that it treats differently."""
        method, start = schedule.method(), schedule.first_change(self.taken.schedule)
        costs, saved = [], []
        for walked, plain in zip(self.walks[::every], self.plain[::every]):
            said, ran = tail(self.decoder, walked, method, start)
            costs.append(total_variation(said, walked.full).mean())
            saved.append(1 - prompt_flops(self.decoder.config, ran) / plain)
        self.tried += 1
        self._progress(self.tried)
        return Measured(schedule, float(np.mean(costs)), float(np.mean(saved)))

    def saves_more(self, schedule: Schedule) -> bool:
        """Whether a schedule saves more than the one that was taken last, on the first sample: a look before measuring."""
        _, ran = tail(self.decoder, self.walks[0], schedule.method(), schedule.first_change(self.taken.schedule))
        config, now = self.decoder.config, self.walks[0].entering[-1].ran
        return prompt_flops(config, ran) < prompt_flops(config, now)

    def take(self, chosen: Measured) -> None:
        """Carry all samples through the layers under the chosen schedule; the next ones are measured from there."""
        start = chosen.schedule.first_change(self.taken.schedule)
        self.walks = [carried(self.decoder, walked, chosen.schedule.method(), start) for walked in self.walks]
        self.taken = chosen


def carried(decoder: Decoder, walked: Walk, method: Method, start: int) -> Walk:
    """A walk whose tokens enter the layers after `start` as they do under a method that changes nothing before it."""
    prompt, said = from_layer(decoder, walked, start)
    entering, following = walked.entering[: start + 1], walked.following[: start + 1]
    for index in range(start, len(decoder.layers)):
        prompt = forward(decoder, prompt, method, start=index, stop=index + 1)
        entering.append(prompt)
        if said:
            said = forward(decoder, said, method, start=index, stop=index + 1)
        following.append(said.hidden if said else walked.following[index + 1])
    return walked._replace(entering=entering, following=following)


def every_step(layers: int, leaves: int) -> list[tuple]:
    """All steps that a search may take, as what is put in place of what: ("frozen", layer), ("leaves",), ("thinned", text)."""
    thinners = [
        f"{name}:layer={layer},keep={keep:g}"
        for name in THINNERS
        for layer in range(1, leaves, max(1, layers // 12))
        for keep in KEPT
    ]
    freezes = [("frozen", layer) for layer in range(leaves)]
    return [*freezes, ("leaves",), *(("thinned", text) for text in thinners)]


def after(schedule: Schedule, step: tuple) -> Schedule | None:
    """The schedule one step further; None where the step has nothing left to change."""
    match step:
        case ("frozen", layer):
            frozen = schedule.frozen | {layer}
            return schedule._replace(frozen=frozen) if layer < schedule.leaves and frozen != schedule.frozen else None
        case ("leaves",):
            frozen = frozenset(layer for layer in schedule.frozen if layer < schedule.leaves - 1)
            return schedule._replace(leaves=schedule.leaves - 1, frozen=frozen) if schedule.leaves else None
        case _:
            return None if schedule.thinned == step[1] else schedule._replace(thinned=step[1])


def price(measured: Measured, taken: Measured, goal: float) -> float:
    """What a step changes for each share of the FLOPs that it saves, up to the goal; infinite where it saves none."""
    gained = min(measured.saved, goal) - taken.saved
    return max(measured.changed - taken.changed, NOISE) / gained if gained > 0 else np.inf


def sifted(bench: Bench, leaves: int, goal: float) -> list[tuple[float, int, tuple]]:
    """A heap of (price, a number, step) of all steps, measured on every third sample."""
    start, queue = bench.measure(bench.taken.schedule, SIFTING), []
    for number, step in enumerate(every_step(bench.decoder.config.layers, leaves)):
        schedule = after(bench.taken.schedule, step)
        if schedule:
            queue.append((price(bench.measure(schedule, SIFTING), start, goal), number, step))
    heapq.heapify(queue)
    return queue


def cheapest_step(bench: Bench, queue: list[tuple[float, int, tuple]], goal: float) -> Measured | None:
    """Measure steps in the order of their last price until the cheapest is one that was measured just now.

    queue: a heap of (price, a number, step), which keeps the new prices.
    """
    fresh: dict[tuple, Measured] = {}
    while queue:
        last, number, step = heapq.heappop(queue)
        if step in fresh:
            if step == ("leaves",):  # can be taken again
                heapq.heappush(queue, (last, number, step))
            return fresh[step]
        schedule = after(bench.taken.schedule, step)
        if schedule is None or not bench.saves_more(schedule):
            continue
        measured = bench.measure(schedule)
        if measured.saved > bench.taken.saved:
            fresh[step] = measured
            heapq.heappush(queue, (price(measured, bench.taken, goal), number, step))
    return None


def tails(bench: Bench, leaves: int, goal: float, most: float) -> Iterator[Measured]:
    """Contiguous schedules, frozen from a layer up to `leaves` or withdrawn earlier: those that change `most` at most.

    Of either kind they come in the order of what they save, up to the first that reaches the goal.
    """
    frozen = (Schedule(leaves, frozenset(range(first, leaves))) for first in reversed(range(leaves)))
    for kind in (frozen, map(Schedule, reversed(range(leaves)))):
        for measured in map(bench.measure, kind):
            if measured.changed <= most:
                yield measured
            if measured.changed > most or measured.saved >= goal:
                break


def search(
    decoder: Decoder,
    walks: Sequence[Walk],
    leaves: int,
    save: float | None = None,
    threshold: float | None = None,
    progress: Callable[[int], None] = lambda tried: None,
) -> tuple[list[Measured], int]:
    """The path of a greedy search: schedules, each saving more than the one before, and last the one looked for.

    walks: samples with their whole answers (`search.walk`); leaves: the K to start from; save: stop as soon as this
    share of the prefill FLOPs is saved; threshold: stop before more than this share of the tokens changes. A contiguous
    schedule that saves enough as well and changes fewer takes the last place. Returns the path, and how many schedules
    were measured. Raises InputError where `save` cannot be reached.
    """
    bench = Bench(decoder, walks, Schedule(leaves), progress)
    goal, most = (np.inf if limit is None else limit for limit in (save, threshold))
    rivals = list(tails(bench, leaves, goal, most))  # now, where the samples enter their deep layers as they are
    path, queue = [bench.taken], sifted(bench, leaves, goal)
    while bench.taken.saved < goal:
        measured = cheapest_step(bench, queue, goal)
        if measured is None or measured.changed > most:
            break
        bench.take(measured)
        path.append(measured)
    enough, taken = (bench.taken.saved if save is None else save), bench.taken
    better = [one for one in rivals if one.saved >= enough and (one.changed < taken.changed or taken.saved < enough)]
    if taken.saved < enough and not better:
        raise InputError(f"no schedule within the threshold saves {enough:.0%}; the search ends at {taken.saved:.1%}")
    return [*path, *sorted(better, key=lambda one: -one.changed)], bench.tried
