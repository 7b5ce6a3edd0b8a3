"""Pictures, tables and sentences in their places: what every script of this folder writes with.

Tables and findings go between the marks `<!-- NAME -->` and `<!-- end -->` of a page under docs/. What is longer than a
few rows goes to docs/data/, beside the chapters, in the same way.
"""

import hashlib
import pathlib
from collections import Counter
from typing import NamedTuple

from drawing import standalone

from minivtw.checkpoints.hub import shipped_folder
from minivtw.inputs.questions import read_questions
from minivtw.vlm import VLM

HERE = pathlib.Path(__file__).parent
CALLED = {"embedded": "minivtw-tiny", "plain": "plain minivtw-tiny", "smol": "minivtw-smol"}  # in titles
WEIGHTS = {"tiny": "minivtw-tiny/model.safetensors", "smol": "minivtw-smol/graft.safetensors"}


def write(name, drawing, title):
    (HERE / f"{name}.svg").write_text(standalone(drawing, title), encoding="utf-8")
    print(f"{name}.svg", flush=True)


def fill(page, name, content):
    """Put a table or a finding between its marks."""
    path = HERE.parent / page
    before, rest = path.read_text(encoding="utf-8").split(f"<!-- {name} -->\n")
    after = rest[rest.index("<!-- end -->") :]
    path.write_text(f"{before}<!-- {name} -->\n{content}\n{after}", encoding="utf-8")
    print(f"\n{name}\n{content}", flush=True)


def table(heading, rows):
    """Markdown; what is wider than a page stands upright, one row per layer."""
    if len(heading) > 14:
        heading, *rows = zip(heading, *rows)
        heading = [heading[0] if heading[0].endswith("layer") else "layer", *heading[1:]]
    lines = [heading, ["---"] + ["---:"] * (len(heading) - 1), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def weights_sha256(name):
    """Of the weights in this repository that figures about a model rest on."""
    folder, _, file = WEIGHTS[name].partition("/")
    return hashlib.sha256((shipped_folder(folder) / file).read_bytes()).hexdigest()


def questions_of(folder, families=None):
    """The questions that `weights/recipe/scenes.py --evaluation` wrote; of some families, or of all."""
    questions = read_questions(folder, ("image", "family", "question", "answer"))
    return [question for question in questions if families is None or question.family in families]


def some_of(questions, most):
    """The first `most` questions of each family."""
    counted = Counter()
    for question in questions:
        counted[question.family] += 1
        if counted[question.family] <= most:
            yield question


def embedded(vlm, picture, question):
    """A question about a picture as the decoder gets it."""
    prompt = vlm.prepare(picture, question)
    return vlm.embed(prompt)


def embedded_all(vlm, questions):
    """Questions as the decoder gets them, one after the other."""
    for question in questions:
        yield embedded(vlm, question.image, question.question)


def names(vlm, token_id):
    """A token as people would write it, for a table or a drawing."""
    return vlm.tokenizer.decode([int(token_id)], skip_special_tokens=False).strip().replace("|", "\\|") or " "


class About(NamedTuple):
    """One chapter's measurements."""

    models: dict[str, VLM]  # by name; the first is the one that the chapter is about
    questions: list
    counts: dict[str, int]  # how many questions of each family a step asks
    criteria_page: str
    page: str  # sentences and short tables
    data: str  # long tables
    suffix: str  # of pictures that show one model
    alone_from: int  # the layer from which on one token alone may look

    @property
    def vlm(self):
        return next(iter(self.models.values()))

    @property
    def called(self):
        return CALLED[next(iter(self.models))]

    def some(self, step):
        return list(some_of(self.questions, self.counts[step]))
