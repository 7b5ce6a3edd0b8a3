"""Chapter 8's table and pictures: which methods to try, what they scored, which patches they keep.

python docs/pictures/shelf.py methods [--model MODEL] [--saved 0.25 0.4 0.6]     method texts at equal budgets
python docs/pictures/shelf.py ladder SCORES.json … shelf.svg   from what `minivtw.evaluate --json` wrote; prints the tables
python docs/pictures/shelf.py sheet kept.svg [--model MODEL]   the patches that each keeps for one question
python docs/pictures/shelf.py bottom QUESTIONS METHOD …        how much of what it keeps lies in the lower half
"""

import base64
import json
import pathlib
from html import escape

from drawing import options, standalone

import minivtw
from minivtw.counting import plain_run, prompt_flops
from minivtw.inputs.questions import read_questions
from minivtw.methods.shelf import method_of
from minivtw.methods.withdrawal import then
from minivtw.model.cache import KVCache
from minivtw.model.tokens import LayerCount
from minivtw.page.charts import LEFT, RIGHT, WIDTH, line, rectangle, svg, text

HERE = pathlib.Path(__file__).parent
SIDE, GAP = 108, 12  # pixels of a picture on the contact sheet
BUDGETS = (0.25, 0.4, 0.6)  # shares of the prefill's operations
NAMES, ROW, LEAST = (
    LEFT + 60,
    17,
    0.35,
)  # of the ladder: room for names, height of a row, the lowest score that is drawn


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
    run = [LayerCount(words + some, words + busy, words + some, 0) for some, busy in zip(entered, worked)]
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


def short(run):
    """What a run is called beside its dot."""
    return "stored" if run["name"] == "auto" else (run["method"] or "off").split(":")[0]


def saved_by(run):
    return 1 - run["prefill_flops"] / run["prefill_flops_without_withdrawal"]


def panels(content):
    """[(budget, its runs, the best first)] of one evaluation; every run goes to the nearest budget."""
    by_budget = {budget: [] for budget in BUDGETS}
    for run in content["runs"]:
        if run["method"]:
            by_budget[min(BUDGETS, key=lambda budget: abs(saved_by(run) - budget))].append(run)
    ranked = ((budget, sorted(runs, key=lambda run: -run["mean"])) for budget, runs in by_budget.items())
    return [(budget, runs) for budget, runs in ranked if len(runs) > 1]


def ladder(contents):
    """A dot per method, the best at the top, a panel for every model and budget; random is a band, places are hollow dots."""
    across = lambda share: NAMES + (max(share, LEAST) - LEAST) / (1 - LEAST) * (WIDTH - NAMES - RIGHT)
    body, y = [], 4
    for content in contents:
        whole = next(run for run in content["runs"] if run["name"] == "off")
        for budget, runs in panels(content):
            title = f"{content['model']}, {content['questions']} questions, about {budget:.0%} of the prefill saved"
            body.append(text(4, y + 16, title, "start", "strong"))
            top, y = y + 26, y + 26 + ROW * len(runs)
            for tick in range(40, 101, 10):
                x = across(tick / 100)
                anchor = "end" if tick == 100 else "middle"
                body += [line(x, top, x, y, "grid"), text(x, y + 14, f"{tick}%", anchor)]
            for run in runs:
                if short(run) == "random":
                    low, high = (across(run["mean"] + side * run.get("spread", {}).get("mean", 0)) for side in (-1, 1))
                    box = rectangle(low, top, max(high - low, 1), y - top, "fill other")
                    body.append(f'<g opacity="0.45">{box}</g>')
            body.append(line(across(whole["mean"]), top, across(whole["mean"]), y, "eta"))
            for row, run in enumerate(runs):
                middle = top + ROW * (row + 0.5)
                tip = f"{run['name']}: {run['mean']:.1%} correct, {saved_by(run):.1%} saved"
                mean, place = across(run["mean"]), run["accuracy"].get("place")
                if place is not None:
                    body.append(f'<circle cx="{across(place):.1f}" cy="{middle:.1f}" r="4" class="line sink"/>')
                dot = f'<circle cx="{mean:.1f}" cy="{middle:.1f}" r="4.5" class="fill visual"/>'
                body.append(f"<g>{dot}<title>{escape(tip)}</title></g>")
                kind = "strong" if short(run) in ("withdraw", "freeze", "stored") else ""
                body.append(text(NAMES - 10, middle + 4.5, short(run), "end", kind))
            y += 26
    x = NAMES
    for mark, words in (("fill visual", "correct"), ("line sink", "on places"), ("box", "random ± σ")):
        circle = f'<circle cx="{x + 5:.1f}" cy="{y + 4:.1f}" r="4.5" class="{mark}"/>'
        box = f'<g opacity="0.45">{rectangle(x, y - 2, 10, 12, "fill other")}</g>'
        body += [box if mark == "box" else circle, text(x + 16, y + 9, words, "start")]
        x += 112
    label = "one dot per method, the best at the top"
    return standalone(svg(body, y + 20, label), "Right answers of every method at equal budgets")


def table(content):
    """The scores of one evaluation as a Markdown table."""
    families = list(content["runs"][0]["accuracy"])
    rows = [["method", *families, "mean", "unchanged", "saved", "cache kB"]]
    rows.append(["---", *["---:"] * (len(rows[0]) - 1)])
    for run in content["runs"]:
        spread = run.get("spread", {}).get("mean")
        shares = (*run["accuracy"].values(), run["mean"], run["agreement"], saved_by(run))
        scores = [f"{100 * value:.1f}" for value in shares]
        scores[len(families)] += f" ±{100 * spread:.1f}" if spread else ""
        rows.append([f"`{run['name']}`", *scores, f"{run['cache_bytes'] / 1e3:.0f}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def left_before(vlm, picture, question, method):
    """For each visual token the layer before which it left; the depth for those that stayed to the end."""
    prompt, last = vlm.prepare(picture, question), {}

    def note(index, tokens):
        last.update({place: index + 1 for place in tokens.positions[tokens.is_visual].tolist()})
        return tokens

    vlm.advance(vlm.embed(prompt), KVCache(vlm.config), then(method, note))
    return [last.get(place, 0) for place in prompt.is_visual.nonzero()[0].tolist()]


def sheet(vlm, picture, question, texts, columns=4):
    """One small image per method: patches that left are covered, the more the earlier they did."""
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
    height = 2 * GAP + -(-len(texts) // columns) * (SIDE + 2 * GAP + 8)
    return standalone(svg(body, height, question), "The patches that each method keeps (dark: dropped)")


def lower_half(vlm, questions, words):
    """Of the visual tokens that reach the last layer, the share that lies in the lower half of a square picture."""
    kept, below = 0, 0
    for question in questions:
        left = left_before(vlm, question.image, question.question, method_of(words))
        stayed = [place for place, layer in enumerate(left) if layer == vlm.config.layers]
        kept, below = kept + len(stayed), below + sum(place >= len(left) // 2 for place in stayed)
    return below / kept


def main():
    parser = options(__doc__)
    parser.add_argument("what", choices=("methods", "ladder", "sheet", "bottom"))
    parser.add_argument("files", nargs="*")
    parser.add_argument("--model")
    parser.add_argument("--saved", nargs="+", type=float, default=BUDGETS)
    parser.add_argument("--question", default="What color is the star?")
    chosen = parser.parse_args()
    if chosen.what == "ladder":
        *scores, drawing = map(pathlib.Path, chosen.files)
        contents = [json.loads(path.read_text(encoding="utf-8")) for path in scores]
        drawing.write_text(ladder(contents), encoding="utf-8")
        print(*map(table, contents), sep="\n\n")
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
