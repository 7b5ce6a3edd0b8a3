"""Find the layer before which the visual tokens can leave: python -m minivtw.calibrate [MODEL] [--store]"""

import json

from . import load
from .checkpoints.stored import STORED, stored_search
from .cli import Parser, command, progress_line, write_whole
from .errors import InputError
from .inputs.questions import digest, read_questions
from .model.tokens import EmbeddedPrompt
from .search import CRITERIA, choose, mean_curve

SAMPLES = 20


def embedded(vlm, samples, progress=lambda done: None):
    """The samples as the decoder gets them, one after the other."""
    for done, sample in enumerate(samples, 1):
        prompt = vlm.prepare(sample.image, sample.question)
        yield EmbeddedPrompt(vlm.embed(prompt), prompt.is_visual)
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


def table(found, unit):
    """The curve as text, a line a layer, with a mark where the visual tokens leave."""
    rows = [f"layer {layer:3}  {value:10.6f}" for layer, value in enumerate(found["curve"])]
    rows[found["withdraw_layer"]] += "  <- the visual tokens leave before this layer"
    heading = (
        f"{found['criterion']} ({unit}), mean of {found['samples']['count']} samples, threshold {found['threshold']:g}"
    )
    return "\n".join([heading, *rows])


def main(arguments):
    options = Parser(prog="minivtw.calibrate", description="Find the withdrawal layer of a model.")
    options.add_argument("model", nargs="?", metavar="MODEL", help="a model folder (default: the embedded model)")
    options.add_argument(
        "--samples", metavar="DIR",
        help="holds questions.jsonl (image, question) and the pictures (default: samples/ in the model folder)",
    )  # fmt: skip
    options.add_argument("--criterion", choices=tuple(CRITERIA), default="kl", help="(default: kl, the paper's)")
    defaults = ", ".join(f"{criterion.threshold:g} for {name}" for name, criterion in CRITERIA.items())
    options.add_argument(
        "--threshold", "--eta", type=float, metavar="ETA",
        help=f"what a layer must meet (default: that of the stored layer, or else {defaults})",
    )  # fmt: skip
    options.add_argument(
        "--limit", type=int, default=SAMPLES, metavar="N", help=f"use the first N samples (default: {SAMPLES})"
    )
    options.add_argument("--store", action="store_true", help="store the layer with the model, for `--withdraw auto`")
    options.add_argument("--json", action="store_true", help="print one JSON object")
    chosen = options.parse_args(arguments)
    if chosen.threshold is not None and not 0 <= chosen.threshold < float("inf"):
        raise InputError(f"--threshold must be 0 or more, not {chosen.threshold:g}")
    if chosen.limit < 1:
        raise InputError(f"--limit must be 1 or more, not {chosen.limit}")

    vlm = load(chosen.model)
    folder = chosen.samples or vlm.folder / "samples"
    if chosen.samples is None and not folder.is_dir():
        raise InputError(f"{vlm.folder} ships no samples; give a folder of them with --samples")
    samples = read_questions(folder, most=chosen.limit)
    found = calibrate(vlm, samples, chosen.criterion, chosen.threshold, progress_line(len(samples)))
    if chosen.store:
        write_whole(vlm.folder / STORED, json.dumps(found, indent=1) + "\n")
    if chosen.json:
        print(json.dumps(found))
        return
    print(table(found, CRITERIA[chosen.criterion].unit))
    print(f"stored in {vlm.folder / STORED}" if chosen.store else "nothing stored; --store does that")


if __name__ == "__main__":
    command(main)
