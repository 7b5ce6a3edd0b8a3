"""Score a model on pictures and questions, withdrawing at one layer or another: python -m minivtw.evaluate FOLDER"""

import json
import os
import pathlib
import sys
from collections import defaultdict
from typing import NamedTuple

from . import Chat, load
from .analysis.scoring import score
from .errors import InputError, Parser, door
from .generate import withdraw_option
from .model.sampling import Sampler
from .vlm import Clock


class Question(NamedTuple):
    """One line of questions.jsonl; `image` is a path beside that file."""

    image: str
    family: str
    question: str
    answer: str


def read_questions(folder):
    """The questions of an evaluation folder. Raises InputError for a broken line or a missing picture."""
    path = pathlib.Path(folder) / "questions.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    questions = []
    for number, line in enumerate(lines, 1):
        try:
            content = json.loads(line)
            question = Question(*(content[name] for name in Question._fields))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}, line {number}: needs an object with image, family, question and answer") from error
        if not all(isinstance(value, str) for value in question):
            raise InputError(f"{path}, line {number}: image, family, question and answer must be text")
        if not (path.parent / question.image).is_file():
            raise InputError(f"{path}, line {number}: there is no picture {question.image}")
        questions.append(question._replace(image=str(path.parent / question.image)))
    if not questions:
        raise InputError(f"{path} holds no questions")
    return questions


class Tally:
    """What one withdrawal layer has scored so far."""

    def __init__(self, withdraw, layer):
        self.withdraw = withdraw
        self.layer = layer
        self.scores = defaultdict(list)  # family -> one score a question
        self.unchanged = 0
        self.stats = []

    def add(self, question, result, unwithdrawn):
        self.scores[question.family].append(score(question.family, result.text, question.answer))
        self.unchanged += result.token_ids == unwithdrawn.token_ids
        self.stats.append(result.stats)

    def summary(self):
        """One run of the report: accuracies from 0 to 1, mean FLOPs and seconds a question."""

        def mean(values):
            values = list(values)
            return sum(values) / len(values)

        accuracy = {family: mean(scores) for family, scores in sorted(self.scores.items())}
        return {
            "withdraw": self.withdraw,
            "withdraw_layer": self.layer,
            "accuracy": accuracy,
            "mean": mean(accuracy.values()),
            "agreement": self.unchanged / len(self.stats),
            "prefill_flops": mean(stats["flops"]["prefill"] for stats in self.stats),
            "prefill_flops_without_withdrawal": mean(stats["flops"]["prefill_without_withdrawal"] for stats in self.stats),
            "prefill_seconds": mean(stats["seconds"]["prefill"] for stats in self.stats),
            "decode_seconds": mean(stats["seconds"]["decode"] for stats in self.stats),
        }


def evaluate(vlm, questions, withdraws, progress=lambda done: None, max_new_tokens=64):
    """Ask every question with each of `withdraws`; the picture is looked at once. Returns one summary for each.

    Agreement is the share of answers whose tokens equal those of the model without withdrawal.
    """
    tallies = [Tally("off" if withdraw is None else withdraw, vlm.withdrawal(withdraw).layer) for withdraw in withdraws]
    for number, question in enumerate(questions, 1):
        asked = vlm.prepare(question.image, question.question)
        hidden = vlm.embed(asked)  # (tokens, width)
        results = {}  # layer -> Result
        for layer in (None, *(tally.layer for tally in tallies)):
            if layer not in results:
                results[layer] = Chat(vlm, layer).respond(asked, hidden, Sampler(), max_new_tokens, Clock(0))
        for tally in tallies:
            tally.add(question, results[tally.layer], results[None])
        progress(number)
    return [tally.summary() for tally in tallies]


def table(runs):
    """The summaries as text, one column a run."""
    families = list(runs[0]["accuracy"])
    titles = ["off" if run["withdraw_layer"] is None else f"K={run['withdraw_layer']}" for run in runs]
    rows = [("withdrawn before", [title + " (auto)" * (run["withdraw"] == "auto") for title, run in zip(titles, runs)])]
    rows += [(family, [f"{run['accuracy'][family]:.1%}" for run in runs]) for family in families]
    rows.append(("mean", [f"{run['mean']:.1%}" for run in runs]))
    rows.append(("answers unchanged", [f"{run['agreement']:.1%}" for run in runs]))
    rows.append(("prefill MFLOP", [f"{run['prefill_flops'] / 1e6:.0f}" for run in runs]))
    rows.append(("saved", [f"{1 - run['prefill_flops'] / run['prefill_flops_without_withdrawal']:.1%}" for run in runs]))
    rows.append(("prefill ms", [f"{1000 * run['prefill_seconds']:.1f}" for run in runs]))
    return "\n".join(f"{name:17}" + "".join(f"{cell:>12}" for cell in cells) for name, cells in rows)


def progress_bar(total):
    """A bar on standard error while a terminal shows it."""

    def progress(done):
        if sys.stderr.isatty():
            filled = 40 * done // total
            end = "\n" if done == total else ""
            print(f"\r[{'#' * filled}{'.' * (40 - filled)}] {done}/{total}", end=end, file=sys.stderr, flush=True)

    return progress


def write_json(path, content):
    """Whole or not at all: written beside its place, then moved there."""
    path = pathlib.Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error


def withdraw_list(text):
    """off,auto,5 as a list of what `VLM.withdrawal` takes."""
    return [withdraw_option(part.strip()) for part in text.split(",")]


def main(arguments):
    options = Parser(prog="minivtw.evaluate", description="Score a model on pictures and questions.")
    options.add_argument("folder", metavar="FOLDER", help="holds questions.jsonl (image, family, question, answer) and the pictures")
    options.add_argument("--model", metavar="DIR", help="a model folder (default: the embedded model)")
    options.add_argument(
        "--withdraw", type=withdraw_list, default="off,auto", metavar="off,auto,K,…",
        help="the layers to try, in one go (default: off,auto)",
    )  # fmt: skip
    options.add_argument("--limit", type=int, metavar="N", help="ask only the first N questions of each family")
    options.add_argument("--json", metavar="FILE", help="also write the figures there")
    chosen = options.parse_args(arguments)
    if chosen.limit is not None and chosen.limit < 1:
        raise InputError(f"--limit must be 1 or more, not {chosen.limit}")

    questions, asked = [], defaultdict(int)
    for question in read_questions(chosen.folder):
        asked[question.family] += 1
        if chosen.limit is None or asked[question.family] <= chosen.limit:
            questions.append(question)
    vlm = load(chosen.model)
    runs = evaluate(vlm, questions, chosen.withdraw, progress_bar(len(questions)))
    print(f"{vlm.folder.name}: {len(questions)} questions")
    print(table(runs))
    if chosen.json:
        write_json(chosen.json, {"model": vlm.folder.name, "questions": len(questions), "runs": runs})


if __name__ == "__main__":
    door(main)
