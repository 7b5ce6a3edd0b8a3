"""Every picture and number of chapters 4, 5 and 7, and the example reports: measured, drawn, and put in their places.

    python weights/recipe/scenes.py --evaluation QUESTIONS
    python docs/pictures/phenomena.py QUESTIONS [--plain DIR] [--only STEP …]
    python docs/pictures/phenomena.py QUESTIONS --smol [--only STEP …]        chapter 7 instead, about minivtw-smol

`--plain` is the embedded model before its withdrawal-aware training (weights/recipe/README.md). Without it, pictures
and tables show the embedded model alone. `swaps.py` measures the swaps; `still_talks.py` the chat.
"""

from collections import defaultdict

import criteria
import instruments
import knock_outs
import numpy as np
import routes
from drawing import options
from filling import CALLED, HERE, About, embedded, embedded_all, fill, names, questions_of, table, weights_sha256, write

import minivtw
from minivtw.analysis import settling
from minivtw.counting import plain_run, prompt_flops
from minivtw.inputs.questions import digest
from minivtw.inputs.scoring import score
from minivtw.methods.withdrawal import random_tokens, renumber, then, withdraw
from minivtw.page import charts, page
from minivtw.page.story import report_html, story_of
from minivtw.search import layer as search

ABLATED_LAYERS = (0, 6, 12, 16, 20, 22, 23, 24, 26, 30)  # of smol
WINDOW = 3  # layers that a knock-out takes at once
REPORTS = {"star": ("scene.png", "What color is the star?"), "three": ("three.png", "Describe the image.")}
METHODS = {
    "withdrawal": withdraw,
    "renumbered": lambda layer: then(withdraw(layer), renumber(layer)),
    "random tokens": random_tokens,
}
LOOKS = {"withdrawal": "visual", "renumbered": "nearest dashed", "random tokens": "sink"}
FAMILIES = ("attribute", "reading", "count", "existence", "relation", "choice", "caption")  # that both models learned


def attention(about):
    """Settling: mean shares."""
    order = [settling.GROUPS.index(group) for group in ("visual", "sink", "nearest", "other")]
    groups, rows, says = [settling.GROUPS[i] for i in order], [], []
    for name, vlm in about.models.items():
        prompts = list(embedded_all(vlm, about.some("attention")))
        shares = np.mean([settling.settling(vlm.decoder, each) for each in prompts], axis=0)[:, order]
        even = np.mean([settling.even_shares(each.is_visual) for each in prompts], axis=0)[order]
        write(f"settling-{name}", charts.stacked_bars(
            range(len(shares)), groups, shares, ("layer", "attention of the text"), even[0],
        ), f"Where the text looks: {CALLED[name]}")  # fmt: skip
        rows += [[f"{name}, {group}", *(f"{share:.0%}" for share in shares[:, i])] for i, group in enumerate(groups)]
        deep = dict(zip(groups, shares[-len(shares) // 3 :].mean(0)))
        says.append(
            f"- *{name}*: in the deepest third of the layers the image gets {deep['visual']:.0%} of the text's "
            f"attention, where uniform attention would give it {even[0]:.0%}; the sink gets {deep['sink']:.0%}, the "
            f"nearest four {deep['nearest']:.0%}."
        )
    rows += [[f"even, {group}"] + [f"{share:.0%}"] * (len(rows[0]) - 1) for group, share in zip(groups, even)]
    fill(about.page, "settling says", "\n".join(says))
    fill(about.data, "settling", table(["share of the attention, layer", *range(len(rows[0]) - 1)], rows))


def looking(about):
    """The image once per layer, each patch as bright as the attention that the answering token gives it."""
    picture, question = REPORTS["star"]
    maps = instruments.image_maps(about.vlm.decoder, embedded(about.vlm, HERE / picture, question))[
        0
    ]  # (layers, visual)
    (tile,) = page.as_seen(about.vlm.parts.vision, about.vlm.prepare(HERE / picture, question).tiles)
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
    height = 18 + -(-len(maps) // 6) * (place + 16)
    note = "bold: the layer; in per cent: the image's share of the token's attention"
    write(
        f"looking{about.suffix}",
        charts.svg([*body, charts.text(6, height + 2, note, "start")], height + 12, f"{question} {note}"),
        "What the answering token looks at: bright patches",
    )


def crossing(about):
    """Migration: all text cut off from the image, and the lens; means over questions."""
    rows, lenses, says = [], [], []
    for name, vlm in about.models.items():
        layers = vlm.config.layers
        cuts = {
            "i to i + 2": [range(i, min(i + WINDOW, layers)) for i in range(layers)],
            "before i": [range(i) for i in range(layers)],
            "i and deeper": [range(i, layers) for i in range(layers)],
        }
        left, read = defaultdict(list), []
        for prompt in embedded_all(vlm, about.some("crossing")):
            answer = search.run_in_full(vlm.decoder, prompt, search.LONGEST_ANSWER, vlm.stop_ids).answer
            image = knock_outs.with_answer(vlm.decoder, prompt, answer).is_visual
            for cut, ranges in cuts.items():
                whole, shares = knock_outs.knock_outs(
                    vlm.decoder, prompt, answer, [knock_outs.Cut(~image, image, each) for each in ranges]
                )
                left[cut].append(shares / whole)
            read.append(instruments.lens(vlm.decoder, prompt)[1:, answer[0]])
        left, read = {cut: np.mean(shares, axis=0) for cut, shares in left.items()}, np.mean(read, axis=0)
        series = [(cut, look, left[cut]) for cut, look in zip(left, ("visual", "sink dashed", "nearest"))]
        drawing = charts.line_chart(range(layers), series, ("layer i", "probability left"))
        write(f"knock-outs-{name}", drawing, f"Text cut off from the image: {CALLED[name]}")
        rows += [[f"{name}, {cut}", *(f"{share:.0%}" for share in shares)] for cut, shares in left.items()]
        rows.append([f"{name}, lens", *(f"{share:.0%}" for share in read)])
        lenses.append((name, "sink dashed" if name == "plain" else "visual", read))
        says.append(crossed(name, left["i and deeper"], left["before i"], read))
    fill(about.page, "migration says", "\n".join(says))
    write(f"lens{about.suffix}", charts.line_chart(
        range(layers), lenses, ("after layer", "probability of the answer's first token"),
    ), "What the last token would say: the logit lens")  # fmt: skip
    fill(about.data, "knock-outs", table(["text cut off, layer", *range(layers)], rows))


def crossed(name, from_here, before, read):
    """What knock-outs and lens say, as a sentence. Each argument: one value per layer."""
    enough = [layer for layer in range(len(from_here)) if (from_here[layer:] >= 0.95).all()]
    layer = enough[0] if enough else len(from_here)
    half = int(np.flatnonzero(read >= read[-1] / 2)[0])
    return (
        f"- *{name}*: from layer {layer} of {len(from_here)} on, all text can be cut off from the image and at least "
        f"95% of the answer's probability remains; cut off in the layers before {layer} instead, it keeps "
        f"{before[min(layer, len(before) - 1)]:.0%}. After layer {half} the lens gives the answer's first token at "
        f"least half of the probability that it has in the end."
    )


def reading(about):
    """What could be read from the last prompt token, layer by layer, in one example."""
    picture, question = REPORTS["star"]
    rows = []
    for layer, row in enumerate(instruments.lens(about.vlm.decoder, embedded(about.vlm, HERE / picture, question))[1:]):
        rows.append([layer, *(f"`{names(about.vlm, i)}` {row[i]:.0%}" for i in np.argsort(-row)[:3])])
    fill(about.data, "reading", table(["layer", "first", "second", "third"], rows))


def losing(about, name="redundancy", methods=METHODS, layers=None, most_tokens=64):
    """Redundancy: accuracy, agreement and KL against K (of all, or of `layers`), for the method and the ablations."""
    vlm, layers = about.vlm, layers or range(about.vlm.config.layers + 1)
    withdrawals = [make(layer) for make in methods.values() for layer in layers]
    scored, agrees, kl = [defaultdict(list) for _ in withdrawals], [], []
    for question in about.some(name):
        prompt = embedded(vlm, question.image, question.question)
        outcomes = instruments.redundancy(vlm.decoder, prompt, withdrawals, vlm.stop_ids, most_tokens)
        for by_family, outcome in zip(scored, outcomes):
            said = vlm.tokenizer.decode(outcome.answer)
            by_family[question.family].append(score(question.family, said, question.answer))
        agrees.append([outcome.agrees for outcome in outcomes])
        kl.append([outcome.kl for outcome in outcomes])
    families = list(scored[0])
    by_family = np.array([[np.mean(by[family]) for family in families] for by in scored])  # (withdrawals, families)
    accuracy, picture = (
        by_family.mean(1).reshape(len(methods), -1),
        name.replace("redundancy", f"redundancy{about.suffix}"),
    )
    agrees, kl = (np.mean(each, axis=0).reshape(len(methods), -1) for each in (agrees, kl))
    column = "withdrawn before layer"
    series = [(each, LOOKS[each], accuracy[i]) for i, each in enumerate(methods)]
    write(
        picture,
        charts.line_chart(layers, series, (column, "accuracy")),
        f"Right answers if the image leaves: {about.called}",
    )
    series = [(each, LOOKS[each], np.maximum(kl[i], 1e-9)) for i, each in enumerate(methods)]
    drawing = charts.line_chart(layers, series, (column, "KL, nats"), (-6, 1), search.ETA)
    write(f"{picture}-kl", drawing, f"How much the next token changes: {about.called}")
    rows = [["prefill FLOPs saved", *(f"{saved(vlm, *REPORTS['star'], layer):.0%}" for layer in layers)]]
    for i, each in enumerate(methods):
        rows.append([f"{each}: accuracy", *(f"{value:.1%}" for value in accuracy[i])])
        rows.append([f"{each}: unchanged", *(f"{value:.0%}" for value in agrees[i])])
        rows.append([f"{each}: KL", *(f"{value:.2g}" for value in kl[i])])
    if not name.endswith("ablations"):
        rows += [[each, *(f"{share:.0%}" for share in by_family[: len(layers), i])] for i, each in enumerate(families)]
    fill(about.data, name, table([column, *layers], rows))
    if about.suffix and len(methods) == 1:
        draw_staircase(layers, dict(zip(families, by_family[: len(layers)].T)))
    found = next(i for i, value in enumerate(kl[0]) if value <= search.ETA)
    parts = [f"{each} {agrees[i, found]:.0%} ({accuracy[i, found]:.1%} right)" for i, each in enumerate(methods)]
    says = (
        f"At K = {layers[found]}, the first that meets the paper's threshold on these questions, this share of the "
        f"answers is unchanged: {', '.join(parts)}; without withdrawal {accuracy[0, -1]:.1%} are right."
    )
    fill(about.page, f"{name} says", says)


def saved(vlm, picture, question, layer):
    """The share of the prefill's FLOPs that withdrawal before a layer saves."""
    visual = vlm.prepare(HERE / picture, question).is_visual
    plain, text = plain_run(vlm.config, len(visual)), plain_run(vlm.config, int((~visual).sum()))
    return 1 - prompt_flops(vlm.config, plain[:layer] + text[layer:]) / prompt_flops(vlm.config, plain)


def draw_staircase(layers, accuracy):
    """What is asked for decides how long the image is needed. accuracy: one value per K for each family."""
    series = [
        (name, look, np.mean([accuracy[family] for family in families], axis=0))
        for name, look, families in (
            ("number, yes, no", "nearest", ("count", "existence", "relation")),
            ("letter", "sink dashed", ("choice",)),
            ("word", "visual", ("attribute", "reading", "caption")),
        )
    ]
    drawing = charts.line_chart(layers, series, ("withdrawn before layer", "accuracy"))
    write("staircase-smol", drawing, "What is asked decides when the image may leave")


def write_reports(about):
    for name, (picture, question) in {"smol": REPORTS["star"]}.items() if about.suffix else REPORTS.items():
        html = report_html(story_of(about.vlm, HERE / picture, question, about.vlm.method()))
        (HERE.parent / "reports" / f"{name}.html").write_text(html, encoding="utf-8")
        print(f"reports/{name}.html")


STEPS = {
    "curves": criteria.curves, "criteria": criteria.criteria, "attention": attention, "looking": looking,
    "crossing": crossing, "reading": reading, "routes": routes.routes, "words": routes.words, "wrong": routes.wrong,
    "losing": losing, "reports": write_reports,
}  # fmt: skip
SMOL_STEPS = STEPS | {
    "losing": lambda about: losing(about, methods={"withdrawal": withdraw}),
    # What has lost its image may ramble on; no answer is longer than 24 tokens.
    "ablations": lambda about: losing(about, "redundancy-ablations", METHODS, ABLATED_LAYERS, 24),
}
COUNTS = {"criteria": 20, "attention": 5, "crossing": 5, "routes": 20, "redundancy": 20}
SMOL_COUNTS = {"criteria": 3, "attention": 5, "crossing": 2, "routes": 20, "redundancy": 20, "redundancy-ablations": 2}


def main():
    parser = options(__doc__)
    parser.add_argument("questions", help="a folder that scenes.py --evaluation wrote")
    parser.add_argument("--plain", metavar="DIR", help="the folder of the model before withdrawal-aware training")
    parser.add_argument("--smol", action="store_true", help="measure minivtw-smol, for chapter 7")
    parser.add_argument("--only", metavar="STEP", nargs="+", choices=SMOL_STEPS, help="only these steps")
    chosen = parser.parse_args()
    questions = questions_of(chosen.questions, FAMILIES)
    if chosen.smol:
        chapter, data = "07-a-language-model-that-sees.md", "data/07-a-language-model-that-sees.md"
        about = About({"smol": minivtw.load("smol")}, questions, SMOL_COUNTS, data, chapter, data, "-smol", 14)
        name, steps = "smol", SMOL_STEPS
    else:
        models = {"embedded": minivtw.load()} | ({"plain": minivtw.load(chosen.plain)} if chosen.plain else {})
        chapter, data = "05-attention-leaves.md", "data/05-attention-leaves.md"
        about = About(models, questions, COUNTS, "04-which-layer.md", chapter, data, "", 2)
        name, steps = "tiny", STEPS
    for step in chosen.only or steps:
        steps[step](about)
    if not chosen.only:  # else some tables are of another day
        fill(about.data, "weights", measured_on(about, name))


def measured_on(about, name):
    """How many questions, which weights, which pictures."""
    asked = ", ".join(f"{count} for {step}" for step, count in about.counts.items())
    return (
        f"Questions of each family: {asked}. SHA-256 of minivtw-{name}: `{weights_sha256(name)}`; of the "
        f"{len(about.questions):,} images and questions that these are the first of: `{digest(about.questions)}`."
    )


if __name__ == "__main__":
    main()
