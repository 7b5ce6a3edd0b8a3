"""The searches on a model's samples, as `minivtw.calibrate` runs and stores them, and the file that a long one keeps."""

import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np

from ..checkpoints.files import read_fields
from ..checkpoints.stored import STORED, fingerprint
from ..errors import InputError, reading
from ..inputs.files import text_of
from ..inputs.questions import Question, digest
from ..inputs.writing import check_writable, write_whole
from ..model.tokens import EmbeddedPrompt
from ..vlm import VLM
from .layer import CRITERIA, LONGEST_ANSWER, choose_layer, kl_curve_of, mean_curve, run_in_full
from .schedule import FIRST, SampleChange, Schedule, Trials, search

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
    measured: str | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Find a schedule on samples, from the K on by which whole answers hold. Returns what `withdrawal.json` holds.

    save: the share of the prefill FLOPs to save; threshold: the share of the answers' tokens that may change (default:
    none if `save` is given, else 0.01); measured: a file that keeps what is measured, from which the search goes on. K is
    found by the whole answers and that criterion's own threshold, on the samples that a race begins with. Raises
    InputError.
    """
    about = {"count": len(samples), "sha256": digest(samples)}
    known = {} if measured is None else Notebook(measured, {"model": fingerprint(vlm.folder), "samples": about})
    mixed = [samples[index] for index in np.random.default_rng(0).permutation(len(samples))]
    prompts = list(embedded(vlm, mixed))
    run = partial(run_in_full, vlm.decoder, most_tokens=LONGEST_ANSWER, stop_ids=vlm.stop_ids)
    # Every schedule is measured on the first; keeping them all would take 20 MB each on minivtw-smol.
    first = [run(prompt) for prompt in prompts[:FIRST]]
    full_run = lambda index: first[index] if index < len(first) else run(prompts[index])
    curve = np.mean([kl_curve_of(vlm.decoder, one) for one in first], axis=0)
    leaves = choose_layer(curve, "answer", CRITERIA["answer"].threshold)
    limit = CHANGED if threshold is None and save is None else threshold
    path = search(Trials(vlm.decoder, prompts, full_run, Schedule(leaves), known, progress), save, limit)
    steps = [[one.schedule.method().spec, round(one.changed, 6), round(one.saved, 4)] for one in path]
    return {
        "method": steps[-1][0],
        "criterion": "schedule",
        "save": save,
        "threshold": limit,
        "changed": float(f"{path[-1].changed:.6g}"),
        "saved": float(f"{path[-1].saved:.6g}"),
        "path": steps,
        "tried": len({method for _, method in known}),
        "curve": [float(f"{value:.6g}") for value in curve],
        "samples": about,
    }


class Notebook(dict[tuple[int, str], SampleChange]):
    """What a search has measured, for `schedule.Trials`, kept in a file too: a line each, after a first one about what.

    Raises InputError for a file that holds anything else.
    """

    def __init__(self, path: str, about: dict[str, Any]) -> None:
        super().__init__()
        self._path, first = check_writable(path), json.dumps(about) + "\n"
        text = text_of(path) if self._path.exists() else ""
        if not (text.startswith(first) or first.startswith(text)):
            raise InputError(f"{path} does not hold what was measured with this model on these samples")
        whole = text[: text.rfind("\n") + 1] or first  # without a line that was not finished
        for number, line in enumerate(whole.split("\n")[1:-1], 2):
            try:
                index, method, changed, flops, plain = json.loads(line)
                change = SampleChange(float(changed), int(flops), int(plain))
                if not (0 <= change.changed <= 1 and min(change.flops, change.plain) > 0):
                    raise ValueError
                super().__setitem__((index, method), change)
            except (ValueError, TypeError, OverflowError, RecursionError) as error:
                raise InputError(f"{path}, line {number}: is not what --measured writes") from error
        write_whole(path, whole)

    def __setitem__(self, key: tuple[int, str], change: SampleChange) -> None:
        super().__setitem__(key, change)
        with reading(self._path, "write"), open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps([*key, *change]) + "\n")
