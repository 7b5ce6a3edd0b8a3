"""Score a model on images and questions, under one method or another: python -m minivtw.evaluate FOLDER"""

import contextlib
import itertools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from statistics import fmean, stdev
from typing import Any

from . import VLM, Answer, Chat, load
from .cli.options import Parser, add_model_option, layers_to_try, methods_to_try
from .cli.terminal import command, progress_line
from .errors import InputError, counted
from .inputs.questions import Question, check_questions, read_questions
from .inputs.scoring import score
from .inputs.writing import check_writable, write_whole
from .methods.shelf import method_of
from .methods.text import Method, spec_of, withdrawal_layer
from .model.sampling import Sampler
from .model.tokens import EmbeddedPrompt
from .seen import Beginning, Seen, begin, rest_of

MOST_SEEDS = 1000  # of one method
SCORED = ("image", "family", "question", "answer")  # what a question needs to be scored


def summary(name: str, method: Method | None, turns: list[tuple[Question, Answer, Answer]]) -> dict[str, Any]:
    """One run of the report: accuracies from 0 to 1, mean FLOPs, bytes and seconds per question.

    turns: each with its answer, and that of the model that is left alone; later turns count as questions of their own.
    """
    scores = defaultdict[str, list[float]](list)  # family -> one score per question
    for question, answer, _ in turns:
        scores[question.family].append(score(question.family, answer.text, question.answer))
    accuracy = {family: fmean(points) for family, points in sorted(scores.items())}
    mean_of = lambda part, key: fmean(answer.stats[part][key] for _, answer, _ in turns)
    return {
        "name": name,
        "method": spec_of(method),
        "withdraw_layer": withdrawal_layer(method),
        "accuracy": accuracy,
        "mean": fmean(accuracy.values()),
        "agreement": fmean(answer.token_ids == untouched.token_ids for _, answer, untouched in turns),
        "prefill_flops": mean_of("flops", "prefill"),
        "prefill_flops_without_withdrawal": mean_of("flops", "prefill_without_withdrawal"),
        "cache_bytes": mean_of("cache", "bytes"),
        "prefill_seconds": mean_of("seconds", "prefill"),
        "decode_seconds": mean_of("seconds", "decode"),
    }


def evaluate(
    vlm: VLM,
    questions: list[Question],
    methods: Mapping[str, Method | None],
    progress: Callable[[int], None] = lambda done: None,
    max_new_tokens: int = 64,
) -> list[dict[str, Any]]:
    """Ask every question under each of `methods`, a dict by name; the image is encoded once for all of them.

    Returns one summary for each. Agreement is the share of answers whose tokens equal those of the model that is left
    alone; one and the same method under two names runs once. Questions that follow in the same chat find there what the
    model answered before, under the same method. Of questions about one image that follow each other, each begins with
    what the layers kept of it at the first, unless the method looks at the question.
    """
    turns: dict[str, list[tuple[Question, Answer, Answer]]] = {name: [] for name in methods}
    done, blind = itertools.count(1), dict[tuple[int, int], bool]()
    for image, group in itertools.groupby(questions, lambda question: question.image):
        about_it = list(group)
        beginning = begin(vlm, image) if len(about_it) > 1 else None
        seen = see(vlm, beginning, methods.values(), blind) if beginning else {}
        for question in about_it:
            rest, whole = embedded(vlm, question, beginning)
            answers = dict[int, list[Answer]]()  # a method itself, whatever its name -> an Answer for every turn
            for method in (None, *methods.values()):
                if id(method) not in answers:
                    chat = Chat(vlm, None, method, seen=seen.get(id(method)) if rest else None)
                    first = chat.respond(rest if rest and chat.seen else whole, Sampler(), max_new_tokens)
                    if rest and chat.seen and question is about_it[0]:
                        first.stats["seconds"]["prefill"] += chat.seen.seconds
                    if beginning and rest and id(method) not in seen and is_blind(method, beginning, blind):
                        seen[id(method)] = Seen.left_by(chat, beginning, len(rest.hidden))
                    later = [chat.ask(turn.question, max_new_tokens=max_new_tokens) for turn in question.then]
                    answers[id(method)] = [first, *later]
            for name, method in methods.items():
                turns[name] += zip((question, *question.then), answers[id(method)], answers[id(None)])
            progress(next(done))
    return [summary(name, method, turns[name]) for name, method in methods.items()]


def see(
    vlm: VLM, beginning: Beginning, methods: Iterable[Method | None], blind: dict[tuple[int, int], bool]
) -> dict[int, Seen]:
    """The image under those methods of which it takes a trial to find out that they do not look at the question.

    blind: (method, visual tokens) -> whether it does not. For methods of the shelf, what was found at one image holds
    for all that are as large; a reader's own method is tried at every image, until it looks at a question.
    """
    seen = dict[int, Seen]()
    for method in methods:
        which = id(method), int(beginning.is_visual.sum())
        if method and id(method) not in seen and which not in blind:
            with contextlib.suppress(InputError):
                seen[id(method)] = Seen(vlm, beginning, method)
            if id(method) not in seen or is_ours(method):
                blind[which] = id(method) in seen
    return seen


def is_blind(method: Method | None, beginning: Beginning, blind: dict[tuple[int, int], bool]) -> bool:
    """Whether a method is known not to look at the question: without one, nothing does."""
    return method is None or blind.get((id(method), int(beginning.is_visual.sum())), False)


def is_ours(method: Method) -> bool:
    """Whether a method is one of the shelf."""
    with contextlib.suppress(InputError):
        return bool(method_of(spec_of(method) or "", files=False))
    return False


def embedded(vlm: VLM, question: Question, beginning: Beginning | None) -> tuple[EmbeddedPrompt | None, EmbeddedPrompt]:
    """What a question adds to its image, None where that is not to be reused; and the whole prompt."""
    with contextlib.suppress(InputError):  # a question that does not stand after its image
        if beginning and len((prompt := rest_of(vlm, beginning, question.question)).token_ids):
            rest = vlm.embed(prompt)
            return rest, beginning.then(rest.hidden)
    return None, vlm.embed(vlm.prepare(question.image, question.question))


def seeds(text: str) -> list[str]:
    """A method's text for each of its seeds: `random:layer=2,seed=0-4` is five methods, which become one row."""
    found = re.search(r"(?<=\bseed=)(\d{1,9})-(\d{1,9})(?!\d)", text)
    if not found:
        return [text]
    first, last = int(found[1]), int(found[2])
    if not first <= last < first + MOST_SEEDS:
        raise InputError(f"seeds go from the smaller to the larger, {MOST_SEEDS} of them at most: {found[0]}")
    return [text[: found.start()] + str(seed) + text[found.end() :] for seed in range(first, last + 1)]


def gathered(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The summaries of one method's seeds as one: means, and as `spread` the standard deviations of the scores."""
    if len(runs) == 1:
        return runs[0]

    def over(measure: Callable[[list[float]], float], key: str) -> Any:
        values = [run[key] for run in runs]
        if isinstance(values[0], dict):
            return {family: measure([value[family] for value in values]) for family in values[0]}
        return measure(values)

    numbers = {key: over(fmean, key) for key, value in runs[0].items() if isinstance(value, dict | float)}
    spread = {key: over(stdev, key) for key in ("accuracy", "mean", "agreement")}
    return {**runs[0], **numbers, "name": name, "method": name, "seeds": len(runs), "spread": spread}


def results_table(runs: list[dict[str, Any]]) -> str:
    """The summaries as text, one row per run."""
    families = list(runs[0]["accuracy"])
    rows = [["method", *families, "mean", "unchanged", "MFLOP", "saved", "cache kB", "prefill ms", "decode ms"]]
    for run in runs:
        saved = 1 - run["prefill_flops"] / run["prefill_flops_without_withdrawal"]
        spread = run.get("spread")
        scores = [share(run["accuracy"][family], spread and spread["accuracy"][family]) for family in families]
        scores += [share(run[key], spread and spread[key]) for key in ("mean", "agreement")]
        numbers = [f"{run['prefill_flops'] / 1e6:.0f}", share(saved), f"{run['cache_bytes'] / 1e3:.0f}"]
        times = [f"{1000 * run[phase]:.1f}" for phase in ("prefill_seconds", "decode_seconds")]
        rows.append([title(run), *scores, *numbers, *times])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        f"{name:{widths[0]}}" + "".join(f"{cell:>{width + 2}}" for cell, width in zip(cells, widths[1:]))
        for name, *cells in rows
    )


def share(value: float, spread: float | None = None) -> str:
    return f"{value:.1%}" if spread is None else f"{value:.1%} ±{100 * spread:.1f}"


def title(run: dict[str, Any]) -> str:
    """A row's heading."""
    if run["method"] != f"withdraw:layer={run['withdraw_layer']}":
        return run["name"] if run["name"] != "auto" else f"{run['method']} (auto)"
    return f"K={run['withdraw_layer']}" + " (auto)" * (run["name"] == "auto")


def to_ask(questions: list[Question], without: str | None, limit: int | None) -> list[Question]:
    """The questions of all families but one, and of each the first `limit`; None: of no family too many.

    Raises InputError where there is no such family, or no other.
    """
    counts, chosen = Counter[str](), list[Question]()
    for question in questions:
        counts[question.family] += 1
        if question.family != without and (limit is None or counts[question.family] <= limit):
            chosen.append(question)
    if without is not None and (without not in counts or not chosen):
        raise InputError(f"--without leaves out one family of several; there is {', '.join(sorted(counts))}")
    return chosen


def main(arguments: list[str]) -> None:
    options = Parser(prog="minivtw.evaluate", description="Score a model on images and questions.")
    add = options.add_argument
    lines = "holds the images and questions.jsonl (image, family, question, answer; or image, turns)"
    add("folder", metavar="FOLDER", help=lines)
    add_model_option(options)
    layers = "layers to try, in one go (default: off,auto)"
    add("--withdraw", type=layers_to_try, default="off,auto", metavar="off,auto,K,…", help=layers)
    more = "other methods to try beside them; seed=0-4 tries five seeds and gives their mean and spread"
    add("--method", "--methods", nargs="+", default=[], metavar="NAME:parameters", help=more)
    add("--limit", type=int, metavar="N", help="ask only the first N questions of each family")
    add("--without", metavar="FAMILY", help="leave out the questions of this family")
    add("--json", metavar="FILE", help="also write the figures there")
    chosen = options.parse_args(arguments)
    if chosen.limit is not None and chosen.limit < 1:
        raise InputError(f"--limit must be 1 or more, not {chosen.limit}")
    if chosen.json:
        check_writable(chosen.json)

    questions = to_ask(read_questions(chosen.folder, SCORED), chosen.without, chosen.limit)
    vlm = load(chosen.model)
    check_questions(vlm, questions)
    rows = {name: [name] for name in chosen.withdraw} | {text: seeds(text) for text in chosen.method}
    methods = methods_to_try(vlm, chosen.withdraw, [one for text in chosen.method for one in rows[text]])
    same = {spec_of(method): method for method in methods.values()}  # of equal texts one method, which runs once
    methods = {name: same[spec_of(method)] for name, method in methods.items()}
    by_name = {run["name"]: run for run in evaluate(vlm, questions, methods, progress_line(len(questions)))}
    runs = [gathered(name, [by_name[one] for one in row]) for name, row in rows.items()]
    print(f"{vlm.folder.name}: {counted(len(questions), 'question')}")
    print(results_table(runs))
    if chosen.json:
        content = {"model": vlm.folder.name, "questions": len(questions), "runs": runs}
        write_whole(chosen.json, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    command(main)
