"""Chapter 10's table and pictures: which methods to try, what they scored, which patches they keep.

python docs/pictures/shelf.py methods [--model MODEL] [--saved 0.25 0.4 0.6]     method texts at equal budgets
python docs/pictures/shelf.py curves SCORES.json shelf.svg     from what `minivtw.evaluate --json` wrote; prints a table
python docs/pictures/shelf.py sheet kept.svg [--model MODEL]   the patches that each keeps for one question
python docs/pictures/shelf.py bottom QUESTIONS METHOD …        how much of what it keeps lies in the lower half
"""

import argparse
import base64
import json
import pathlib

import minivtw
from minivtw.analysis.charts import curve_chart, standalone, svg, text
from minivtw.counting import plain_run, prompt_flops
from minivtw.inputs.questions import read_questions
from minivtw.methods import then
from minivtw.model.cache import KVCache
from minivtw.model.tokens import Ran
from minivtw.shelf import method_of

HERE = pathlib.Path(__file__).parent
STYLES = [f"{color}{dash}" for dash in ("", " dashed") for color in ("visual", "sink", "nearest", "mark", "other")]
SIDE, GAP = 108, 12  # pixels of a picture on the contact sheet


def shelf(depth):
    """{name: (text with {keep}, the share of the visual tokens that enters a layer)} in a decoder of this depth."""
    early, stages = 2, [depth // 4, depth // 2, 3 * depth // 4]
    raters = [max(1, round(depth * layer / 32)) for layer in (3, 7, 16)]  # as the published code has them

    def after(layer):
        return lambda index, keep: keep if index >= layer else 1

    def staged(layers):
        return lambda index, keep: keep ** sum(index >= layer for layer in layers)

    one = {
        name: (f"{name}:layer={early},keep={{keep}}", after(early))
        for name in ("fastv", "looked_at", "dart", "uniform")
    }
    random = {"random": (f"random:layer={early},keep={{keep}},seed=0-4", after(early))}
    before = {name: (f"{name}:keep={{keep}}", after(0)) for name in ("fastervlm", "visionzip", "divprune")}
    written = {name: "/".join(map(str, layers)) for name, layers in (("pyramiddrop", stages), ("sparsevlm", raters))}
    pyramid = {"pyramiddrop": (f"pyramiddrop:layers={written['pyramiddrop']},keep={{keep}}", staged(stages))}
    sparse = {"sparsevlm": (f"sparsevlm:layers={written['sparsevlm']},keep={{keep}}", staged(raters))}
    return random | one | pyramid | sparse | before


def saving(config, visual, words, entered, worked=None):
    """The share of the prefill's FLOPs that is saved where these numbers of visual tokens enter and are worked on."""
    worked = worked or entered
    run = [Ran(words + some, words + busy, words + some, 0) for some, busy in zip(entered, worked)]
    return 1 - prompt_flops(config, run) / prompt_flops(config, plain_run(config, visual + words))


def at_budget(config, visual, words, target):
    """The text of every method with the parameter that saves about `target` of a prompt's prefill."""
    depth = config.layers
    for template, kept in shelf(depth).values():

        def missed(keep, kept=kept):
            return abs(saving(config, visual, words, [round(visual * kept(i, keep)) for i in range(depth)]) - target)

        yield template.format(keep=f"{min((step / 400 for step in range(401)), key=missed):g}")

    def kept_until(layer):
        return [visual * (index < layer) for index in range(depth)]

    layer = min(range(depth), key=lambda k: abs(saving(config, visual, words, kept_until(k)) - target))
    yield f"withdraw:layer={layer}"
    layer = min(
        range(depth), key=lambda k: abs(saving(config, visual, words, [visual] * depth, kept_until(k)) - target)
    )
    yield f"freeze:layers={layer}-{depth - 1}"


def curves(path):
    """The chart of accuracy against FLOPs saved, random as a band, and the scores as a Markdown table."""
    content = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    families, found, band = list(content["runs"][0]["accuracy"]), {}, []
    rows = [["method", *families, "mean", "unchanged", "saved", "cache kB"]]
    for run in content["runs"]:
        saved = 1 - run["prefill_flops"] / run["prefill_flops_without_withdrawal"]
        spread = run.get("spread", {}).get("mean", 0)
        if run["name"].startswith("random:"):
            band.append((saved, run["mean"] - spread, run["mean"] + spread))
        tip = f"{run['name']}\n{run['mean']:.1%} correct, {saved:.1%} saved"
        found.setdefault((run["method"] or "off").split(":")[0], []).append((saved, run["mean"], tip))
        scores = [f"{100 * value:.1f}" for value in (*run["accuracy"].values(), run["mean"], run["agreement"], saved)]
        scores[len(families)] += f" ±{100 * spread:.1f}" if spread else ""
        rows.append([f"`{run['name']}`", *scores, f"{run['cache_bytes'] / 1e3:.0f}"])
    rows.insert(1, ["---", *["---:"] * (len(rows[0]) - 1)])
    whole = found.pop("off", [])
    series = [(name, STYLES[i % len(STYLES)], sorted(whole + points)) for i, (name, points) in enumerate(found.items())]
    names = (
        "prefill operations saved",
        f"{content['model']}: correct, mean over families, {content['questions']} questions",
    )
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return standalone(curve_chart(series, names, sorted(band), "accuracy against operations saved")), table


def left_before(vlm, picture, question, method):
    """For each visual token the layer before which it left; the depth for those that stayed to the end."""
    prompt, tower = vlm.prepare(picture, question), vlm.tower()
    hidden, last = vlm.embed(prompt, tower=tower), {}

    def note(index, tokens):
        last.update({place: index + 1 for place in tokens.positions[tokens.is_visual].tolist()})
        return tokens

    vlm.advance(hidden, prompt.is_visual, KVCache(vlm.config), then(method, note), tower=tower)
    return [last.get(place, 0) for place in prompt.is_visual.nonzero()[0].tolist()]


def sheet(vlm, picture, question, texts, columns=4):
    """One small picture a method: patches that left are covered, the more the earlier they did."""
    data = base64.b64encode(picture.read_bytes()).decode()
    body = [f'<defs><image id="seen" width="{SIDE}" height="{SIDE}" href="data:image/png;base64,{data}"/></defs>']
    for number, words in enumerate(texts):
        x, y = GAP + (number % columns) * (SIDE + GAP), GAP + (number // columns) * (SIDE + 2 * GAP + 8)
        left = left_before(vlm, picture, question, method_of(words))
        across = round(len(left) ** 0.5)
        size = SIDE / across
        body.append(f'<use href="#seen" x="{x}" y="{y}"/>')
        for patch, layer in enumerate(left):
            if layer < vlm.config.layers:
                covered = 0.92 - 0.5 * layer / vlm.config.layers
                place = f'x="{x + patch % across * size:.1f}" y="{y + patch // across * size:.1f}"'
                body.append(
                    f'<rect {place} width="{size:.1f}" height="{size:.1f}" fill="#14181d" opacity="{covered:.2f}"/>'
                )
        body.append(text(x + SIDE / 2, y + SIDE + 14, words.split(":")[0]))
    return standalone(svg(body, 2 * GAP + -(-len(texts) // columns) * (SIDE + 2 * GAP + 8), question))


def lower_half(vlm, questions, words):
    """Of the visual tokens that reach the last layer, the share that lies in the lower half of a square picture."""
    kept, below = 0, 0
    for question in questions:
        left = left_before(vlm, question.image, question.question, method_of(words))
        stayed = [place for place, layer in enumerate(left) if layer == vlm.config.layers]
        kept, below = kept + len(stayed), below + sum(place >= len(left) // 2 for place in stayed)
    return below / kept


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("methods", "curves", "sheet", "bottom"))
    parser.add_argument("files", nargs="*")
    parser.add_argument("--model")
    parser.add_argument("--saved", nargs="+", type=float, default=[0.25, 0.4, 0.6])
    parser.add_argument("--question", default="What color is the star?")
    chosen = parser.parse_args()
    if chosen.what == "curves":
        drawing, table = curves(chosen.files[0])
        pathlib.Path(chosen.files[1]).write_text(drawing, encoding="utf-8")
        print(table)
        return
    vlm, picture = minivtw.load(chosen.model), HERE / "scene.png"
    if chosen.what == "bottom":
        folder, *methods = chosen.files
        asked = read_questions(folder, ("image", "family", "question", "answer"))[::16]
        for words in methods:
            print(f"{lower_half(vlm, asked, words):6.1%} of what {words} keeps, on {len(asked)} questions")
        return
    is_visual = vlm.prepare(picture, chosen.question).is_visual
    counts = int(is_visual.sum()), int((~is_visual).sum())
    texts = [text for saved in chosen.saved for text in at_budget(vlm.config, *counts, saved)]
    if chosen.what == "methods":
        print(*texts, sep="\n")
        return
    kept = [words.replace("seed=0-4", "seed=0") for words in at_budget(vlm.config, *counts, chosen.saved[-1])]
    shown = [words for words in kept if not words.startswith(("freeze", "withdraw"))]
    pathlib.Path(chosen.files[0]).write_text(sheet(vlm, picture, chosen.question, shown), encoding="utf-8")


if __name__ == "__main__":
    main()
