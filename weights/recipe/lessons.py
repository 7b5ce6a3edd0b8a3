"""What training asks about a scene: the seven families, in more wordings, and a few kinds of question beside them.

Beside them stands what no evaluation asks: where an object is (that teaches relations), whether there is a colour or a
shape at all (that teaches existence), captions from top to bottom, and digits named by their figure. The share of each
kind follows how slowly it is learnt: existence and relation come last.
"""

from typing import NamedTuple

import numpy as np
from questions import (
    FAMILIES,
    NUMBERS,
    Question,
    Things,
    attribute,
    balanced,
    listing,
    name_of,
    relation,
    with_article,
    with_letters,
)
from world import CANVAS, COLORS, SHAPES

REPHRASED = 0.2  # the share of questions that are not in the wording of the evaluation
WORDINGS = {
    "attribute": [
        ("What color is the", "What colour is the"),
        ("What color is the", "Which color is the"),
        ("What shape is the", "Which shape is the"),
        (" object?", " thing?"),
    ],
    "reading": [
        ("What number is in the image?", "What number do you see?"),
        ("What number is in the image?", "What is the number in the image?"),
        ("What number is in the image?", "Which digit is in the image?"),
        ("What number is in the image?", "Read the number."),
    ],
    "count": [(" are there?", " are in the image?"), (" are there?", " do you see?"), ("How many", "Count: how many")],
    "existence": [(" in the image?", "?"), (" in the image?", " in the picture?"), ("Is there", "Do you see")],
    "relation": [(" left of ", " to the left of "), (" right of ", " to the right of "), (" above ", " higher than ")],
    "choice": [(" Answer with the letter.", ""), ("What color", "Which color")],
    "place": [("Where is the", "Where do you see the"), (" object?", " thing?")],
    "caption": [
        ("Describe the image.", "What is in the image?"),
        ("Describe the image.", "Describe the picture."),
        ("Describe the image.", "List the objects."),
    ],
}


class Group(NamedTuple):
    """Turns behind one image that are padded to the same length."""

    length: int  # in tokens, question and answer
    lessons: tuple[str, ...]  # what each asks, see `offered`: one of the kinds between "or", and so on after "then"
    instead: tuple[str, ...]  # what is asked where a scene does not allow it


GROUPS = (
    Group(
        16,
        (
            *("attribute", "attribute", "reading", "count", "count", "count", "total count"),
            *("existence", "existence", "relation", "relation", "where or simple existence"),
        ),
        ("existence", "where", "count", "attribute"),
    ),
    Group(32, ("caption", "choice", "tempting choice", "tempting choice or other caption"), ("other caption",)),
)


# Any question with a short answer, for chats of several turns.
SHORT = "attribute or count or existence or relation or place or place or reading or simple existence"
PLACES_GROUPS = (
    Group(
        16,
        (
            *("attribute", "reading", "count", "count", "total count or count"),
            *("existence", "existence", "relation", "relation"),
        ),
        ("existence", "count", "attribute"),
    ),
    Group(20, ("place", "place", "place"), ("existence", "simple existence")),
    Group(32, ("choice or tempting choice", "caption or choice or tempting choice"), ("other caption",)),
    Group(40, (f"{SHORT} then {SHORT}",), ("existence", "count")),
    Group(
        60,
        (f"caption or caption or caption or {SHORT} then caption or {SHORT}", f"{SHORT} then {SHORT} then {SHORT}"),
        ("existence", "count"),
    ),
)


def rephrase(question: Question, rng: np.random.Generator) -> Question:
    """Now and then another wording of the same question."""
    if rng.random() < REPHRASED:
        wordings = WORDINGS[question.family]
        usual, other = wordings[rng.integers(len(wordings))]
        return question._replace(question=question.question.replace(usual, other))
    return question


def where(things: Things, rng: np.random.Generator) -> list[Question]:
    """The tenth of the width, then of the height, in which an object has its centre."""
    tenth = CANVAS / 10
    return [
        Question("where", f"Where is the {name_of(thing)}?", f"{int(thing.x / tenth)} {int(thing.y / tenth)}")
        for thing in things
    ]


def tempting_choice(things: Things, rng: np.random.Generator) -> list[Question]:
    """Choices among the colours that are in the picture, as far as there are any others."""
    present = {thing.color for thing in things}
    colors = sorted(rng.permutation(list(COLORS)), key=lambda color: color not in present)
    asked = [question for question in attribute(things, rng) if question.answer in COLORS]
    return [with_letters(question, colors, rng) for question in asked]


def simple_existence(things: Things, rng: np.random.Generator) -> list[Question]:
    """Whether there is a colour at all, or a shape: the first step towards both at once."""
    named = {f"{color} object": any(thing.color == color for thing in things) for color in COLORS}
    named |= {shape: any(thing.shape == shape for thing in things) for shape in SHAPES}
    return [
        Question("existence", f"Is there {with_article(name)} in the image?", "yes" if there else "no")
        for name, there in named.items()
    ]


def other_caption(things: Things, rng: np.random.Generator) -> list[Question]:
    ordered = sorted(things, key=lambda thing: thing.y)
    return [Question("caption", "Describe the image from top to bottom.", listing(ordered))]


def count_shapes(things: Things, rng: np.random.Generator) -> list[Question]:
    shapes = [thing.shape for thing in things]
    plurals = {shape: f"{shape}es" if shape == "cross" else f"{shape}s" for shape in SHAPES}
    return [
        Question("count", f"How many {plural} are there?", NUMBERS[shapes.count(shape)])
        for shape, plural in plurals.items()
    ]


def name_digits(things: Things, rng: np.random.Generator) -> dict[str, list[Question]]:
    """Questions of three families in which a digit is called by its figure; none for a scene without a digit."""
    digits = [thing for thing in things if thing.is_digit]
    if not digits:
        return {}
    digit, figure = digits[0], int(digits[0].shape)
    wrong = f"{digit.color} {(figure + 1 + rng.integers(9)) % 10}"
    # `relation` leaves digits out, so the digit is handed over as a shape and named afterwards.
    disguised = tuple(thing._replace(shape="digit") if thing is digit else thing for thing in things)
    relations = [q for q in relation(disguised, rng) if " digit" in q.question]
    return {
        "attribute": [Question("attribute", f"What color is the {digit.shape}?", digit.color)],
        "existence": [
            Question("existence", f"Is there {with_article(name_of(digit))} in the image?", "yes"),
            Question("existence", f"Is there {with_article(wrong)} in the image?", "no"),
        ],
        "relation": [q._replace(question=q.question.replace(" digit", f" {digit.shape}")) for q in relations],
    }


def offered(things: Things, rng: np.random.Generator) -> dict[str, list[Question]]:
    """Every question of every kind that training may ask about a scene, by kind."""
    kinds = {name: family(things, rng) for name, family in FAMILIES.items()}
    named = name_digits(things, rng) if rng.random() < 0.2 else {}
    for name, questions in named.items():
        kinds[name] = kinds[name] + questions
    kinds["total count"] = kinds["count"][:1]  # on its own, because the large numbers are rare otherwise
    if rng.random() < 0.25:
        kinds["count"] = count_shapes(things, rng)
    kinds |= {"where": where(things, rng), "simple existence": simple_existence(things, rng)}
    kinds["tempting choice"] = tempting_choice(things, rng)
    return {**kinds, "other caption": other_caption(things, rng)}


def draw_lessons(
    things: Things, rng: np.random.Generator, groups: tuple[Group, ...] = GROUPS
) -> list[list[tuple[Question, ...]]]:
    """The chats behind one image: for each group, its chats of one question or several."""
    kinds = offered(things, rng)

    def ask(lesson: str, instead: tuple[str, ...]) -> Question:
        kind = str(rng.choice(lesson.split(" or ")))
        if not kinds[kind]:  # no digit to read, no two objects to relate, no shape that stands alone
            kind = str(rng.choice([other for other in instead if kinds[other]]))
        question = balanced(kinds[kind], rng)
        return rephrase(question, rng) if question.family in WORDINGS else question

    return [
        [tuple(ask(turn, group.instead) for turn in lesson.split(" then ")) for lesson in group.lessons]
        for group in groups
    ]


def single_questions(things: Things, rng: np.random.Generator) -> list[Question]:
    """All questions of `draw_lessons` as one list."""
    return [question for group in draw_lessons(things, rng) for chat in group for question in chat]
