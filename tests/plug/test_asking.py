"""The command on questions of one's own: the layer that the NumPy search finds, the answers, and the file that is stored."""

import json

import pytest

import minivtw
from minivtw.checkpoints.hub import embedded_folder
from minivtw.inputs.questions import read_questions
from minivtw.methods.text import spec_of
from minivtw.search.calibration import calibrate
from tests.doors import assert_one_line_error, copied, run

pytestmark = pytest.mark.live

PROMPT = ("--prompt", "USER: <image>\n{} ASSISTANT:")
QUICK = ("--limit", 3, "--new-tokens", 12, "--device", "cpu", *PROMPT)


@pytest.fixture
def folder(tmp_path):
    """The embedded model, with no layer stored."""
    model = copied(embedded_folder(), tmp_path / "model")
    (model / "withdrawal.json").unlink()
    return model


@pytest.fixture(scope="module")
def main():
    from minivtw.plug.__main__ import main

    return main


def test_what_is_stored_is_what_the_numpy_search_finds_and_all_who_ask_find_it(main, plug, zoo, folder):
    ran = run(main, folder, *QUICK, "--store", "--json")
    found, stored = json.loads(ran.out), json.loads((folder / "withdrawal.json").read_text(encoding="utf-8"))
    vlm = minivtw.load(folder)
    samples = read_questions(folder / "samples", most=3)
    expected = calibrate(vlm, samples, "kl", 0.003)
    assert {**stored, "curve": None} == {**expected, "curve": None}
    assert stored["curve"] == pytest.approx(expected["curve"], abs=1e-4)
    assert spec_of(vlm.method()) == f"withdraw:layer={stored['withdraw_layer']}"
    for one, sample in zip(found["answers"], samples, strict=True):
        answers = [vlm.answer(sample.image, sample.question, withdraw=k, max_new_tokens=12) for k in (None, "auto")]
        assert [one["without"], one["with"]] == [answer.text for answer in answers]
    flops = answers[1].stats["flops"]
    assert found["flops"] == pytest.approx(flops["prefill"] / flops["prefill_without_withdrawal"], abs=0.05)
    assert 0 < found["cache"] < 1 and found["stored"] == str(folder / "withdrawal.json")
    model = zoo.hf.AutoModelForImageTextToText.from_pretrained(folder)
    with pytest.warns(UserWarning, match="nothing was withdrawn"), plug.withdraw(model, folder) as told:
        assert told == []


def test_the_page_shows_the_curve_and_each_answer_that_changes(main, folder):
    ran = run(main, folder, *QUICK, "--threshold", 1e6)  # so the image never comes in
    assert "layer   0" in ran.out and "<- the visual tokens leave before this layer" in ran.out
    assert "layer  11" in ran.out and "####" in ran.out
    assert " -> " in ran.out and "of 3 answers are the same, with " in ran.out and "nothing stored" in ran.out
    assert not (folder / "withdrawal.json").exists()


def test_nothing_is_written_through_a_stranger_s_folder(main, folder, tmp_path):
    (folder / "withdrawal.json").symlink_to(tmp_path / "elsewhere.json")
    (tmp_path / "elsewhere.json").write_text("{}", encoding="utf-8")
    assert_one_line_error(run(main, folder, *QUICK, "--store"), "a link out of the model folder")
    assert (tmp_path / "elsewhere.json").read_text(encoding="utf-8") == "{}"


@pytest.mark.parametrize(
    "options, words",
    [
        (("--store", "--withdraw", "3"), "are for finding K; --withdraw and --freeze say it"),
        (("--store", "--threshold", "-1"), "--threshold must be 0 or more"),
        (("--store", "--limit", "0"), "must be 1 or more"),
        (("--samples", "nowhere"), "nowhere"),
        (("--store", "--prompt", "{}"), "cannot take a sample"),
        (("--store", "--threshold", "0"), "no layer meets"),
    ],
)
def test_options_that_make_no_sense(main, folder, options, words):
    assert_one_line_error(run(main, folder, *QUICK, *options), words)
    assert not (folder / "withdrawal.json").exists()


def test_random_weights_have_nothing_to_say(main):
    assert_one_line_error(run(main, "smolvlm-256m", "--store"), "has random weights")
