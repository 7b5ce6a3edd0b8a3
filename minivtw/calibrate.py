"""Find where the visual tokens can be spared: python -m minivtw.calibrate [MODEL] [--save 40%] [--store]

Without `--save` or `--schedule` it finds K, the layer before which they can all leave; with them, a schedule: what each
layer does with them, so that a share of the prefill's operations is saved, or as much as a threshold allows.
"""

import argparse
import json
import math
import sys
from typing import Any

from . import load
from .checkpoints.stored import STORED, check_storable, store
from .cli.options import Parser
from .cli.terminal import BAR, command, progress_line, say
from .errors import InputError
from .inputs.questions import check_questions, read_questions
from .search.calibration import CHANGED, calibrate, find_schedule
from .search.layer import CRITERIA

SAMPLES = 20


def path_table(found: dict[str, Any]) -> str:
    """What was tried as text, one line per schedule."""
    rows = [f"{changed:8.2%} of tokens changed {saved:7.1%} saved   {spec}" for spec, changed, saved in found["path"]]
    return "\n".join([f"schedules on {found['samples']['count']} samples, the one found last:", *rows])


def share(text: str) -> float:
    """40% or 0.4 as a number."""
    value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"is a share between 0 and 1, such as 40%, not {text}")
    return value


def curve_table(found: dict[str, Any], unit: str) -> str:
    """The curve as text, one line per layer with a bar on a logarithmic scale, and a mark where the visual tokens leave."""
    curve = found["curve"]
    lowest = max(min(curve), 1e-6 * max(curve), 1e-12)  # which has no bar
    decades = [math.log10(max(value, lowest) / lowest) for value in curve]
    bars = ["#" * round(BAR * length / (max(decades) or 1)) for length in decades]
    rows = [f"layer {layer:3}  {value:10.6f}  {line}".rstrip() for layer, (value, line) in enumerate(zip(curve, bars))]
    rows[found["withdraw_layer"]] += "  <- the visual tokens leave before this layer"
    mean = f"mean of {found['samples']['count']} samples, threshold {found['threshold']:g}"
    return "\n".join([f"{found['criterion']} ({unit}), {mean}", *rows])


def announce(seconds: float) -> None:
    """Say on a terminal how long a search will take; elsewhere standard error is for what goes wrong."""
    if sys.stderr.isatty():
        say(f"the search takes about {seconds / 60:.0f} minutes")


def main(arguments: list[str]) -> None:
    options = Parser(prog="minivtw.calibrate", description="Find where a model can spare its visual tokens.")
    add = options.add_argument
    add("model", nargs="?", metavar="MODEL", help="a model folder (default: the embedded model)")
    add("--samples", metavar="DIR", help="a folder with questions.jsonl and images (default: the model's samples/)")
    add("--criterion", choices=tuple(CRITERIA), default="kl", help="(default: kl, the paper's)")
    defaults = ", ".join(f"{criterion.threshold:g} for {name}" for name, criterion in CRITERIA.items())
    eta = f"what a layer must meet (default: that of the stored layer, or else {defaults}); with --save or --schedule "
    eta += f"the share of the answers' tokens that may change (default: {CHANGED:g} for --schedule, none for --save)"
    add("--threshold", "--eta", type=float, metavar="ETA", help=eta)
    add("--limit", type=int, default=SAMPLES, metavar="N", help=f"use the first N samples (default: {SAMPLES})")
    add(
        "--save",
        type=share,
        metavar="SHARE",
        help="find a schedule that saves this share of the prefill's operations, such as 40%%",
    )
    add("--schedule", action="store_true", help="find the schedule that saves the most within the threshold")
    add("--store", action="store_true", help="store what was found with the model, for `--withdraw auto`")
    add("--json", action="store_true", help="print one JSON object")
    chosen = options.parse_args(arguments)
    if chosen.threshold is not None and not 0 <= chosen.threshold < float("inf"):
        raise InputError(f"--threshold must be 0 or more, not {chosen.threshold:g}")
    if chosen.limit < 1:
        raise InputError(f"--limit must be 1 or more, not {chosen.limit}")

    vlm = load(chosen.model)
    if chosen.store:
        check_storable(vlm.folder)
    folder = chosen.samples or vlm.folder / "samples"
    if chosen.samples is None and not folder.is_dir():
        raise InputError(f"{vlm.folder} ships no samples; give a folder of them with --samples")
    samples = read_questions(folder, most=chosen.limit)
    check_questions(vlm, samples)
    if chosen.save or chosen.schedule:
        progress = progress_line(what="samples run")
        found = find_schedule(vlm, samples, chosen.save, chosen.threshold, progress, announce)
        text = path_table(found)
    else:
        found = calibrate(vlm, samples, chosen.criterion, chosen.threshold, progress_line(len(samples)))
        text = curve_table(found, CRITERIA[chosen.criterion].unit)
    if chosen.store:
        store(vlm.folder, found)
    if chosen.json:
        print(json.dumps(found))
        return
    print(text)
    print(f"stored in {vlm.folder / STORED}" if chosen.store else "nothing stored; --store does that")


if __name__ == "__main__":
    command(main)
