"""Whose picture is the answer about, if the text reads the other one's visual tokens in a few layers?

    python weights/recipe/scenes.py --evaluation QUESTIONS
    python docs/pictures/swaps.py QUESTIONS [--model smol] [--pairs 60]

For every pair of pictures with the same question and different answers, and every window of layers: does the greedy
answer become the other picture's (`analysis/migration.py`, `swapped`)? Writes docs/data/swaps-NAME.json while it
measures and goes on from there, then draws docs/pictures/swaps-NAME.svg and fills in the chapter's table.
"""

import argparse
import json
import pathlib
from collections import defaultdict

import numpy as np
from PIL import ImageOps

import minivtw
from minivtw.analysis import charts, migration
from minivtw.cli import write_whole
from minivtw.inputs.images import open_image
from minivtw.inputs.questions import Question, digest, read_questions
from minivtw.model.tokens import EmbeddedPrompt
from minivtw.search import LONGEST_ANSWER, walk

DATA = pathlib.Path(__file__).parent.parent / "data"
WINDOW = 3  # layers
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
    """For each window, whether the answer becomes the other picture's; None where the model answers both alike."""
    walks = []
    for each in (picture, other):
        prompt = vlm.prepare(each, question)
        walks.append(walk(vlm.decoder, EmbeddedPrompt(vlm.embed(prompt), prompt.is_visual), LONGEST_ANSWER, vlm.stop_ids))
    own, others = walks
    if own.answer == others.answer:
        return None
    longer = migration.followed_by(vlm.decoder, own.entering, others.answer)
    return [
        int(migration.says_after_swap(vlm.decoder, longer, others.entering, others.answer, window)) for window in windows
    ]


def measure(vlm, questions, name, most):
    """Pair after pair, one of each kind at a time; what was measured before is kept. Returns {kind: rows}."""
    path, sha256 = DATA / f"swaps-{name}.json", digest(questions)
    windows = windows_of(vlm.config.layers)
    rows = {kind: [] for kind in KINDS}
    if path.exists() and (before := json.loads(path.read_text(encoding="utf-8")))["questions"] == sha256:
        rows = before["rows"]
    left = {kind: list(pairs_of(questions, kind))[len(rows[kind]) :] for kind in KINDS}
    while waiting := {kind: left[kind] for kind in KINDS if left[kind] and changed(rows[kind]) < most}:
        for kind, pairs in waiting.items():
            rows[kind].append(whose_answer(vlm, *pairs.pop(0), windows))
        content = {"model": name, "window": WINDOW, "questions": sha256, "rows": rows}
        write_whole(path, json.dumps(content).replace("], [", "],\n ["))
        print({kind: changed(rows[kind]) for kind in KINDS}, flush=True)
    return {kind: np.array([row for row in rows[kind] if row]) for kind in KINDS}  # (pairs, windows)


def changed(rows):
    """How many pairs count: those about which the model says different things."""
    return sum(row is not None for row in rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", help="a folder that scenes.py --evaluation wrote")
    parser.add_argument("--model", help="(default: the embedded model)")
    parser.add_argument("--pairs", type=int, default=60, help="of each kind (default: 60)")
    chosen = parser.parse_args()
    vlm = minivtw.load(chosen.model)
    shares = measure(vlm, read_questions(chosen.questions, Question._fields), chosen.model or "tiny", chosen.pairs)
