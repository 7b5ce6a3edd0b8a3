"""What can be asked about a scene: eight families of question, each with one right answer.

A family is a function from the objects of a scene to every question of that family which the scene allows, in the
wording of the evaluation. `balanced` picks among them so that no answer is commoner than another;
`evaluation_questions` balances over the whole set. Wordings met only in training are in `lessons.py`.
"""

from collections.abc import Callable, Iterator
from itertools import permutations
from typing import NamedTuple

import numpy as np
from world import CANVAS, COLORS, SHAPES, Scene, Thing, evaluation_seed, sample_scene

NUMBERS = ("zero", "one", "two", "three", "four", "five")
LETTERS = "ABCD"
LEAST_DISTANCE = 30  # pixels between two centres along the axis of a relation
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # steps along x and y
COLUMNS, ROWS = ("left", "", "right"), ("top", "", "bottom")  # the thirds of the canvas
CORNERS = tuple(f"{row} {column}" for row in ("top", "bottom") for column in ("left", "right"))
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
CLEARANCE = 10  # pixels between the centre of an object and the border of the third in which it is said to lie
FIRST_PAIR = 50_000_000  # where the scenes of the chats begin, far behind those of the families


class Question(NamedTuple):
    family: str
    question: str
    answer: str


Things = tuple[Thing, ...]


def with_article(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def name_of(thing: Thing) -> str:
    return f"{thing.color} {thing.shape}"


def attribute(things: Things, rng: np.random.Generator) -> list[Question]:
    """The colour of the only object of a shape, the shape of the only object of a colour; digits aside."""
    shapes, colors = [thing.shape for thing in things], [thing.color for thing in things]
    found = []
    for thing in things:
        if thing.is_digit:
            continue
        if shapes.count(thing.shape) == 1:
            found.append(Question("attribute", f"What color is the {thing.shape}?", thing.color))
        if colors.count(thing.color) == 1:
            found.append(Question("attribute", f"What shape is the {thing.color} object?", thing.shape))
    return found


def reading(things: Things, rng: np.random.Generator) -> list[Question]:
    return [Question("reading", "What number is in the image?", thing.shape) for thing in things if thing.is_digit]


def count(things: Things, rng: np.random.Generator) -> list[Question]:
    """All objects, and those of each colour, none among them."""
    colors = [thing.color for thing in things]
    questions = [Question("count", "How many objects are there?", NUMBERS[len(things)])]
    for color in COLORS:
        questions.append(Question("count", f"How many {color} objects are there?", NUMBERS[colors.count(color)]))
    return questions


def existence(things: Things, rng: np.random.Generator) -> list[Question]:
    """As many "no" as "yes"; half of the "no" are of a colour and a shape that are in the picture, but apart.

    A third of the scenes (those of one object, say) have no such pair, so the others ask for it three times in four.
    """
    there = {(thing.color, thing.shape) for thing in things}
    colors, shapes = {thing.color for thing in things}, {thing.shape for thing in things}
    present = sorted(pair for pair in there if pair[1] in SHAPES)
    absent = [(color, shape) for color in COLORS for shape in SHAPES if (color, shape) not in there]
    apart = [pair for pair in absent if pair[0] in colors and pair[1] in shapes]
    elsewhere = [pair for pair in absent if pair not in apart]
    questions = []
    for pair in present:
        kind = apart if apart and rng.random() < 0.75 else elsewhere
        lacking = kind[rng.integers(len(kind))]
        for (color, shape), answer in ((pair, "yes"), (lacking, "no")):
            name = with_article(f"{color} {shape}")
            questions.append(Question("existence", f"Is there {name} in the image?", answer))
    return questions


def is_apart(question: Question, things: Things) -> bool:
    """Whether an existence question names a colour and a shape that are both in the picture."""
    color, shape = question.question.split()[3:5]
    return color in {thing.color for thing in things} and shape in {thing.shape for thing in things}


def relation(things: Things, rng: np.random.Generator) -> list[Question]:
    """Every ordered pair of objects that stand clearly apart along an axis, asked both ways; digits aside."""
    questions = []
    for one, other in permutations([thing for thing in things if not thing.is_digit], 2):
        for words, (step_x, step_y) in RELATIONS.items():
            distance = step_x * (one.x - other.x) + step_y * (one.y - other.y)
            if abs(distance) >= LEAST_DISTANCE:
                text = f"Is the {name_of(one)} {words} the {name_of(other)}?"
                questions.append(Question("relation", text, "yes" if distance > 0 else "no"))
    return questions


def choice(things: Things, rng: np.random.Generator) -> list[Question]:
    """The questions for a colour, with four letters to choose from."""
    asked = [question for question in attribute(things, rng) if question.answer in COLORS]
    return [with_letters(question, list(rng.permutation(list(COLORS))), rng) for question in asked]


def with_letters(asked: Question, colors: list[str], rng: np.random.Generator) -> Question:
    """A question for a colour, with four letters: the answer's, and of `colors` the first three others."""
    letter = int(rng.integers(4))
    options = [str(color) for color in colors if color != asked.answer][:3]
    options.insert(letter, asked.answer)
    listed = " ".join(f"{name}. {option}" for name, option in zip(LETTERS, options))
    return Question("choice", f"{asked.question} {listed} Answer with the letter.", LETTERS[letter])


def caption(things: Things, rng: np.random.Generator) -> list[Question]:
    ordered = sorted(things, key=lambda thing: thing.x)
    return [Question("caption", "Describe the image.", listing(ordered))]


def listing(things: list[Thing]) -> str:
    """`a red star, a blue ring and a white square.`"""
    *names, last = [with_article(name_of(thing)) for thing in things]
    return f"{', '.join(names)} and {last}." if names else f"{last}."


def ninth(x: float, y: float) -> str:
    """The ninth of the canvas in which a point lies, one of PLACES."""
    column, row = (min(max(int(3 * center / CANVAS), 0), 2) for center in (x, y))
    return f"{ROWS[row]} {COLUMNS[column]}".strip() or "center"


def ninths_near(thing: Thing) -> set[str]:
    """Where the centre of an object lies, and what else lies within CLEARANCE of it across and down."""
    moves = (-CLEARANCE, CLEARANCE)
    return {ninth(thing.x + across, thing.y + down) for across in moves for down in moves}


def place_of(thing: Thing) -> str | None:
    """The ninth in which an object lies, one of PLACES; None where its centre is too close to another."""
    near = ninths_near(thing)
    return near.pop() if len(near) == 1 else None


def place(things: Things, rng: np.random.Generator) -> list[Question]:
    """Where an object is, called by any name that singles it out; what the only object in a corner or the centre is."""
    questions = []
    shapes, colors = [thing.shape for thing in things], [thing.color for thing in things]
    for thing in things:
        where = place_of(thing)
        if where is None:
            continue
        names = [name_of(thing)]
        if thing.is_digit:
            names.append("number")
        elif shapes.count(thing.shape) == 1:
            names.append(thing.shape)
        if colors.count(thing.color) == 1:
            names.append(f"{thing.color} object")
        questions += [Question("place", f"Where is the {name}?", where) for name in names]
        if where in (*CORNERS, "center") and sum(where in ninths_near(other) for other in things) == 1:
            asked = where if where == "center" else f"{where} corner"
            questions.append(Question("place", f"What is in the {asked}?", with_article(name_of(thing))))
    return questions


FAMILIES: dict[str, Callable[[Things, np.random.Generator], list[Question]]] = {
    family.__name__: family for family in (attribute, reading, count, existence, relation, choice, caption, place)
}


def balanced(questions: list[Question], rng: np.random.Generator) -> Question:
    """One of the questions: first an answer, every one as likely, then a question that has it."""
    answers = sorted({question.answer for question in questions})
    answer = answers[rng.integers(len(answers))]
    questions = [question for question in questions if question.answer == answer]
    return questions[rng.integers(len(questions))]


def every_question(scene: Scene) -> list[Question]:
    """What the evaluation could ask about a scene."""
    rng = np.random.default_rng([scene.seed, 4])
    return [question for family in FAMILIES.values() for question in family(scene.things, rng)]


def even_answers(family: str) -> list[str]:
    """The answers that the evaluation of a family goes through in turn; none where the answer is a text."""
    return {
        "attribute": [*COLORS, *SHAPES],
        "reading": list("0123456789"),
        "count": list(NUMBERS),
        "existence": ["yes", "no"],
        "relation": ["yes", "no"],
        "choice": list(LETTERS),
        "caption": [],
        "place": [*PLACES, *(f"in the {corner} corner?" for corner in CORNERS), "in the center?"],
    }[family]


def has_answer(question: Question, wanted: str | None) -> bool:
    """Whether a question is of the wanted kind, one of `even_answers`: its answer, or the end of what it asks."""
    return wanted is None or wanted == question.answer or question.question.endswith(f" {wanted}")


def evaluation_questions(per_family: int) -> Iterator[tuple[Scene, Question]]:
    """`per_family` questions of each family, at most one a scene, the answers of a family as even as they go."""
    for block, (name, family) in enumerate(FAMILIES.items()):
        index = block * 1_000_000  # every family has scenes of its own
        answers = even_answers(name)
        for number in range(per_family):
            wanted = answers[number % len(answers)] if answers else None
            while True:
                scene = sample_scene(evaluation_seed(index))
                index += 1
                rng = np.random.default_rng([scene.seed, 4])
                questions = [q for q in family(scene.things, rng) if has_answer(q, wanted)]
                if (name, wanted) == ("existence", "no"):  # exactly every other one
                    questions = [q for q in questions if is_apart(q, scene.things) == (number % 4 == 1)]
                if questions:
                    yield scene, questions[rng.integers(len(questions))]
                    break


def is_about(question: Question, thing: Thing) -> bool:
    """Whether a question of attribute, reading or place names an object. One that could name two is never asked."""
    names = (thing.shape, name_of(thing), f"{thing.color} object")
    is_named = any(question.question.endswith(f" the {name}?") for name in names)
    return is_named or (thing.is_digit and " number" in question.question)


def pair_about(things: Things, wanted: str, rng: np.random.Generator) -> tuple[Question, Question] | None:
    """Two questions about two objects, the second with the wanted answer; None where there are none such."""
    asked = [question for family in (attribute, reading, place) for question in family(things, rng)]
    by_object = [[question for question in asked if is_about(question, thing)] for thing in things]
    pairs = [
        (first, second)
        for one, other in permutations(by_object, 2)
        for second in other
        if second.answer == wanted
        for first in one
    ]
    return pairs[rng.integers(len(pairs))] if pairs else None


def evaluation_pairs(pairs: int) -> Iterator[tuple[Scene, tuple[Question, Question]]]:
    """Chats of two turns about two objects of a picture, the second answers as even as they go."""
    answers, index = (*COLORS, *SHAPES, *PLACES), FIRST_PAIR
    for number in range(pairs):
        chat = None
        while chat is None:
            scene = sample_scene(evaluation_seed(index))
            index += 1
            chat = pair_about(scene.things, answers[number % len(answers)], np.random.default_rng([scene.seed, 4]))
        yield scene, chat
