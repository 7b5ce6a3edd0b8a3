"""Which layers: the search for a schedule, for what each layer does with each visual token: work on it, read it, do without.

A schedule thins the visual tokens out before one layer, freezes what is left of them in some layers, and withdraws them
before layer K. There are 2^K sets of layers to freeze alone, so nobody tries all. From withdrawal at the first K that
costs next to nothing the search goes in three steps.

    order   freeze each layer alone: what that changes tells in which order to freeze them
    race    every place and share of thinning out, completed by as many frozen layers, in this order, as the goal needs
    change  one thing about the winner (a layer frozen or worked on, the place, the share, K), again completed to the
            goal; the winner of these runs on, until no change is better

What a schedule costs is measured on samples: how far the distributions of the answer's tokens move from those of the model
that is left alone (total variation), in the mean over an answer's tokens and over the samples. Unlike a divergence it
has an end, so that one lost answer is one lost answer; and a long answer counts as much as a word. Most schedules are
clearly worse on a few samples, and the best differ by less than few samples tell: so a race begins on a few, drops the
worse half, and doubles the samples (successive halving: Jamieson and Talwalkar, arXiv 1502.07943). Up to the first
layer that a schedule changes, a sample runs once for all of them.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import cache
from itertools import islice
from typing import NamedTuple

import numpy as np

from ..counting import plain_run, prompt_flops
from ..errors import InputError
from ..methods.shelf import method_of
from ..methods.text import Method, NamedMethod
from ..methods.withdrawal import freeze, then, withdraw
from ..model.decoder import Decoder
from ..model.tokens import EmbeddedPrompt, LayerCount
from .layer import FullRun, logits_from_layer, total_variation

NOISE = 1e-4  # of the tokens: who changes no more than this, beyond what the start changes, is as good as the start
FIRST = 35  # samples that a race begins with
ROUNDS = 3  # races among what is one change away, at most
THINNERS = ("uniform", "looked_at")  # methods of the shelf
KEPT = (0.75, 0.6, 0.5)  # shares of the visual tokens that thinning out may keep
FINER = 0.05  # ... and by how much a change moves them
GOALS = tuple(round(0.05 * step, 2) for step in range(1, 20))  # shares to save, where only a threshold is given


class Pruning(NamedTuple):
    """A method of the shelf that keeps some of the visual tokens before one layer."""

    name: str
    layer: int
    keep: float

    def method(self) -> Method:
        return method_of(f"{self.name}:layer={self.layer},keep={self.keep:g}")


class Schedule(NamedTuple):
    """What happens to the visual tokens on their way."""

    leaves: int  # K, the layer before which they all leave
    frozen: frozenset[int] = frozenset()  # layers before K in which they are read, and not worked on
    thinned: Pruning | None = None

    def method(self) -> NamedMethod:
        """The schedule as a method, which is stored and used by its text."""
        steps = [self.thinned.method()] if self.thinned else []
        steps += [freeze(self.frozen)] if self.frozen else []
        return then(*steps, withdraw(self.leaves)) if steps else withdraw(self.leaves)

    def leaving(self, layer: int) -> "Schedule":
        """The same, with another K."""
        thinned = self.thinned if self.thinned and self.thinned.layer < layer else None
        return Schedule(layer, frozenset(one for one in self.frozen if one < layer), thinned)


class SampleChange(NamedTuple):
    """What a schedule did to one sample."""

    changed: float  # share of the answer's tokens, from 0 to 1
    flops: int  # of the prefill
    plain: int  # ... with everything left as it is


class Trial(NamedTuple):
    """What a schedule changes and saves on the samples that it was measured on."""

    schedule: Schedule
    changed: float  # share of the answers' tokens, from 0 to 1
    saved: float  # share of the prefill FLOPs
    cost: float  # what it changes beyond the start, on the same samples; `NOISE` at the least


class Trials:
    """Samples, and what every schedule has changed on the first of them, as far as it was measured.

    prompts: the samples, in no particular order; full_run: a sample's index -> its `FullRun`; start: the schedule to
    start from; known: (index, a schedule's text) -> `SampleChange`, what was measured before; it is added to.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[EmbeddedPrompt],
        full_run: Callable[[int], FullRun],
        start: Schedule,
        known: dict[tuple[int, str], SampleChange] | None = None,
        progress: Callable[[int], None] = lambda done: None,
    ):
        self.decoder, self.count, self._full_run, self._progress = decoder, len(prompts), full_run, progress
        self.known = {} if known is None else known
        self._start_text = start.method().spec
        self.start = self.measure([start], self.count)[0]
        lengths = [(int(one.is_visual.sum()), len(one.hidden)) for one in prompts]
        self._lengths, self._longest = Counter(lengths), max(range(self.count), key=lambda one: lengths[one][1])
        self._left_by = cache(self._left)

    def measure(self, schedules: Iterable[Schedule], count: int) -> list[Trial]:
        """Schedules on the first `count` samples."""
        texts = {schedule: schedule.method().spec for schedule in schedules}
        for index in range(count):
            if new := [schedule for schedule, text in texts.items() if (index, text) not in self.known]:
                full_run = self._full_run(index)
                for schedule in new:
                    self.known[index, texts[schedule]] = self.change(full_run, schedule)
                self._progress(len(self.known))
        means = [np.mean([self.known[index, text] for index in range(count)], axis=0) for text in texts.values()]
        at_start = np.mean([self.known[index, self._start_text].changed for index in range(count)])
        return [
            Trial(schedule, float(changed), float(1 - flops / plain), max(float(changed - at_start), NOISE))
            for schedule, (changed, flops, plain) in zip(texts, means)
        ]

    def change(self, full_run: FullRun, schedule: Schedule) -> SampleChange:
        """A schedule on one sample, from the first layer on that it treats otherwise."""
        config = self.decoder.config
        said, ran = logits_from_layer(self.decoder, full_run, schedule.method())
        changed, plain = total_variation(said, full_run.full).mean(), plain_run(config, len(full_run.entering[0]))
        return SampleChange(float(changed), prompt_flops(config, ran), prompt_flops(config, plain))

    def _left(self, thinned: Pruning | None) -> list[tuple[float, int]]:
        """What thinning out alone leaves in each layer: the share of the visual tokens, and the FLOPs that it asks for."""
        if thinned is None:
            return [(1.0, 0)] * self.decoder.config.layers
        full_run = self._full_run(self._longest)
        _, ran = logits_from_layer(self.decoder, full_run, thinned.method())
        tokens, visual = len(full_run.entering[0]), max(1, int(full_run.entering[0].is_visual.sum()))
        return [(1 - (tokens - one.entered) / visual, one.extra_flops) for one in ran]

    def saved(self, schedule: Schedule) -> float:
        """What a schedule saves on all samples, counted from their lengths and from one run of what it thins out."""
        config, flops, plain = self.decoder.config, 0, 0
        for (visual, tokens), times in self._lengths.items():
            text, ran = tokens - visual, []
            for layer, (share, extra) in enumerate(self._left_by(schedule.thinned)):
                left = round(visual * share) if layer < schedule.leaves else 0
                ran.append(LayerCount(text + left, text + left * (layer not in schedule.frozen), text + left, extra))
            flops += times * prompt_flops(config, ran)
            plain += times * prompt_flops(config, plain_run(config, tokens))
        return 1 - flops / plain

    def fitted(self, schedule: Schedule, order: Sequence[int], goal: float, held: Collection[int] = ()) -> Schedule:
        """Freeze layers in this order until the goal is reached, then work again on the last that it does not need.

        What the `held` layers do stays as it is. Where all are frozen and it is not enough, K becomes smaller.
        """
        free = [layer for layer in order if layer < schedule.leaves and layer not in held]
        for layer in free:
            if self.saved(schedule) >= goal:
                break
            schedule = schedule._replace(frozen=schedule.frozen | {layer})
        for layer in reversed(free):
            thawed = schedule._replace(frozen=schedule.frozen - {layer})
            if layer in schedule.frozen and self.saved(thawed) >= goal:
                schedule = thawed
        if self.saved(schedule) < goal and schedule.leaves:
            return self.fitted(schedule.leaving(schedule.leaves - 1), order, goal, held)
        return schedule


def freezing_order(trials: Trials, leaves: int) -> list[int]:
    """The layers before `leaves`, first the one in which freezing alone changes the fewest tokens; of equals the deepest."""
    alone = [Schedule(leaves, frozenset([layer])) for layer in reversed(range(leaves))]
    measured = trials.measure(alone, min(2 * FIRST, trials.count))
    return [layer for one in sorted(measured, key=lambda one: one.cost) for layer in one.schedule.frozen]


def contiguous(trials: Trials, leaves: int, goal: float) -> Iterator[Schedule]:
    """The two that a race has to beat: frozen from one layer on up to `leaves`, and withdrawn earlier."""
    frozen = (Schedule(leaves, frozenset(range(first, leaves))) for first in reversed(range(leaves)))
    for kind in (frozen, map(Schedule, reversed(range(leaves)))):
        yield from islice((one for one in kind if trials.saved(one) >= goal), 1)


def candidates(layers: int, leaves: int) -> Iterator[Schedule]:
    """Every place and share of thinning out, at every twelfth of the depth, and no thinning out; nothing frozen yet."""
    yield Schedule(leaves)
    for name in THINNERS:
        for layer in range(1, leaves, max(1, layers // 12)):
            yield from (Schedule(leaves, thinned=Pruning(name, layer, keep)) for keep in KEPT)


def neighbours(trials: Trials, schedule: Schedule, order: Sequence[int], goal: float) -> Iterator[Schedule]:
    """What is one change away from a schedule, each completed to the goal by what costs least."""
    leaves, frozen, thinned = schedule
    for layer in order:
        if layer < leaves:
            yield trials.fitted(schedule._replace(frozen=frozen ^ {layer}), order, goal, [layer])
    depth = trials.decoder.config.layers
    changed = [schedule.leaving(layer) for layer in (leaves - 1, leaves + 1) if 0 <= layer <= depth]
    if thinned:
        places = [thinned._replace(layer=thinned.layer + step) for step in (-2, -1, 1, 2)]
        shares = [thinned._replace(keep=round(thinned.keep + step * FINER, 2)) for step in (-2, -1, 1, 2)]
        others = [thinned._replace(name=name) for name in THINNERS]
        valid = [one for one in (*places, *shares, *others) if 0 < one.layer < leaves and 0 < one.keep < 1]
        changed += [schedule._replace(thinned=one) for one in valid]
    yield from (trials.fitted(one, order, goal) for one in changed)


def race(trials: Trials, runners: Iterable[Schedule], goal: float, staying: Collection[Schedule] = ()) -> Trial:
    """The schedule that changes the fewest tokens on all samples, of those that save enough there.

    The worse half leaves each time that the samples are doubled; who is `staying` is measured on all, and wins where it
    is as good as any. Of other equals, one that thins nothing out wins.
    """

    def rank(one: Trial) -> tuple:
        return one.saved < goal, one.cost, one.schedule not in staying, one.schedule.thinned is not None

    left, count = list(dict.fromkeys([*runners, *staying])), min(FIRST, trials.count)
    while count < trials.count:
        ranked = sorted(trials.measure(left, count), key=lambda one: one.cost)
        half = [one.schedule for one in ranked[: (len(ranked) + 1) // 2]]
        left, count = list(dict.fromkeys([*half, *staying])), min(2 * count, trials.count)
    return min(trials.measure(left, count), key=rank)


def reach(trials: Trials, goal: float) -> list[Trial]:
    """Where the search starts and the winners of the races for one goal, the best last."""
    path, leaves = [trials.start], trials.start.schedule.leaves
    if trials.start.saved >= goal:
        return path
    order = freezing_order(trials, leaves)
    runners = [trials.fitted(one, order, goal) for one in candidates(trials.decoder.config.layers, leaves)]
    path.append(race(trials, runners, goal, list(contiguous(trials, leaves, goal))))
    for _ in range(ROUNDS):
        best = path[-1].schedule
        winner = race(trials, neighbours(trials, best, order, goal), goal, [best])
        if winner.schedule == best:
            break
        path.append(winner)
    return path


def within(trials: Trials, most: float) -> list[Trial]:
    """The path to the greatest of the `GOALS` that is reached with at most this change, by halving their interval."""
    path, low, high = [trials.start], bisect_right(GOALS, trials.start.saved), len(GOALS)
    while low < high:
        middle = (low + high) // 2
        tried = reach(trials, GOALS[middle])
        if tried[-1].changed <= most and tried[-1].saved >= GOALS[middle]:
            path, low = tried, middle + 1
        else:
            high = middle
    return path


def search(trials: Trials, save: float | None = None, threshold: float | None = None) -> list[Trial]:
    """The winners of the races, the schedule looked for last.

    save: the share of the prefill FLOPs to save; threshold: the share of the answers' tokens that may change. Without
    `save`, as much is saved as the threshold allows, in steps of five per cent. Raises InputError where that share
    cannot be reached.
    """
    most = np.inf if threshold is None else threshold
    if save is None:
        return within(trials, most)
    path = reach(trials, save)
    if path[-1].saved < save:
        raise InputError(f"no schedule saves {save:.0%}; the search ends at {path[-1].saved:.1%}")
    if path[-1].changed > most:
        raise InputError(f"no schedule within the threshold saves {save:.0%}; the best changes {path[-1].changed:.2%}")
    return path
