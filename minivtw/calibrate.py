"""Find where the visual tokens can be spared: python -m minivtw.calibrate [MODEL] [--save 40%] [--store]

Without `--save` or `--schedule` it finds K, the layer before which they can all leave; with them, a schedule: what each
layer does with them, so that a share of the prefill's operations is saved, or as much as a threshold allows.
"""

import argparse
import json

import numpy as np

from . import load
from .checkpoints.files import file_of
from .checkpoints.stored import STORED, fingerprint, stored_search
from .cli.options import Parser
from .cli.terminal import command, progress_line
from .cli.writing import check_writable, replace_file, write_whole
from .errors import InputError, reading
from .inputs.files import text_of
from .inputs.questions import check_questions, digest, read_questions
from .methods.text import spec_of
from .search.layer import CRITERIA, LONGEST_ANSWER, choose, mean_curve, run_in_full, walked_curve
from .search.schedule import FIRST, SampleChange, search

SAMPLES = 20
CHANGED = 0.01  # of the answers' tokens, by a schedule that is to save as much as it can


def embedded(vlm, samples, progress=lambda done: None):
    """The samples as the decoder gets them, one after the other."""
    for done, sample in enumerate(samples, 1):
        prompt = vlm.prepare(sample.image, sample.question)
        yield vlm.embed(prompt)._replace(tower=None)  # no search asks it, and it holds more than all else
        progress(done)


def calibrate(vlm, samples, criterion="kl", threshold=None, progress=lambda done: None):
    """Find K on samples, a list of `Question`. Returns what `withdrawal.json` holds.

    `curve` has one value a layer, the mean over the samples of what `search.CRITERIA` defines; the threshold is, unless
    given, the one by which the stored layer was found, or else the criterion's own. Raises InputError for a picture
    that cannot be read, and where no layer meets the threshold.
    """
    if threshold is None:
        stored = stored_search(vlm.folder)
        is_same = stored.get("criterion") == criterion and isinstance(stored.get("threshold"), int | float)
        threshold = stored["threshold"] if is_same else CRITERIA[criterion].threshold
    curve = mean_curve(vlm.decoder, embedded(vlm, samples, progress), criterion, vlm.stop_ids)
    return {
        "withdraw_layer": choose(curve, criterion, threshold),
        "criterion": criterion,
        "threshold": threshold,
        "curve": [float(f"{value:.6g}") for value in curve],
        "samples": {"count": len(samples), "sha256": digest(samples)},
    }


def find_schedule(vlm, samples, save=None, threshold=None, measured=None, progress=lambda done: None):
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
    first = [run_in_full(vlm.decoder, prompt, LONGEST_ANSWER, vlm.stop_ids) for prompt in prompts[:FIRST]]

    # Every schedule is measured on the first; keeping them all would take 20 MB each on minivtw-smol.
    def walked(index):
        return (
            first[index]
            if index < len(first)
            else run_in_full(vlm.decoder, prompts[index], LONGEST_ANSWER, vlm.stop_ids)
        )

    curve = np.mean([walked_curve(vlm.decoder, one) for one in first], axis=0)
    limit = CHANGED if threshold is None and save is None else threshold
    leaves = choose(curve, "answer", CRITERIA["answer"].threshold)
    path = search(vlm.decoder, prompts, walked, leaves, save, limit, known, progress)
    return {
        "method": spec_of(path[-1].schedule.method()),
        "criterion": "schedule",
        "save": save,
        "threshold": limit,
        "changed": float(f"{path[-1].changed:.6g}"),
        "saved": float(f"{path[-1].saved:.6g}"),
        "path": [[spec_of(one.schedule.method()), round(one.changed, 6), round(one.saved, 4)] for one in path],
        "tried": len({method for _, method in known}),
        "curve": [float(f"{value:.6g}") for value in curve],
        "samples": about,
    }


class Notebook(dict):
    """What a search has measured, for `schedules.Trials`, kept in a file too: a line each, after a first one about what.

    Raises InputError for a file that holds anything else.
    """

    def __init__(self, path, about):
        super().__init__()
        self._path, first = check_writable(path), json.dumps(about) + "\n"
        text = text_of(path) if self._path.exists() else ""
        if not (text.startswith(first) or first.startswith(text)):
            raise InputError(f"{path} does not hold what was measured with this model on these samples")
        whole = text[: text.rfind("\n") + 1] or first  # without a line that was not finished
        for number, line in enumerate(whole.split("\n")[1:-1], 2):
            try:
                index, method, *seen = json.loads(line)
                changed, flops, plain = seen
                is_typed = [type(value) for value in (index, method, *seen)] == [int, str, float, int, int]
                if not (is_typed and index >= 0 <= changed < 1.001 and 0 < flops < 2**63 and 0 < plain < 2**63):
                    raise ValueError("no measurement")
            except (ValueError, TypeError, RecursionError) as error:
                raise InputError(f"{path}, line {number}: is not what --measured writes") from error
            super().__setitem__((index, method), SampleChange(*seen))
        write_whole(path, whole)

    def __setitem__(self, key, seen):
        super().__setitem__(key, seen)
        with reading(self._path, "write"), open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps([*key, *seen]) + "\n")


def path_table(found, layers):
    """The search's path as text, a line a schedule."""
    rows = [
        f"{changed:8.2%} of tokens changed {saved:7.1%} saved   {method}" for method, changed, saved in found["path"]
    ]
    heading = f"schedules on {found['samples']['count']} samples: {found['tried']} measured, of 2^{layers} sets of layers alone"
    return "\n".join([heading, *rows])


def share(text):
    """40% or 0.4 as a number."""
    value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"is a share between 0 and 1, such as 40%, not {text}")
    return value


def table(found, unit):
    """The curve as text, a line a layer, with a mark where the visual tokens leave."""
    rows = [f"layer {layer:3}  {value:10.6f}" for layer, value in enumerate(found["curve"])]
    rows[found["withdraw_layer"]] += "  <- the visual tokens leave before this layer"
    heading = (
        f"{found['criterion']} ({unit}), mean of {found['samples']['count']} samples, threshold {found['threshold']:g}"
    )
    return "\n".join([heading, *rows])


def main(arguments):
    options = Parser(prog="minivtw.calibrate", description="Find where a model can spare its visual tokens.")
    add = options.add_argument
    add("model", nargs="?", metavar="MODEL", help="a model folder (default: the embedded model)")
    add(
        "--samples", metavar="DIR",
        help="holds questions.jsonl (image, question) and the pictures (default: samples/ in the model folder)",
    )  # fmt: skip
    add("--criterion", choices=tuple(CRITERIA), default="kl", help="(default: kl, the paper's)")
    defaults = ", ".join(f"{criterion.threshold:g} for {name}" for name, criterion in CRITERIA.items())
    add(
        "--threshold", "--eta", type=float, metavar="ETA",
        help=f"what a layer must meet (default: that of the stored layer, or else {defaults}); with --save or --schedule "
        f"the share of the answers' tokens that may change (default: {CHANGED:g} for --schedule, none for --save)",
    )  # fmt: skip
    add("--limit", type=int, default=SAMPLES, metavar="N", help=f"use the first N samples (default: {SAMPLES})")
    add("--save", type=share, metavar="40%%", help="find a schedule that saves this share of the prefill's operations")
    add("--schedule", action="store_true", help="find the schedule that saves the most within the threshold")
    add("--measured", metavar="FILE", help="keep what a search for a schedule measures, and go on from what this holds")
    add("--store", action="store_true", help="store what was found with the model, for `--withdraw auto`")
    add("--json", action="store_true", help="print one JSON object")
    chosen = options.parse_args(arguments)
    if chosen.threshold is not None and not 0 <= chosen.threshold < float("inf"):
        raise InputError(f"--threshold must be 0 or more, not {chosen.threshold:g}")
    if chosen.limit < 1:
        raise InputError(f"--limit must be 1 or more, not {chosen.limit}")

    if chosen.measured is not None and not (chosen.save or chosen.schedule):
        raise InputError("--measured keeps what --save or --schedule measures")

    vlm = load(chosen.model)
    if chosen.store:
        check_writable(vlm.folder / STORED)
        file_of(vlm.folder, STORED)  # refuses what would not be read there, such as a link out of the folder
    folder = chosen.samples or vlm.folder / "samples"
    if chosen.samples is None and not folder.is_dir():
        raise InputError(f"{vlm.folder} ships no samples; give a folder of them with --samples")
    samples = read_questions(folder, most=chosen.limit)
    check_questions(vlm, samples)
    if chosen.save or chosen.schedule:
        found = find_schedule(
            vlm, samples, chosen.save, chosen.threshold, chosen.measured, progress_line(what="answers measured")
        )
        text = path_table(found, vlm.config.layers)
    else:
        found = calibrate(vlm, samples, chosen.criterion, chosen.threshold, progress_line(len(samples)))
        text = table(found, CRITERIA[chosen.criterion].unit)
    if chosen.store:
        replace_file(vlm.folder / STORED, json.dumps(found, indent=1) + "\n")
    if chosen.json:
        print(json.dumps(found))
        return
    print(text)
    print(f"stored in {vlm.folder / STORED}" if chosen.store else "nothing stored; --store does that")


if __name__ == "__main__":
    command(main)
