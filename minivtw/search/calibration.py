"""The searches on a model's samples, as `minivtw.calibrate` runs and stores them."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from ..checkpoints.files import read_fields
from ..checkpoints.stored import STORED
from ..errors import InputError
from ..inputs.questions import Question, digest
from ..model.tokens import EmbeddedPrompt
from ..vlm import VLM
from .layer import CRITERIA, LONGEST_ANSWER, changed_curve, choose_layer, first_at_most, mean_curve, run_in_full
from .schedule import STEPS, Trial, search

NOTICED = 0.01  # of the answers' tokens: more than withdrawal before the last layer changes
PLACES = 3  # layers that are tried as K
CHANGED = 0.01  # of the answers' tokens, by a schedule that is to save as much as it can


def embedded(
    vlm: VLM, samples: Iterable[Question], progress: Callable[[int], None] = lambda done: None
) -> Iterator[EmbeddedPrompt]:
    """The samples as the decoder gets them, one after the other."""
    for done, sample in enumerate(samples, 1):
        prompt = vlm.prepare(sample.image, sample.question)
        yield vlm.embed(prompt)._replace(tower=None)  # no search asks it, and it holds more than all else
        progress(done)


def calibrate(
    vlm: VLM,
    samples: list[Question],
    criterion: str = "kl",
    threshold: float | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Find K on samples, a list of `Question`. Returns what `withdrawal.json` holds.

    `curve` has one value per layer, the mean over the samples of what `search.CRITERIA` defines; the threshold is, unless
    given, the one by which the stored layer was found, or else the criterion's own. Raises InputError for an image
    that cannot be read, and where no layer meets the threshold.
    """
    if threshold is None:
        stored = read_fields(vlm.folder, STORED, optional=True)
        is_same = stored.raw("criterion") == criterion and isinstance(stored.raw("threshold"), int | float)
        threshold = stored.raw("threshold") if is_same else CRITERIA[criterion].threshold
    curve = mean_curve(vlm.decoder, embedded(vlm, samples, progress), criterion, vlm.stop_ids)
    return {
        "withdraw_layer": choose_layer(curve, criterion, threshold),
        "criterion": criterion,
        "threshold": threshold,
        "curve": [float(f"{value:.6g}") for value in curve],
        "samples": {"count": len(samples), "sha256": digest(samples)},
    }


def find_schedule(
    vlm: VLM,
    samples: list[Question],
    save: float | None = None,
    threshold: float | None = None,
    progress: Callable[[int], None] = lambda done: None,
    announce: Callable[[float], None] = lambda seconds: None,
) -> dict[str, Any]:
    """Find a schedule on samples. Returns what `withdrawal.json` holds.

    K is the best of three layers, the first of them where withdrawal alone changes at most 1 % more of the answers'
    tokens than before the last layer.

    save: the share of the prefill FLOPs to save; threshold: the share of the answers' tokens that may change (default:
    none if `save` is given, else 0.01). After the first sample `announce` is told how many seconds all will take,
    `progress` how many samples have been run, first in full and then under each schedule. Raises InputError.
    """
    curves, first = [], []
    for done, prompt in enumerate(embedded(vlm, samples), 1):
        began = time.monotonic()
        full_run = run_in_full(vlm.decoder, prompt, LONGEST_ANSWER, vlm.stop_ids)
        ran = time.monotonic()
        curves.append(changed_curve(vlm.decoder, full_run))
        if done == 1:
            announce(len(samples) * (time.monotonic() - began + PLACES * STEPS * (ran - began)))
        # No schedule begins deeper than layer 1, and the states of all layers take much memory.
        first.append(full_run._replace(entering=full_run.entering[:2], answer_states=full_run.answer_states[:2]))
        progress(done)
    curve = np.mean(curves, axis=0)
    limit = CHANGED if threshold is None and save is None else threshold
    earliest, runs = first_at_most(curve, curve[-1] + NOTICED) or 0, len(samples)
    paths: list[list[Trial]] = []
    refused: list[InputError] = []

    def tell(_: int) -> None:
        nonlocal runs
        runs += len(samples)
        progress(runs)

    for leaves in range(earliest, min(earliest + PLACES, len(curve))):
        try:
            paths.append(search(vlm.decoder, first, leaves, save, limit, tell))
        except InputError as error:
            refused.append(error)
    if not paths:
        raise refused[0]
    paths.sort(key=lambda path: path[-1].saved if save is None else -path[-1].changed)
    path = sum(paths, start=[])
    return {
        "method": path[-1].method.spec,
        "criterion": "schedule",
        "save": save,
        "threshold": limit,
        "changed": float(f"{path[-1].changed:.6g}"),
        "saved": float(f"{path[-1].saved:.6g}"),
        "path": [[one.method.spec, round(one.changed, 6), round(one.saved, 4)] for one in path],
        "curve": [float(f"{value:.6g}") for value in curve],
        "samples": {"count": len(samples), "sha256": digest(samples)},
    }
