"""The embedded model's world: its evaluation sets are the same on every machine, and every answer is true."""

import ast
import hashlib
import pathlib
import sys

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

RECIPE = pathlib.Path(__file__).parent.parent / "weights" / "recipe"
sys.path.insert(0, str(RECIPE))

import drawing  # noqa: E402
import questions  # noqa: E402
import scenes  # noqa: E402
import world  # noqa: E402

HALF_A_SAMPLE = 0.5 / drawing.Style().supersampling  # pixels by which a drawn edge may be off
worlds = st.integers(0, 2**40).map(world.sample_scene)


# --- the same on every machine


def test_the_evaluation_sets_are_the_recorded_ones():
    """SHA-256 over pixels and lines of a beginning of each; nothing in them may depend on Pillow or on typefaces."""
    assert scenes.fingerprint(scenes.evaluation_set(5)) == (
        "91e206ac7651d45a9bec17b007d90fc171f733dfc39f85480508ce8298706fb4"
    )
    assert scenes.fingerprint(scenes.pairs_set(10)) == (
        "2c0d5d22efbe6349a16f4a9cd4b4f4080f649037daab7960588904b6b6ff5fac"
    )


def test_the_questions_of_the_first_seven_families_are_those_that_were_always_asked():
    """A new family has scenes of its own: it must not move the others'."""
    lines = [
        f"{scene.seed} {question.question} {question.answer}\n"
        for scene, question in questions.evaluation_questions(20)
        if question.family != "place"
    ]
    fingerprint = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert fingerprint == "20fcd919c76a69747378f439d3576605a5c7b95a410a603bdc58914bba9fdea5"


# --- drawing


@given(
    st.sampled_from(["square", "triangle", "star", "cross"]),
    st.floats(20, 46),
    st.floats(-12, 12),
    st.floats(60, 190),
    st.floats(60, 190),
)
@example("square", 34.82502022874495, 0.0, 60.0, 60.0)
def test_polygons_cover_as_many_pixels_as_their_area(shape, radius, turn, x, y):
    """To half a sample along every edge, and its square at every corner. Of 50,000 drawn, with edges near samples, the
    farthest off: a square by all of it, a cross by 0.997 of it, a triangle by 0.34, a star by 0.12."""
    thing = world.Thing(shape, "red", x, y, radius, turn, (214, 48, 49))
    corners = radius * np.array(drawing._corners(shape, drawing.Style()))  # (corners, 2)
    (across, down), (next_across, next_down) = corners.T, np.roll(corners, -1, axis=0).T
    area = abs(np.sum(across * next_down - down * next_across)) / 2  # the shoelace formula
    length = np.hypot(next_across - across, next_down - down).sum()
    cover, _, _ = drawing._coverage(thing, drawing.Style())
    most = length * HALF_A_SAMPLE + len(corners) * HALF_A_SAMPLE**2 + 1e-9  # rounded
    assert cover.sum() == pytest.approx(area, abs=most)


@given(worlds)
def test_objects_stand_where_their_scene_says(scene):
    """The mean place of an object's pixels is its centre, for the shapes that are symmetric about it.

    To a whole sample: the edges of a cross's two bars round apart, each by up to a half.
    """
    for thing in scene.things:
        if thing.shape not in ("circle", "square", "cross", "ring"):
            continue
        cover, top, left = drawing._coverage(thing, drawing.Style())
        rows, columns = np.mgrid[: cover.shape[0], : cover.shape[1]] + 0.5
        mean = np.array([(cover * columns).sum() + cover.sum() * left, (cover * rows).sum() + cover.sum() * top])
        np.testing.assert_allclose(mean / cover.sum(), (thing.x, thing.y), atol=2 * HALF_A_SAMPLE)


# --- places


def named(phrase, things):
    """The objects that a noun phrase such as `red star`, `star`, `red object` or `number` may mean."""
    words = phrase.split()
    kinds = {"object": lambda thing: True, "number": lambda thing: thing.is_digit}
    is_kind = kinds.get(words[-1], lambda thing: thing.shape == words[-1])
    return [thing for thing in things if is_kind(thing) and (len(words) == 1 or thing.color == words[0])]


def ninth(place):
    """The box (left, right, top, bottom) of one of the nine places, in thirds of the canvas."""
    words = place.split()
    column = 0 if "left" in words else 2 if "right" in words else 1
    row = 0 if "top" in words else 2 if "bottom" in words else 1
    return np.array([column, column + 1, row, row + 1]) * world.CANVAS / 3


@given(worlds)
def test_places_are_true_and_clear(scene):
    clearance = questions.CLEARANCE
    for asked in questions.place(scene.things, np.random.default_rng(0)):
        if asked.question.startswith("Where"):
            (thing,) = named(asked.question.removeprefix("Where is the ").removesuffix("?"), scene.things)
            place = asked.answer
        else:
            place = asked.question.removeprefix("What is in the ").removesuffix("?").removesuffix(" corner")
            (thing,) = [one for one in scene.things if questions.with_article(questions.name_of(one)) == asked.answer]
            left, right, top, bottom = ninth(place) + np.array([-1, 1, -1, 1]) * (clearance - 1e-6)
            inside = [one for one in scene.things if left <= one.x <= right and top <= one.y <= bottom]
            assert inside == [thing]
        left, right, top, bottom = ninth(place)
        margins = [thing.x - left, right - thing.x, thing.y - top, bottom - thing.y]
        assert all(margin >= clearance - 1e-6 for margin in margins)


# --- chats of two turns


def test_pairs_ask_about_two_objects_and_are_answered_truly():
    for scene, pair in questions.evaluation_pairs(60):
        about = []
        for asked in pair:
            phrase = asked.question.removesuffix("?").removesuffix(" in the image")
            phrase = phrase.removeprefix("What number is").removeprefix("What color is the ")
            phrase = phrase.removeprefix("What shape is the ").removeprefix("Where is the ") or "number"
            (thing,) = named(phrase, scene.things)
            right = {"Where": questions.place_of(thing), "What color": thing.color}
            assert asked.answer == right.get(asked.question.split(" is ")[0], thing.shape)
            about.append(thing)
        assert about[0] != about[1]


# --- the recipe's files


def test_no_file_of_the_recipe_imports_in_a_circle():
    imports = {}
    for path in RECIPE.glob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        imports[path.stem] = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    while imports:
        free = [name for name, needed in imports.items() if not needed & imports.keys()]
        assert free, f"these import each other: {sorted(imports)}"
        for name in free:
            del imports[name]
