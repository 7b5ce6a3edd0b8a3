"""The door `python -m minivtw.evaluate`, and how answers are scored."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import minivtw
from minivtw.analysis.scoring import described, score
from minivtw.evaluate import main
from tests.doors import assert_one_line_error, run
from tests.small_llava import write_folder


@pytest.mark.parametrize(
    "family, answer, right, points",
    [
        ("attribute", "Red.", "red", 1),
        ("attribute", "dark red", "red", 0),
        ("choice", "B.", "B", 1),
        ("choice", "b", "B", 1),
        ("existence", "", "no", 0),
        ("count", "five objects", "five", 0),
        ("caption", "A red star, a blue ring and a white square.", "a red star, a blue ring and a white square.", 1),
        ("caption", "a white square and a red star", "a red star, and a white square.", 1),  # order does not count
        ("caption", "an orange 7 and a red star.", "an orange 3 and a red star.", 1),  # any figure is a digit
        ("caption", "a red star.", "a red star and a blue ring.", 2 / 3),  # precision 1, recall 1/2
        ("caption", "a red star, a red star and a green cross.", "a red star.", 2 / 3),  # a set: repeating gains nothing
        ("caption", "", "a red star.", 0),
        ("caption", "and and , a", "a red star.", 0),
    ],
)
def test_scoring(family, answer, right, points):
    assert score(family, answer, right) == pytest.approx(points)


@given(st.sets(st.tuples(st.sampled_from(["red", "orange", "black"]), st.sampled_from(["star", "ring", "7"])), min_size=1))
def test_captions_of_the_world_are_read_back(pairs):
    words = [f"{'an' if color == 'orange' else 'a'} {color} {shape}" for color, shape in sorted(pairs)]
    caption = ", ".join(words[:-1]) + (" and " if words[1:] else "") + words[-1] + "."
    assert described(caption) == {(color, "digit" if shape == "7" else shape) for color, shape in pairs}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small random model, and a folder of six questions of which it answers two, because its own answers are in it."""
    model, folder = write_folder(tmp_path_factory.mktemp("model")), tmp_path_factory.mktemp("questions")
    vlm, lines = minivtw.load(model), []
    for index in range(6):
        Image.fromarray(np.random.default_rng(index).integers(0, 255, (12, 12, 3), np.uint8)).save(folder / f"{index}.png")
        said = vlm.answer(folder / f"{index}.png", "Hm?", withdraw=None, max_new_tokens=64).text
        answer = said if index in (0, 3) else "something else"
        lines.append({"image": f"{index}.png", "family": "ab"[index // 3], "question": "Hm?", "answer": answer})
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return model, folder


def test_accuracy_agreement_and_savings_by_layer(small, tmp_path):
    model, folder = small
    ran = run(main, folder, "--model", model, "--withdraw", "off,auto,0,4", "--json", tmp_path / "scores.json")
    assert ran.code == 0 and ran.err == ""
    content = json.loads((tmp_path / "scores.json").read_text())
    assert content["questions"] == 6
    off, auto, zero, last = content["runs"]
    assert [run["withdraw_layer"] for run in content["runs"]] == [None, 2, 0, 4]
    assert off["accuracy"] == {"a": pytest.approx(1 / 3), "b": pytest.approx(1 / 3)} and off["mean"] == pytest.approx(1 / 3)
    assert off["agreement"] == last["agreement"] == 1 and zero["agreement"] < 1
    assert last["accuracy"] == off["accuracy"]
    assert zero["prefill_flops"] < auto["prefill_flops"] < off["prefill_flops"] == off["prefill_flops_without_withdrawal"]
    for words in ("K=2 (auto)", "answers unchanged", "33.3%", "saved"):
        assert words in ran.out


def test_a_limit_asks_the_first_of_each_family(small, tmp_path):
    model, folder = small
    run(main, folder, "--model", model, "--withdraw", "off", "--limit", "1", "--json", tmp_path / "scores.json")
    content = json.loads((tmp_path / "scores.json").read_text())
    assert content["questions"] == 2 and content["runs"][0]["accuracy"] == {"a": 1, "b": 1}


@pytest.mark.parametrize(
    "line, words",
    [
        ("", "holds no questions"),
        ("{", "line 1"),
        ('{"image": "0.png"}', "line 1"),
        ("[1, 2]", "line 1"),
        ('{"image": "no.png", "family": "a", "question": "q", "answer": "a"}', "no picture no.png"),
        ('{"image": "0.png", "family": "a", "question": "q", "answer": 3}', "must be text"),
    ],
)
def test_broken_questions_are_named(small, tmp_path, line, words):
    (tmp_path / "questions.jsonl").write_text(line)
    (tmp_path / "0.png").write_bytes((small[1] / "0.png").read_bytes())
    assert_one_line_error(run(main, tmp_path, "--model", small[0]), words)


@pytest.mark.parametrize(
    "options, words",
    [(("--withdraw", "off,9"), "from 0 to 4"), (("--withdraw", ""), "auto, off or a layer"), (("--limit", "0"), "--limit")],
)
def test_options_that_make_no_sense(small, options, words):
    assert_one_line_error(run(main, small[1], "--model", small[0], *options), words)


def test_missing_folders_and_places_that_cannot_be_written(small, tmp_path):
    assert_one_line_error(run(main, tmp_path / "nowhere", "--model", small[0]), "questions.jsonl")
    ran = run(main, small[1], "--model", small[0], "--limit", "1", "--json", tmp_path / "nowhere" / "scores.json")
    assert ran.code == 2 and "cannot write" in ran.err and ran.err.count("\n") == 1
