"""The one page computes what the package does."""

import importlib.util
import json
import pathlib

import numpy as np
import pytest

import minivtw
from tests.parity import TOLERANCE, relative_error

ROOT = pathlib.Path(__file__).parent.parent
SAMPLES = ROOT / "weights" / "minivtw-tiny" / "samples"
QUESTIONS = [json.loads(line) for line in (SAMPLES / "questions.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def pico():
    spec = importlib.util.spec_from_file_location("pico", ROOT / "docs" / "pico.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def vlm():
    return minivtw.load()


@pytest.mark.parametrize("asked", QUESTIONS, ids=[asked["image"] for asked in QUESTIONS])
def test_answers_logits_and_caches_are_the_package_s(pico, vlm, asked):
    for layer in (None, 5, 2):
        logits = []
        observe = lambda name, array: logits.append(array) if name == "decoder.logits" else None
        ours = vlm.answer(SAMPLES / asked["image"], asked["question"], withdraw=layer, observe=observe)
        text, token_ids, steps, tokens_per_layer = pico.answer(SAMPLES / asked["image"], asked["question"], layer)
        assert (text, token_ids) == (ours.text, ours.token_ids)
        assert tokens_per_layer == ours.stats["cache"]["tokens_per_layer"]
        assert relative_error(steps, np.array(logits)) < TOLERANCE


def test_it_is_one_page_without_the_package():
    lines = (ROOT / "docs" / "pico.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 119 and not any(
        line.startswith(("class ", "import minivtw", "from minivtw")) for line in lines
    )
