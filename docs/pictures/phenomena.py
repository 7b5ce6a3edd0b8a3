"""Every picture and number of chapters 4, 5 and 9, and the example reports: measured, drawn, and put in their places.

    python weights/recipe/scenes.py --evaluation QUESTIONS
    python docs/pictures/phenomena.py QUESTIONS [--plain DIR]
    python docs/pictures/phenomena.py QUESTIONS --smol        chapter 9 instead, about minivtw-smol

`--plain` is the embedded model before its withdrawal-aware training (weights/recipe/README.md). Without it, pictures
and tables show the embedded model alone. Tables and findings go between the marks `<!-- NAME -->` and `<!-- end -->`.
"""

import argparse
import hashlib
import pathlib
from collections import Counter, defaultdict
from typing import NamedTuple

import numpy as np

import minivtw
import minivtw.inputs.images
from minivtw import Withdrawal, report, search
from minivtw.analysis import charts, migration, page, redundancy, settling
from minivtw.analysis.scoring import score
from minivtw.calibrate import calibrate, embedded, read_samples
from minivtw.checkpoints.hub import shipped_folder
from minivtw.counting import prefill_flops
from minivtw.errors import InputError
from minivtw.evaluate import evaluate, progress_bar, read_questions
from minivtw.model.cache import KVCache
from minivtw.search import Asked

HERE = pathlib.Path(__file__).parent
ON_CRITERIA, ON_PHENOMENA, ON_SMOL = "04-which-layer.md", "05-attention-leaves.md", "09-a-language-model-that-sees.md"
ABLATED_LAYERS = (0, 6, 12, 16, 20, 22, 23, 24, 26, 30)  # of smol
WINDOW = 3  # layers that a knock-out takes at once
REPORTS = {"star": ("scene.png", "What color is the star?"), "three": ("three.png", "Describe the image.")}
METHODS = {"method": {}, "renumbered": {"positions": "reindex"}, "random tokens": {"tokens": "random"}}
LOOKS = {"method": "visual", "renumbered": "nearest dashed", "random tokens": "sink"}


class Counts(NamedTuple):
    """Questions of a family: for what is looked at inside, for what is scored, for what is scored with the ablations."""

    observed: int
    asked: int
    ablated: int


EMBEDDED_COUNTS, SMOL_COUNTS = Counts(5, 20, 20), Counts(2, 20, 2)  # smol takes a hundred times as long


def some_of(questions, most):
    """The first `most` questions of each family."""
    counted = Counter()
    for question in questions:
        counted[question.family] += 1
        if counted[question.family] <= most:
            yield question


def asked_of(vlm, questions):
    for question in questions:
        prompt = vlm.prepare(question.image, question.question)
        yield Asked(vlm.embed(prompt), prompt.is_visual)


def write(name, drawing):
    (HERE / f"{name}.svg").write_text(charts.standalone(drawing), encoding="utf-8")
    print(f"{name}.svg", flush=True)


def fill(chapter, name, content):
    """Put a table between its marks."""
    path = HERE.parent / chapter
    before, rest = path.read_text(encoding="utf-8").split(f"<!-- {name} -->\n")
    after = rest[rest.index("<!-- end -->") :]
    path.write_text(f"{before}<!-- {name} -->\n{content}\n{after}", encoding="utf-8")
    print(f"\n{name}\n{content}", flush=True)


def table(heading, rows):
    """Markdown; what is wider than a page stands upright, one row a layer."""
    if len(heading) > 14:
        heading, *rows = zip(heading, *rows)
        heading = [heading[0] if heading[0].endswith("layer") else "layer", *heading[1:]]
    lines = [heading, ["---"] + ["---:"] * (len(heading) - 1), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


# --- chapter 4


def criteria(vlm, questions, chapter=ON_CRITERIA):
    """K by each criterion on the model's own samples, and what withdrawing there costs on the questions."""
    samples, layers = read_samples(vlm.folder / "samples"), {}
    for name in search.CRITERIA:
        try:
            layers[name] = calibrate(vlm, samples, name)["withdraw_layer"]
        except InputError as error:
            print(error)
            layers[name] = None
    runs = evaluate(vlm, questions, [None, *layers.values(), "adaptive"], progress_bar(len(questions)))
    decided = Counter()
    for asked in asked_of(vlm, questions):
        cache = KVCache(vlm.config.layers)
        positions = cache.claim(len(asked.hidden))
        _, layer = search.forward_adaptive(vlm.decoder, asked.hidden, positions, cache, asked.is_visual)
        decided["none" if layer is None else layer] += 1
    rows = []
    for name, run in zip(["no withdrawal", *layers, "adaptive"], runs):
        layer = "none" if run["withdraw_layer"] is None else run["withdraw_layer"]
        layer = ", ".join(f"{k} ({n})" for k, n in sorted(decided.items(), key=str)) if name == "adaptive" else layer
        saved = 1 - run["prefill_flops"] / run["prefill_flops_without_withdrawal"]
        rows.append([name, layer, f"{saved:.1%}", f"{run['mean']:.1%}", f"{run['agreement']:.1%}"])
    fill(
        chapter,
        "criteria",
        table(["criterion", "K", "prefill FLOPs saved", "accuracy", "answers unchanged"], rows),
    )


def curves(models, chapter=ON_CRITERIA):
    """The criteria's curves, side by side."""
    rows = []
    for name, vlm in models.items():
        samples = read_samples(next(iter(models.values())).folder / "samples")
        mean = {
            each: search.mean_curve(vlm.decoder, embedded(vlm, samples), each, vlm.stop_ids) for each in search.CRITERIA
        }
        series = [("next token (kl)", "visual", mean["kl"]), ("worst token (answer)", "sink dashed", mean["answer"])]
        layer = search.first_at_most(mean["kl"], search.ETA)
        write(f"which-layer-{name}", charts.line_chart(
            range(len(mean["kl"])), series, ("withdrawn before layer", "KL, nats"), (-6, 1), search.ETA, layer,
        ))  # fmt: skip
        rows += [[f"{name}, {each}", *(f"{value:.2g}" for value in curve)] for each, curve in mean.items()]
    fill(chapter, "curves", table(["", *range(len(rows[0]) - 1)], rows))


# --- chapter 5


def attention(models, questions, chapter=ON_PHENOMENA):
    """Settling: mean shares, and the maps of one question."""
    order = [settling.GROUPS.index(group) for group in ("visual", "sink", "nearest", "other")]
    groups, rows, says = [settling.GROUPS[i] for i in order], [], []
    for name, vlm in models.items():
        asked = list(asked_of(vlm, questions))
        shares = np.mean([settling.settling(vlm.decoder, each) for each in asked], axis=0)[:, order]
        even = np.mean([settling.even_shares(each.is_visual) for each in asked], axis=0)[order]
        write(f"settling-{name}", charts.stacked_bars(
            range(len(shares)), groups, shares, ("layer", "attention of the text"), even[0],
        ))  # fmt: skip
        rows += [[f"{name}, {group}", *(f"{share:.0%}" for share in shares[:, i])] for i, group in enumerate(groups)]
        says.append(settled(name, dict(zip(groups, shares[-len(shares) // 3 :].mean(0))), even[0]))
    fill(chapter, "settling says", "\n".join(says))
    rows += [[f"even attention, {group}"] + [f"{share:.0%}"] * (len(rows[0]) - 1) for group, share in zip(groups, even)]
    fill(chapter, "settling", table(["share of", *range(len(rows[0]) - 1)], rows))


def settled(name, deep, even):
    """What the shares of the deepest third of the layers say, as a sentence."""
    if deep["visual"] < even / 2:
        finding = "as in the paper, attention has settled away from the image"
    elif deep["visual"] < 0.9 * even:
        finding = "attention has turned away from the image in part only, less than the paper reports"
    else:
        finding = "unlike in the paper, attention does not leave the image"
    return (
        f"- *{name}*: in the deepest third of the layers the image gets {deep['visual']:.0%} of the text's attention, "
        f"where even attention would give it {even:.0%}; the sink gets {deep['sink']:.0%}, "
        f"the nearest four {deep['nearest']:.0%}. So {finding}."
    )


def looking(vlm, name, question, drawing="looking"):
    """The picture once a layer, each patch as bright as the attention that the answering token gives it."""
    prompt = vlm.prepare(HERE / name, question)
    asked = Asked(vlm.embed(prompt), prompt.is_visual)
    maps = settling.image_maps(vlm.decoder, asked)[0]  # (layers, visual tokens)
    (tile,) = page.as_seen(prompt.tiles, minivtw.inputs.images.open_image(HERE / name))
    side, place = round(maps.shape[1] ** 0.5), 78
    body = [f'<defs><image id="tile" href="{page.data_url(tile)}" width="72" height="72"/></defs>']
    for layer, patches in enumerate(maps):
        x, y = layer % 6 * place + 6, layer // 6 * (place + 16) + 18
        body.append(
            charts.text(x, y - 4, layer, "start", "strong") + charts.text(x + 72, y - 4, f"{patches.sum():.0%}", "end")
        )
        body.append(f'<use href="#tile" x="{x}" y="{y}"/>')
        for patch, share in enumerate(patches):
            dark = 0.8 * (1 - (share / maps.max()) ** 0.5)
            body.append(
                f'<rect x="{x + patch % side * 72 / side}" y="{y + patch // side * 72 / side}" width="{72 / side}" '
                f'height="{72 / side}" opacity="{dark:.2f}"><title>{share:.1%}</title></rect>'
            )
    write(drawing, charts.svg(body, 18 + -(-len(maps) // 6) * (place + 16)))


def crossing(models, questions, chapter=ON_PHENOMENA, drawing="lens"):
    """Migration: knock-outs and the lens, means over questions."""
    rows, lenses, says = [], [], []
    for name, vlm in models.items():
        layers = vlm.config.layers
        cuts = {
            f"only {WINDOW} layers from here": [(i, min(i + WINDOW, layers)) for i in range(layers)],
            "all layers below": [(0, i) for i in range(layers)],
            "all layers from here": [(i, layers) for i in range(layers)],
        }
        left, read = defaultdict(list), []
        for asked in asked_of(vlm, questions):
            answer = search.walk(vlm.decoder, asked, search.LONGEST_ANSWER, vlm.stop_ids).answer
            for cut, ranges in cuts.items():
                whole, shares = migration.knock_outs(vlm.decoder, asked, answer, ranges)
                left[cut].append(shares / whole)
            read.append(migration.lens(vlm.decoder, asked)[1:, answer[0]])
        left, read = {cut: np.mean(shares, axis=0) for cut, shares in left.items()}, np.mean(read, axis=0)
        series = [(cut, look, left[cut]) for cut, look in zip(left, ("visual", "sink dashed", "nearest"))]
        write(f"knock-outs-{name}", charts.line_chart(
            range(layers), [(short, *rest) for short, (_, *rest) in zip(("window", "below", "from here"), series)],
            ("layer", "probability left"),
        ))  # fmt: skip
        rows += [[f"{name}, {cut}", *(f"{share:.0%}" for share in shares)] for cut, shares in left.items()]
        lenses.append((name, "sink dashed" if name == "plain" else "visual", read))
        says.append(crossed(name, left["all layers from here"], left["all layers below"], read))
    fill(chapter, "migration says", "\n".join(says))
    write(drawing, charts.line_chart(range(layers), lenses, ("behind layer", "probability of the answer's first token")))
    fill(chapter, "knock-outs", table(["text cut off in", *range(layers)], rows))
    rows = [[name, *(f"{share:.0%}" for share in read)] for name, _, read in lenses]
    fill(chapter, "lens", table(["", *range(layers)], rows))


def crossed(name, from_here, below, read):
    """What knock-outs and lens say, as a sentence. Each argument: one value a layer."""
    enough = [layer for layer in range(len(from_here)) if (from_here[layer:] >= 0.95).all()]
    layer = enough[0] if enough else len(from_here)
    if layer <= len(from_here) // 2:
        finding = "as in the paper, what the image says has moved into the text in the first half of the layers"
    elif layer <= 2 * len(from_here) / 3:
        finding = "what the image says moves into the text by the middle of the stack, later than the paper reports"
    else:
        finding = "unlike in the paper, text goes on taking from the image in the deep layers"
    half = int(np.flatnonzero(read >= read[-1] / 2)[0])
    return (
        f"- *{name}*: from layer {layer} on, text can be cut off from the image and 95% of the answer's probability "
        f"remains; cut off in all layers below {layer}, it keeps {below[min(layer, len(below) - 1)]:.0%}. "
        f"So {finding}. "
        f"Behind layer {half} the lens gives the answer's first token half of the probability that it has in the end."
    )


def reading(vlm, name, question, chapter=ON_PHENOMENA):
    """What could be read from the last prompt token, layer by layer, in one example."""
    prompt = vlm.prepare(HERE / name, question)
    probabilities = migration.lens(vlm.decoder, Asked(vlm.embed(prompt), prompt.is_visual))[1:]
    rows = []
    for layer, row in enumerate(probabilities):
        best = np.argsort(-row)[:3]
        rows.append([layer, *(f"`{report.token_text(vlm, int(i)).strip() or ' '}` {row[i]:.0%}" for i in best)])
    fill(chapter, "reading", table(["layer", "first", "second", "third"], rows))


def losing(vlm, questions, chapter=ON_PHENOMENA, suffix="", methods=METHODS, layers=None, most_tokens=64):
    """Redundancy: accuracy, agreement and KL against K (of all, or of `layers`), for the method and the ablations."""
    layers = layers or range(vlm.config.layers + 1)
    withdrawals = [Withdrawal(layer, **options) for options in methods.values() for layer in layers]
    scored, agrees, kl = [defaultdict(list) for _ in withdrawals], [], []
    show = progress_bar(len(questions))
    for done, (question, asked) in enumerate(zip(questions, asked_of(vlm, questions)), 1):
        outcomes = redundancy.redundancy(vlm.decoder, asked, withdrawals, vlm.stop_ids, most_tokens)
        for by_family, outcome in zip(scored, outcomes):
            said = vlm.tokenizer.decode(outcome.answer)
            by_family[question.family].append(score(question.family, said, question.answer))
        agrees.append([outcome.agrees for outcome in outcomes])
        kl.append([outcome.kl for outcome in outcomes])
        show(done)
    families = list(scored[0])
    by_family = np.array([[np.mean(by[family]) for family in families] for by in scored])  # (withdrawals, families)
    accuracy = by_family.mean(1).reshape(len(methods), -1)
    agrees, kl = (np.mean(each, axis=0).reshape(len(methods), -1) for each in (agrees, kl))
    below = "withdrawn before layer"
    series = [(name, LOOKS[name], accuracy[i]) for i, name in enumerate(methods)]
    write(f"redundancy{suffix}", charts.line_chart(layers, series, (below, "accuracy")))
    series = [(name, LOOKS[name], np.maximum(kl[i], 1e-9)) for i, name in enumerate(methods)]
    write(f"redundancy{suffix}-kl", charts.line_chart(layers, series, (below, "KL, nats"), (-6, 1), search.ETA))
    prompt = vlm.prepare(HERE / "scene.png", "What color is the star?")
    sizes = len(prompt.token_ids), int((~prompt.is_visual).sum())
    saved = [1 - prefill_flops(vlm.config, *sizes, k) / prefill_flops(vlm.config, sizes[0]) for k in layers]
    rows = [["prefill FLOPs saved", *(f"{share:.0%}" for share in saved)]]
    for i, name in enumerate(methods):
        rows.append([f"{name}: accuracy", *(f"{value:.1%}" for value in accuracy[i])])
        rows.append([f"{name}: unchanged", *(f"{value:.0%}" for value in agrees[i])])
        rows.append([f"{name}: KL", *(f"{value:.2g}" for value in kl[i])])
    fill(chapter, f"redundancy{suffix}", table([below, *layers], rows))
    rows = [
        [family, *(f"{share:.0%}" for share in by_family[: len(layers), column])] for column, family in enumerate(families)
    ]
    if chapter == ON_SMOL and len(methods) == 1:
        draw_staircase(layers, dict(zip(families, by_family[: len(layers)].T)))
        fill(chapter, f"families{suffix}", table([below, *layers], rows))
    layer = vlm.withdrawal("auto").layer
    column = list(layers).index(layer)
    parts = [f"{name} {agrees[i, column]:.0%} ({accuracy[i, column]:.1%} right)" for i, name in enumerate(methods)]
    says = f"At the stored K = {layer}, this share of the answers is unchanged: {', '.join(parts)}; "
    fill(chapter, f"redundancy{suffix} says", f"{says}without withdrawal {accuracy[0, -1]:.1%} are right.")


def draw_staircase(layers, accuracy):
    """What is asked for decides how long the image is needed. accuracy: one value a K for each family."""
    series = [
        (name, look, np.mean([accuracy[family] for family in families], axis=0))
        for name, look, families in (
            ("number, yes, no", "nearest", ("count", "existence", "relation")),
            ("letter", "sink dashed", ("choice",)),
            ("word", "visual", ("attribute", "reading", "caption")),
        )
    ]
    write("staircase-smol", charts.line_chart(layers, series, ("withdrawn before layer", "accuracy")))


def write_report(name, vlm, picture, question):
    html = page.page(report.tell(vlm, HERE / picture, question))
    (HERE.parent / "reports" / f"{name}.html").write_text(html, encoding="utf-8")
    print(f"reports/{name}.html")


def about_smol(questions, parts):
    """Chapter 9. What takes long can be measured in parts, two at a time."""
    vlm, counts = minivtw.load("smol"), SMOL_COUNTS
    observed = list(some_of(questions, counts.observed))
    models = {"smol": vlm}
    steps = {
        "curves": lambda: curves(models, ON_SMOL),
        "criteria": lambda: criteria(vlm, list(some_of(questions, 3)), ON_SMOL),
        "attention": lambda: attention(models, list(some_of(questions, 5)), ON_SMOL),
        "looking": lambda: looking(vlm, *REPORTS["star"], "looking-smol"),
        "report": lambda: write_report("smol", vlm, *REPORTS["star"]),
        "crossing": lambda: crossing(models, observed, ON_SMOL, "lens-smol"),
        "reading": lambda: reading(vlm, *REPORTS["star"], ON_SMOL),
        "losing": lambda: losing(
            vlm, list(some_of(questions, counts.asked)), ON_SMOL, "-smol", {"method": METHODS["method"]}
        ),
        # What has lost its image may ramble on; no answer is longer than 24 tokens.
        "ablations": lambda: losing(
            vlm, list(some_of(questions, counts.ablated)), ON_SMOL, "-smol-ablations", METHODS, ABLATED_LAYERS, 24
        ),
    }
    for part in parts or steps:
        steps[part]()
    digest = hashlib.sha256((shipped_folder("minivtw-smol") / "graft.safetensors").read_bytes()).hexdigest()
    measured = (
        f"{counts.observed} questions of each family for knock-outs and lens, 5 for attention, {counts.asked} for what is "
        f"lost at every K, 3 for the criteria, {counts.ablated} for the ablations"
    )
    fill(ON_SMOL, "weights", f"Measured on {measured}, with a `graft.safetensors` whose SHA-256 is `{digest}`.")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", help="a folder that scenes.py --evaluation wrote")
    parser.add_argument("--plain", metavar="DIR", help="the folder of the model before withdrawal-aware training")
    parser.add_argument("--smol", metavar="PART", nargs="*", help="measure minivtw-smol; only these parts of it")
    chosen = parser.parse_args()
    if chosen.smol is not None:
        about_smol(read_questions(chosen.questions), chosen.smol)
        return
    vlm, questions, counts = minivtw.load(), read_questions(chosen.questions), EMBEDDED_COUNTS
    digest = hashlib.sha256((vlm.folder / "model.safetensors").read_bytes()).hexdigest()
    models = {"embedded": vlm}
    if chosen.plain:
        models["plain"] = minivtw.load(chosen.plain)
    observed, asked = list(some_of(questions, counts.observed)), list(some_of(questions, counts.asked))
    curves(models)
    criteria(vlm, asked)
    attention(models, observed)
    looking(vlm, *REPORTS["star"])
    crossing(models, observed)
    reading(vlm, *REPORTS["star"])
    losing(vlm, asked)
    measured = f"{counts.observed} questions of each family where the inside is observed, {counts.asked} where answers are scored"
    fill("05-attention-leaves.md", "weights", f"Measured on {measured}, with the weights whose SHA-256 is `{digest}`.")
    for name, (picture, question) in REPORTS.items():
        write_report(name, vlm, picture, question)


if __name__ == "__main__":
    main()
