"""Find the layer before which the visual tokens can leave, and store it there: python -m minivtw.calibrate MODEL"""

import hashlib
import json
import os
import pathlib
import tempfile
from typing import NamedTuple

from . import load
from .errors import InputError, Parser, door
from .evaluate import progress_bar
from .search import CRITERIA, Asked, choose, mean_curve

SAMPLES = 20


class Samples(NamedTuple):
    """Pictures with a question each, and the SHA-256 of them all."""

    asked: list[tuple[str, str]]  # (the picture's path, the question)
    digest: str


def read_samples(folder, most=SAMPLES):
    """The first `most` lines of a folder's questions.jsonl.

    Each line is an object with `image`, a path beside that file, and `question`; what else it holds does not matter.
    """
    path = pathlib.Path(folder) / "questions.jsonl"
    if not path.is_file():
        raise InputError(
            f"the samples folder {folder} holds no questions.jsonl, one object with image and question a line"
        )
    asked, digest = [], hashlib.sha256()
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()[:most], 1):
            content = json.loads(line)
            picture, question = path.parent / content["image"], content["question"]
            digest.update(picture.read_bytes() + question.encode())
            asked.append((str(picture), question))
    except OSError as error:
        raise InputError(f"cannot read {error.filename or path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}, line {number}: needs an object with image and question") from error
    if not asked:
        raise InputError(f"{path} holds no samples")
    return Samples(asked, digest.hexdigest())


def embedded(vlm, samples, progress=lambda done: None):
    """The samples as the decoder gets them, one after the other."""
    for done, (picture, question) in enumerate(samples.asked, 1):
        prompt = vlm.prepare(picture, question)
        yield Asked(vlm.embed(prompt), prompt.is_visual)
        progress(done)


def calibrate(vlm, samples, criterion="kl", threshold=None, progress=lambda done: None):
    """Find K on samples. Returns what `withdrawal.json` holds.

    `curve` has one value a layer, the mean over the samples of what `search.CRITERIA` defines. Raises InputError for
    a picture that cannot be read, and where no layer meets the threshold.
    """
    threshold = CRITERIA[criterion].threshold if threshold is None else threshold
    curve = mean_curve(vlm.decoder, embedded(vlm, samples, progress), criterion, vlm.stop_ids)
    return {
        "withdraw_layer": choose(curve, criterion, threshold),
        "criterion": criterion,
        "threshold": threshold,
        "curve": [float(f"{value:.6g}") for value in curve],
        "samples": {"count": len(samples.asked), "sha256": samples.digest},
    }


def store(found, folder):
    """Write withdrawal.json into a model folder, whole or not at all: the old stays until the new one is complete."""
    partial = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", dir=folder, prefix=".withdrawal-", delete=False, encoding="utf-8"
        ) as file:
            partial = file.name
            file.write(json.dumps(found, indent=1) + "\n")
        os.chmod(partial, 0o644)  # temporary files are private; a model folder is not
        os.replace(partial, pathlib.Path(folder) / "withdrawal.json")
    except OSError as error:
        if partial:
            os.unlink(partial)
        raise InputError(f"cannot store the layer in {folder}: {error.strerror}") from error


def table(found, unit):
    """The curve as text, a line a layer, with a mark where the visual tokens leave."""
    rows = [f"layer {layer:3}  {value:10.6f}" for layer, value in enumerate(found["curve"])]
    rows[found["withdraw_layer"]] += "  <- the visual tokens leave before this layer"
    heading = (
        f"{found['criterion']} ({unit}), mean of {found['samples']['count']} samples, threshold {found['threshold']:g}"
    )
    return "\n".join([heading, *rows])


def main(arguments):
    options = Parser(prog="minivtw.calibrate", description="Find the withdrawal layer of a model and store it there.")
    options.add_argument("model", nargs="?", metavar="MODEL", help="a model folder (default: the embedded model)")
    options.add_argument(
        "--samples", metavar="DIR",
        help="holds questions.jsonl (image, question) and the pictures (default: samples/ in the model folder)",
    )  # fmt: skip
    options.add_argument("--criterion", choices=tuple(CRITERIA), default="kl", help="(default: kl, the paper's)")
    defaults = ", ".join(f"{criterion.threshold:g} for {name}" for name, criterion in CRITERIA.items())
    options.add_argument(
        "--threshold", "--eta", type=float, metavar="ETA", help=f"what a layer must meet (default: {defaults})"
    )
    options.add_argument(
        "--limit", type=int, default=SAMPLES, metavar="N", help=f"use the first N samples (default: {SAMPLES})"
    )
    options.add_argument("--dry-run", action="store_true", help="print only, store nothing")
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
    samples = read_samples(folder, chosen.limit)
    found = calibrate(vlm, samples, chosen.criterion, chosen.threshold, progress_bar(len(samples.asked)))
    if not chosen.dry_run:
        store(found, vlm.folder)
    if chosen.json:
        print(json.dumps(found))
        return
    print(table(found, CRITERIA[chosen.criterion].unit))
    print("nothing stored (--dry-run)" if chosen.dry_run else f"stored in {vlm.folder / 'withdrawal.json'}")


if __name__ == "__main__":
    door(main)
