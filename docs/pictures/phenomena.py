"""Every picture and number of chapters 4 and 5, and the two example reports: measured, drawn, and put in their places.

    python weights/recipe/scenes.py --evaluation QUESTIONS
    python docs/pictures/phenomena.py QUESTIONS [--plain DIR]

`--plain` is the embedded model before its withdrawal-aware training (weights/recipe/README.md). Without it, pictures
and tables show the embedded model alone. Tables and findings go between the marks `<!-- NAME -->` and `<!-- end -->`.
"""

import argparse
import hashlib
import pathlib
from collections import Counter, defaultdict

import numpy as np

import minivtw
from minivtw import Withdrawal, report, search
from minivtw.analysis import charts, migration, page, redundancy, settling
from minivtw.analysis.counting import prefill_flops
from minivtw.analysis.scoring import score
from minivtw.cache import KVCache
from minivtw.calibrate import calibrate, embedded, read_samples
from minivtw.errors import InputError
from minivtw.evaluate import evaluate, progress_bar, read_questions
from minivtw.search import Asked

HERE = pathlib.Path(__file__).parent
OBSERVED, ASKED = 5, 20  # questions of a family: for what is looked at inside, and for what is scored
WINDOW = 3  # layers that a knock-out takes at once
REPORTS = {"star": ("scene.png", "What color is the star?"), "three": ("three.png", "Describe the image.")}
METHODS = {"method": {}, "renumbered": {"positions": "reindex"}, "random tokens": {"tokens": "random"}}
LOOKS = {"method": "visual", "renumbered": "nearest dashed", "random tokens": "sink"}


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
    lines = [heading, ["---"] + ["---:"] * (len(heading) - 1), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


# --- chapter 4


def criteria(vlm, questions):
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
        "04-which-layer.md",
        "criteria",
        table(["criterion", "K", "prefill FLOPs saved", "accuracy", "answers unchanged"], rows),
    )


def curves(models):
    """The criteria's curves, side by side."""
    rows = []
    for name, vlm in models.items():
        samples = read_samples(models["embedded"].folder / "samples")
        mean = {
            each: search.mean_curve(vlm.decoder, embedded(vlm, samples), each, vlm.ends) for each in search.CRITERIA
        }
        series = [("next token (kl)", "visual", mean["kl"]), ("worst token (answer)", "sink dashed", mean["answer"])]
        layer = search.first_at_most(mean["kl"], search.ETA)
        write(f"which-layer-{name}", charts.line_chart(
            range(len(mean["kl"])), series, ("withdrawn before layer", "KL, nats"), (-6, 1), search.ETA, layer,
        ))  # fmt: skip
        rows += [[f"{name}, {each}", *(f"{value:.2g}" for value in curve)] for each, curve in mean.items()]
    fill("04-which-layer.md", "curves", table(["", *range(len(rows[0]) - 1)], rows))


# --- chapter 5


def attention(models, questions):
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
    fill("05-attention-leaves.md", "settling says", "\n".join(says))
    rows += [[f"even attention, {group}"] + [f"{share:.0%}"] * (len(rows[0]) - 1) for group, share in zip(groups, even)]
    fill("05-attention-leaves.md", "settling", table(["share of", *range(len(rows[0]) - 1)], rows))


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


def looking(vlm, name, question):
    """The picture once a layer, each patch as bright as the attention that the answering token gives it."""
    prompt = vlm.prepare(HERE / name, question)
    asked = Asked(vlm.embed(prompt), prompt.is_visual)
    maps = settling.image_maps(vlm.decoder, asked)[0]  # (layers, visual tokens)
    (tile,) = page.as_seen(prompt.tiles, minivtw.images.open_image(HERE / name))
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
    write("looking", charts.svg(body, 18 + -(-len(maps) // 6) * (place + 16)))


def crossing(models, questions):
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
            answer = search.walk(vlm.decoder, asked, search.LONGEST_ANSWER, vlm.ends).answer
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
        lenses.append((name, "visual" if name == "embedded" else "sink dashed", read))
        says.append(crossed(name, left["all layers from here"], left["all layers below"], read))
    fill("05-attention-leaves.md", "migration says", "\n".join(says))
    write("lens", charts.line_chart(range(layers), lenses, ("behind layer", "probability of the answer's first token")))
    fill("05-attention-leaves.md", "knock-outs", table(["text cut off in", *range(layers)], rows))
    rows = [[name, *(f"{share:.0%}" for share in read)] for name, _, read in lenses]
    fill("05-attention-leaves.md", "lens", table(["", *range(layers)], rows))


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


def reading(vlm, name, question):
    """What could be read from the last prompt token, layer by layer, in one example."""
    prompt = vlm.prepare(HERE / name, question)
    probabilities = migration.lens(vlm.decoder, Asked(vlm.embed(prompt), prompt.is_visual))[1:]
    rows = []
    for layer, row in enumerate(probabilities):
        best = np.argsort(-row)[:3]
        rows.append([layer, *(f"`{report.token_text(vlm, int(i)).strip() or ' '}` {row[i]:.0%}" for i in best)])
    fill("05-attention-leaves.md", "reading", table(["layer", "first", "second", "third"], rows))


def losing(vlm, questions):
    """Redundancy: accuracy, agreement and KL against K, for the method and the ablations."""
    layers = range(vlm.config.layers + 1)
    withdrawals = [Withdrawal(layer, **options) for options in METHODS.values() for layer in layers]
    scored, agrees, kl = [defaultdict(list) for _ in withdrawals], [], []
    show = progress_bar(len(questions))
    for done, (question, asked) in enumerate(zip(questions, asked_of(vlm, questions)), 1):
        outcomes = redundancy.redundancy(vlm.decoder, asked, withdrawals, vlm.ends)
        for by_family, outcome in zip(scored, outcomes):
            said = vlm.tokenizer.decode(outcome.answer)
            by_family[question.family].append(score(question.family, said, question.answer))
        agrees.append([outcome.agrees for outcome in outcomes])
        kl.append([outcome.kl for outcome in outcomes])
        show(done)
    accuracy = np.reshape([np.mean([np.mean(each) for each in by.values()]) for by in scored], (len(METHODS), -1))
    agrees, kl = (np.mean(each, axis=0).reshape(len(METHODS), -1) for each in (agrees, kl))
    below = "withdrawn before layer"
    series = [(name, LOOKS[name], accuracy[i]) for i, name in enumerate(METHODS)]
    write("redundancy", charts.line_chart(layers, series, (below, "accuracy")))
    series = [(name, LOOKS[name], np.maximum(kl[i], 1e-9)) for i, name in enumerate(METHODS)]
    write("redundancy-kl", charts.line_chart(layers, series, (below, "KL, nats"), (-6, 1), search.ETA))
    prompt = vlm.prepare(HERE / "scene.png", "What color is the star?")
    sizes = len(prompt.token_ids), int((~prompt.is_visual).sum())
    rows = [
        ["prefill FLOPs saved"]
        + [f"{1 - prefill_flops(vlm.config, *sizes, k) / prefill_flops(vlm.config, sizes[0]):.0%}" for k in layers]
    ]
    for i, name in enumerate(METHODS):
        rows.append([f"{name}: accuracy", *(f"{value:.1%}" for value in accuracy[i])])
        rows.append([f"{name}: unchanged", *(f"{value:.0%}" for value in agrees[i])])
        rows.append([f"{name}: KL", *(f"{value:.2g}" for value in kl[i])])
    fill("05-attention-leaves.md", "redundancy", table(["withdrawn before layer", *layers], rows))
    layer = vlm.withdrawal("auto").layer
    parts = [f"{name} {agrees[i, layer]:.0%} ({accuracy[i, layer]:.1%} right)" for i, name in enumerate(METHODS)]
    says = f"At the stored K = {layer}, this share of the answers is unchanged: {', '.join(parts)}; "
    fill("05-attention-leaves.md", "redundancy says", f"{says}without withdrawal {accuracy[0, -1]:.1%} are right.")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", help="a folder that scenes.py --evaluation wrote")
    parser.add_argument("--plain", metavar="DIR", help="the folder of the model before withdrawal-aware training")
    chosen = parser.parse_args()
    vlm, questions = minivtw.load(), read_questions(chosen.questions)
    digest = hashlib.sha256((vlm.folder / "model.safetensors").read_bytes()).hexdigest()
    models = {"embedded": vlm}
    if chosen.plain:
        models["plain"] = minivtw.load(chosen.plain)
    observed, asked = list(some_of(questions, OBSERVED)), list(some_of(questions, ASKED))
    curves(models)
    criteria(vlm, asked)
    attention(models, observed)
    looking(vlm, *REPORTS["star"])
    crossing(models, observed)
    reading(vlm, *REPORTS["star"])
    losing(vlm, asked)
    counts = f"{OBSERVED} questions of each family where the inside is observed, {ASKED} where answers are scored"
    fill("05-attention-leaves.md", "weights", f"Measured on {counts}, with the weights whose SHA-256 is `{digest}`.")
    (HERE.parent / "reports").mkdir(exist_ok=True)
    for name, (picture, question) in REPORTS.items():
        html = page.page(report.tell(vlm, HERE / picture, question))
        (HERE.parent / "reports" / f"{name}.html").write_text(html, encoding="utf-8")
        print(f"reports/{name}.html")


if __name__ == "__main__":
    main()
