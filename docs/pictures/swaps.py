"""Whose picture is the answer about, if the text reads the other one's visual tokens in a few layers?

    python weights/recipe/scenes.py --evaluation QUESTIONS
    python docs/pictures/swaps.py QUESTIONS [--model smol] [--pairs 60]

For every pair of pictures with the same question and different answers, and every window of layers: does the greedy
answer become the other picture's (`analysis/migration.py`, `swapped`)? Writes docs/data/swaps-NAME.json while it
measures and goes on from there, then draws docs/pictures/swaps-NAME.svg and fills in the chapter's table.
"""

import json

import instruments
import knock_outs
import numpy as np
from drawing import options
from filling import HERE, embedded, fill, questions_of, table, weights_sha256, write
from PIL import ImageOps

import minivtw
from minivtw.analysis import migration
from minivtw.inputs.opening import open_image
from minivtw.inputs.questions import digest
from minivtw.inputs.writing import write_whole
from minivtw.page import charts
from minivtw.search.layer import LONGEST_ANSWER, run_in_full

DATA = HERE.parent / "data"
CHAPTERS = {"smol": "07-a-language-model-that-sees.md", "tiny": "05-attention-leaves.md"}
WINDOW = 3  # layers
LOOKS = {"color": "visual", "digit": "sink", "existence": "nearest", "count": "mark dashed", "relation": "other"}
KINDS = {"color": "attribute", "digit": "reading", "existence": "existence", "count": "count", "relation": "relation"}


def windows_of(layers):
    """Three layers each; of a deep model those that start at an even layer, which takes half the time."""
    return [range(first, first + WINDOW) for first in range(0, layers - WINDOW + 1, 2 if layers > 20 else 1)]


def pairs_of(questions, kind):
    """(picture, other picture, question) with different right answers; a relation turns round with its picture."""
    asked = [one for one in questions if one.family == KINDS[kind]]
    if kind == "color":
        asked = [one for one in asked if one.question.startswith("What color")]
    for number, one in enumerate(asked):
        picture = open_image(one.image)
        if kind == "relation":
            turned = ImageOps.mirror if "left of" in one.question or "right of" in one.question else ImageOps.flip
            yield picture, turned(picture), one.question
            continue
        following = asked[number + 1 :] + asked[:number]
        partner = next((two for two in following if two.question == one.question and two.answer != one.answer), None)
        if partner:
            yield picture, open_image(partner.image), one.question


def whose_answer(vlm, picture, other, question, windows):
    """For each window, whether the answer becomes the other image's; None where the model answers both alike."""
    prompt, others_prompt = (embedded(vlm, each, question) for each in (picture, other))
    own, others = (run_in_full(vlm.decoder, each, LONGEST_ANSWER, vlm.stop_ids) for each in (prompt, others_prompt))
    if own.answer == others.answer:
        return None
    longer = migration.layer_inputs(vlm.decoder, knock_outs.with_answer(vlm.decoder, prompt, others.answer))
    swaps = (instruments.says_after_swap(vlm.decoder, longer, others.entering, others.answer, each) for each in windows)
    return [int(swap) for swap in swaps]


def measure(vlm, questions, name, most):
    """Pair after pair, one of each kind at a time; what was measured before is kept. Returns {kind: rows}."""
    path, of = DATA / f"swaps-{name}.json", {"questions": digest(questions), "weights": weights_sha256(name)}
    windows = windows_of(vlm.config.layers)
    rows = {kind: [] for kind in KINDS}
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if of.items() <= before.items():
        rows = before["rows"]
    left = {kind: list(pairs_of(questions, kind))[len(rows[kind]) :] for kind in KINDS}
    while waiting := {kind: left[kind] for kind in KINDS if left[kind] and changed(rows[kind]) < most}:
        for kind, pairs in waiting.items():
            rows[kind].append(whose_answer(vlm, *pairs.pop(0), windows))
        content = {"model": name, "window": WINDOW, **of, "rows": rows}
        write_whole(path, json.dumps(content).replace("], [", "],\n ["))
        print({kind: changed(rows[kind]) for kind in KINDS}, flush=True)
    return {kind: np.array([row for row in rows[kind] if row][:most]) for kind in KINDS}  # (pairs, windows)


def changed(rows):
    """How many pairs count: those about which the model says different things."""
    return sum(row is not None for row in rows)


def show(name, layers, became):
    """Draw the shares, and say for each kind where it peaks. became: {kind: (pairs, windows)}."""
    firsts = [window[0] for window in windows_of(layers)]
    series = [(kind, LOOKS[kind], rows.mean(0)) for kind, rows in became.items()]
    drawing = charts.line_chart(firsts, series, (f"layer i of minivtw-{name}: swapped in layers i to i + 2", ""))
    write(f"swaps-{name}", drawing, "Share of answers that become the other image's")
    lines = []
    for kind, rows in became.items():
        share, best = rows.mean(0), int(rows.mean(0).argmax())
        apart = [share[i] for i, first in enumerate(firsts) if abs(first - firsts[best]) >= WINDOW]
        likely = (rows[:, best].sum() + 2) / (len(rows) + 4)  # Agresti and Coull 1998: not 0 where all pairs agree
        error = np.sqrt(likely * (1 - likely) / (len(rows) + 4))
        between = f"{firsts[best]} to {firsts[best] + WINDOW - 1}"
        lines.append([kind, between, f"{share[best]:.0%} ± {error:.0%}", f"{max(apart):.0%}", len(rows)])
    heading = [
        "asked for",
        "layers that decide most",
        "becomes the other image's",
        "most in three layers apart from these",
        "pairs",
    ]
    fill(CHAPTERS[name], "swaps", table(heading, lines))


if __name__ == "__main__":
    parser = options(__doc__)
    parser.add_argument("questions", help="a folder that scenes.py --evaluation wrote")
    parser.add_argument("--model", choices=["smol"], help="(default: the embedded model)")
    parser.add_argument("--pairs", type=int, default=60, help="of each kind (default: 60)")
    chosen = parser.parse_args()
    vlm = minivtw.load(chosen.model)
    name = chosen.model or "tiny"
    show(name, vlm.config.layers, measure(vlm, questions_of(chosen.questions), name, chosen.pairs))
