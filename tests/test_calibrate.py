"""The door `python -m minivtw.calibrate`: what it stores, who reads it; a bad run never replaces a good result."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

import minivtw
from minivtw import InputError, calibrate
from minivtw.inputs.questions import digest, read_questions
from minivtw.loading import embedded_folder
from minivtw.methods.text import withdrawal_layer
from minivtw.search import layer as search

from . import doors
from .doors import assert_one_line_error, copied


@pytest.fixture(scope="module")
def embedded():
    return minivtw.load()


@pytest.fixture
def model(tmp_path):
    """A copy of the embedded model that a test may write to, no layer is stored with it."""
    return copied(embedded_folder(), tmp_path / "model", shutil.ignore_patterns("withdrawal.json"))


@pytest.fixture
def samples(tmp_path):
    """Three pictures of noise with a question each."""
    folder = tmp_path / "samples"
    folder.mkdir()
    random = np.random.default_rng(0)
    lines = []
    for number in range(3):
        Image.fromarray(random.integers(0, 256, (60, 90, 3), np.uint8)).save(folder / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "question": f"What color is the star? {number}"}))
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def run(*arguments):
    """The door in this process; errors come as they are."""
    calibrate.main([str(argument) for argument in arguments])


def test_stored_layer_is_what_auto_withdraws_at(model, samples):
    # every layer meets it: K is 0, unlike the default half
    ran = doors.run(calibrate.main, model, "--samples", samples, "--threshold", 1e6, "--store")
    stored = json.loads((model / "withdrawal.json").read_text(encoding="utf-8"))
    assert stored["withdraw_layer"] == 0 and stored["criterion"] == "kl" and stored["threshold"] == 1e6
    assert "<- the visual tokens leave before this layer" in ran.out
    vlm = minivtw.load(model)
    assert withdrawal_layer(vlm.method("auto")) == 0
    assert len(stored["curve"]) == vlm.config.layers
    assert sorted(path.name for path in model.iterdir() if path.name.startswith(".")) == []


@pytest.mark.parametrize("criterion", search.CRITERIA)
def test_curve_is_the_mean_over_the_samples(criterion, embedded, samples, capsys):
    run("--samples", samples, "--criterion", criterion, "--threshold", 1e6, "--json")
    printed = json.loads(capsys.readouterr().out)
    assert printed["criterion"] == criterion and printed["withdraw_layer"] == 0
    curves = []
    for line in (samples / "questions.jsonl").read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        prompt = embedded.prepare(samples / sample["image"], sample["question"])
        asked = embedded.embed(prompt)
        curves.append(search.CRITERIA[criterion].curve(embedded.decoder, asked, embedded.stop_ids))
    np.testing.assert_allclose(printed["curve"], np.mean(curves, axis=0), rtol=1e-5)
    assert printed["samples"]["count"] == 3


def test_nothing_is_stored_unless_asked_for(model, samples, capsys):
    run(model, "--samples", samples, "--threshold", 1e6)
    assert "nothing stored" in capsys.readouterr().out
    assert not (model / "withdrawal.json").exists()


def test_digest_changes_with_a_picture_and_with_a_question(samples):
    before = digest(read_questions(samples))
    assert digest(read_questions(samples)) == before
    shutil.copy(samples / "1.png", samples / "0.png")
    after = digest(read_questions(samples))
    assert after != before
    questions = samples / "questions.jsonl"
    questions.write_text(questions.read_text(encoding="utf-8").replace("star", "ring"), encoding="utf-8")
    assert digest(read_questions(samples)) not in (before, after)


def test_embedded_model_ships_its_samples(embedded):
    samples = read_questions(embedded.folder / "samples")
    assert len(samples) == calibrate.SAMPLES
    assert len({sample.question for sample in samples}) > 10


def test_the_threshold_is_that_of_the_stored_layer(model, samples, capsys):
    """So that running it as the README does gives the layer that the README says."""
    (model / "withdrawal.json").write_text(
        '{"withdraw_layer": 3, "criterion": "kl", "threshold": 1e6}', encoding="utf-8"
    )
    run(model, "--samples", samples, "--json")
    assert json.loads(capsys.readouterr().out)["threshold"] == 1e6
    run(model, "--samples", samples, "--criterion", "answer", "--json", "--threshold", 2e6)
    assert json.loads(capsys.readouterr().out)["threshold"] == 2e6


BAD_RUNS = {
    "eta no layer meets": (
        ["--threshold", "0"],
        "no layer meets the kl criterion's threshold of 0: the lowest value is",
    ),
    "negative eta": (["--threshold", "-1"], "--threshold must be 0 or more, not -1"),
    "eta not a number": (["--threshold", "nan"], "--threshold must be 0 or more, not nan"),
    "no samples wanted": (["--limit", "0"], "--limit must be 1 or more, not 0"),
    "unknown criterion": (["--criterion", "taste"], "invalid choice: 'taste'"),
}


@pytest.mark.parametrize("options, message", BAD_RUNS.values(), ids=BAD_RUNS)
def test_bad_option_leaves_the_good_result_alone(model, samples, options, message):
    (model / "withdrawal.json").write_text('{"withdraw_layer": 3}', encoding="utf-8")
    with pytest.raises(InputError, match=message):
        run(model, "--samples", samples, "--store", *options)
    assert (model / "withdrawal.json").read_text(encoding="utf-8") == '{"withdraw_layer": 3}'


def empty(samples):
    shutil.rmtree(samples)
    samples.mkdir()


BAD_SAMPLES = {
    "no folder": (shutil.rmtree, "cannot read"),
    "empty folder": (empty, "cannot read"),
    "empty list": (
        lambda samples: (samples / "questions.jsonl").write_text("", encoding="utf-8"),
        "holds no questions",
    ),
    "no JSON": (
        lambda samples: (samples / "questions.jsonl").write_text("{}\n{", encoding="utf-8"),
        "line 1: needs an object with image",
    ),
    "not an object": (
        lambda samples: (samples / "questions.jsonl").write_text("[1]", encoding="utf-8"),
        "line 1: needs an object",
    ),
    "not text": (lambda samples: (samples / "questions.jsonl").write_bytes(b"\xff\xfe"), "is not UTF-8"),
    "picture missing": (lambda samples: (samples / "2.png").unlink(), "no image 2.png"),
    "picture broken": (lambda samples: (samples / "1.png").write_bytes(b"no picture"), "1.png is not an image"),
}


@pytest.mark.parametrize("spoil, message", BAD_SAMPLES.values(), ids=BAD_SAMPLES)
def test_bad_samples_leave_the_good_result_alone(model, samples, spoil, message):
    (model / "withdrawal.json").write_text('{"withdraw_layer": 3}', encoding="utf-8")
    spoil(samples)
    with pytest.raises(InputError, match=message):
        run(model, "--samples", samples, "--threshold", 1e6, "--store")
    assert (model / "withdrawal.json").read_text(encoding="utf-8") == '{"withdraw_layer": 3}'


def test_place_that_cannot_be_written(model, samples):
    (model / "withdrawal.json").mkdir()  # unlike a read-only folder, this stops the superuser too
    with pytest.raises(InputError, match=f"cannot write {model}/withdrawal.json: "):
        run(model, "--samples", samples, "--threshold", 1e6, "--store")
    assert not list(model.glob(".withdrawal-*"))


def test_model_without_samples_asks_for_them(model):
    shutil.rmtree(model / "samples")
    with pytest.raises(InputError, match="ships no samples; give a folder of them with --samples"):
        run(model)


def test_error_is_one_line_and_exit_code_2(tmp_path):
    assert_one_line_error(doors.run(calibrate.main, "--samples", tmp_path), "cannot read")
    assert_one_line_error(
        doors.run(calibrate.main, "--threshold", "much"), "--threshold/--eta: invalid float value: 'much'"
    )


@pytest.mark.parametrize("option", [["--threshold", "1e6"], ["--save", "40%"]])
@pytest.mark.parametrize("exists", [True, False])
def test_a_link_out_of_a_model_folder_is_refused_before_the_work(model, samples, tmp_path, monkeypatch, option, exists):
    """As it is where it is read: the folder may be a stranger's, and the file is the user's own."""
    if exists:
        (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    (model / "withdrawal.json").symlink_to("../mine.txt")
    for work in ("calibrate", "find_schedule"):
        monkeypatch.setattr(calibrate, work, None)
    with pytest.raises(InputError, match="withdrawal.json is a link out of the model folder"):
        run(model, "--samples", samples, "--store", *option)
    assert not exists or (tmp_path / "mine.txt").read_text(encoding="utf-8") == "mine"


def test_a_link_in_a_model_folder_is_never_written_through(model, samples):
    """Not even one that stays in the folder."""
    weights = (model / "model.safetensors").read_bytes()
    (model / "withdrawal.json").symlink_to("model.safetensors")
    run(model, "--samples", samples, "--threshold", 1e6, "--store")
    assert (model / "model.safetensors").read_bytes() == weights
    assert not (model / "withdrawal.json").is_symlink() and withdrawal_layer(minivtw.load(model).method("auto")) == 0
