"""Score a model on pictures and questions, under one method or another: python -m minivtw.evaluate FOLDER"""

import json
from collections import defaultdict

from . import Chat, load
from .analysis.scoring import score
from .cli import (
    Parser,
    add_model_option,
    check_writable,
    command,
    methods_to_try,
    progress_line,
    write_whole,
)
from .counting import Clock
from .errors import InputError
from .inputs.questions import Question, read_questions
from .model.sampling import Sampler
from .specs import spec_of, withdrawal_layer


class Tally:
    """What one method has scored so far."""

    def __init__(self, name, method):
        self.name = name
        self.method = method
        self.scores = defaultdict(list)  # family -> one score a question
        self.unchanged = 0
        self.stats = []

    def add(self, question, answer, untouched):
        self.scores[question.family].append(score(question.family, answer.text, question.answer))
        self.unchanged += answer.token_ids == untouched.token_ids
        self.stats.append(answer.stats)

    def summary(self):
        """One run of the report: accuracies from 0 to 1, mean FLOPs, bytes and seconds a question."""

        def mean(values):
            values = list(values)
            return sum(values) / len(values)

        accuracy = {family: mean(scores) for family, scores in sorted(self.scores.items())}
        return {
            "name": self.name,
            "method": spec_of(self.method),
            "withdraw_layer": withdrawal_layer(self.method),
            "accuracy": accuracy,
            "mean": mean(accuracy.values()),
            "agreement": self.unchanged / len(self.stats),
            "prefill_flops": mean(stats["flops"]["prefill"] for stats in self.stats),
            "prefill_flops_without_withdrawal": mean(stats["flops"]["prefill_without_withdrawal"] for stats in self.stats),
            "cache_bytes": mean(stats["cache"]["bytes"] for stats in self.stats),
            "prefill_seconds": mean(stats["seconds"]["prefill"] for stats in self.stats),
            "decode_seconds": mean(stats["seconds"]["decode"] for stats in self.stats),
        }


def evaluate(vlm, questions, methods, progress=lambda done: None, max_new_tokens=64):
    """Ask every question under each of `methods`, a dict by name; the picture is looked at once.

    Returns one summary for each. Agreement is the share of answers whose tokens equal those of the model that is left
    alone; what is the same method under two names runs once.
    """
    tallies = [Tally(name, method) for name, method in methods.items()]
    for number, question in enumerate(questions, 1):
        prompt = vlm.prepare(question.image, question.question)
        hidden = vlm.embed(prompt)  # (tokens, width)
        answers = {}  # method -> Answer, by its text
        for method in (None, *methods.values()):
            if spec_of(method) not in answers:
                chat = Chat(vlm, None, method)
                answers[spec_of(method)] = chat.respond(prompt, hidden, Sampler(), max_new_tokens, Clock())
        for tally in tallies:
            tally.add(question, answers[spec_of(tally.method)], answers[None])
        progress(number)
    return [tally.summary() for tally in tallies]


def table(runs):
    """The summaries as text, one column a run."""
    saved = [1 - run["prefill_flops"] / run["prefill_flops_without_withdrawal"] for run in runs]
    rows = [("method", [title(run) for run in runs])]
    rows += [(family, [f"{run['accuracy'][family]:.1%}" for run in runs]) for family in runs[0]["accuracy"]]
    rows.append(("mean", [f"{run['mean']:.1%}" for run in runs]))
    rows.append(("answers unchanged", [f"{run['agreement']:.1%}" for run in runs]))
    rows.append(("prefill MFLOP", [f"{run['prefill_flops'] / 1e6:.0f}" for run in runs]))
    rows.append(("saved", [f"{share:.1%}" for share in saved]))
    rows.append(("cache kB", [f"{run['cache_bytes'] / 1e3:.0f}" for run in runs]))
    rows.append(("prefill ms", [f"{1000 * run['prefill_seconds']:.1f}" for run in runs]))
    rows.append(("decode ms", [f"{1000 * run['decode_seconds']:.1f}" for run in runs]))
    widths = [max(len(cells[column]) for _, cells in rows) + 2 for column in range(len(runs))]
    return "\n".join(
        f"{name:17}" + "".join(f"{cell:>{max(width, 10)}}" for cell, width in zip(cells, widths)) for name, cells in rows
    )


def title(run):
    """A column's heading."""
    if run["withdraw_layer"] is None:
        return run["name"] if run["name"] != "auto" else f"{run['method']} (auto)"
    return f"K={run['withdraw_layer']}" + " (auto)" * (run["name"] == "auto")


def first_of_each_family(questions: list[Question], limit: int | None) -> list[Question]:
    """At most `limit` questions of each family; None: all."""
    asked: dict[str, int] = defaultdict(int)
    chosen = []
    for question in questions:
        asked[question.family] += 1
        if limit is None or asked[question.family] <= limit:
            chosen.append(question)
    return chosen


def main(arguments):
    options = Parser(prog="minivtw.evaluate", description="Score a model on pictures and questions.")
    options.add_argument("folder", metavar="FOLDER", help="holds questions.jsonl (image, family, question, answer) and the pictures")
    add_model_option(options)
    options.add_argument(
        "--withdraw", default="off,auto", metavar="off,auto,K,…", help="layers to try, in one go (default: off,auto)"
    )
    options.add_argument(
        "--method", "--methods", nargs="+", metavar="NAME:parameters", help="other methods to try beside them"
    )
    options.add_argument("--limit", type=int, metavar="N", help="ask only the first N questions of each family")
    options.add_argument("--json", metavar="FILE", help="also write the figures there")
    chosen = options.parse_args(arguments)
    if chosen.limit is not None and chosen.limit < 1:
        raise InputError(f"--limit must be 1 or more, not {chosen.limit}")
    if chosen.json:
        check_writable(chosen.json)

    questions = first_of_each_family(read_questions(chosen.folder, Question._fields), chosen.limit)
    vlm = load(chosen.model)
    methods = methods_to_try(vlm, chosen.withdraw, chosen.method)
    runs = evaluate(vlm, questions, methods, progress_line(len(questions)))
    print(f"{vlm.folder.name}: {len(questions)} questions")
    print(table(runs))
    if chosen.json:
        content = {"model": vlm.folder.name, "questions": len(questions), "runs": runs}
        write_whole(chosen.json, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    command(main)
