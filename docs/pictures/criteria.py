"""Chapter 4: K by each criterion, what it saves and what it costs. A part of `phenomena.py`."""

from collections import Counter

from filling import CALLED, embedded_all, fill, table, write

from minivtw.errors import InputError
from minivtw.evaluate import evaluate
from minivtw.inputs.questions import read_questions
from minivtw.methods.withdrawal import adaptive, withdraw
from minivtw.model.cache import KVCache
from minivtw.model.decoder import forward
from minivtw.model.tokens import arriving
from minivtw.page import charts
from minivtw.search import layer as search
from minivtw.search.calibration import calibrate
from minivtw.search.calibration import embedded as embedded_samples


def criteria(about):
    """K by each criterion on the model's own samples, and what withdrawing there costs on the questions."""
    vlm, questions = about.vlm, about.some("criteria")
    samples, methods = read_questions(vlm.folder / "samples"), {"no withdrawal": None}
    for name, criterion in search.CRITERIA.items():
        try:
            methods[name] = withdraw(calibrate(vlm, samples, name, criterion.threshold)["withdraw_layer"])
        except InputError as error:
            print(error)
            methods[name] = None
    methods["adaptive"] = adaptive()
    decided = Counter(left_at(vlm, prompt, methods["adaptive"]) for prompt in embedded_all(vlm, questions))
    rows = []
    for run in evaluate(vlm, questions, methods):
        layer = "none" if run["withdraw_layer"] is None else run["withdraw_layer"]
        if run["name"] == "adaptive":
            layer = ", ".join(f"{k} ({count})" for k, count in sorted(decided.items(), key=str))
        saved = 1 - run["prefill_flops"] / run["prefill_flops_without_withdrawal"]
        rows.append([run["name"], layer, f"{saved:.1%}", f"{run['mean']:.1%}", f"{run['agreement']:.1%}"])
    heading = ["criterion", "K", "prefill FLOPs saved", "accuracy", "answers unchanged"]
    fill(about.criteria_page, "criteria", table(heading, rows))


def left_at(vlm, prompt, method):
    """The first layer that a prompt's visual tokens do not enter, or "none"."""
    ran = forward(vlm.decoder, arriving(prompt, KVCache(vlm.config)), method).ran
    return next((layer for layer, one in enumerate(ran) if one.entered < len(prompt.hidden)), "none")


def curves(about):
    """The criteria's curves, side by side."""
    samples, rows = read_questions(about.vlm.folder / "samples"), []
    for name, vlm in about.models.items():
        mean = {
            each: search.mean_curve(vlm.decoder, embedded_samples(vlm, samples), each, vlm.stop_ids)
            for each in search.CRITERIA
        }
        series = [("next token (kl)", "visual", mean["kl"]), ("worst token (answer)", "sink dashed", mean["answer"])]
        layer = search.first_at_most(mean["kl"], search.ETA)
        write(f"which-layer-{name}", charts.line_chart(
            range(len(mean["kl"])), series, ("withdrawn before layer", "KL, nats"), (-6, 1), search.ETA, layer,
        ), f"How K is found: {CALLED[name]}")  # fmt: skip
        rows += [[f"{name}, {each}", *(f"{value:.2g}" for value in curve)] for each, curve in mean.items()]
    fill(about.data, "curves", table(["withdrawn before layer", *range(len(rows[0]) - 1)], rows))
