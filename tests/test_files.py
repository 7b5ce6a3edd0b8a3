"""Text files from strangers, wherever they are read: asked for kind and length before they are opened."""

import hashlib
import json
import os

import pytest

from minivtw import InputError, calibrate, evaluate
from minivtw.inputs import files
from minivtw.inputs.questions import digest, read_questions
from tests.doors import assert_one_line_error, bounded_memory, make_world, run


@pytest.fixture
def world(tmp_path):
    return make_world(tmp_path)


@pytest.mark.parametrize("spoil", ["pipe", "endless", "huge", "gone"])
def test_questions_that_are_no_ordinary_file_are_one_line(world, spoil):
    path = world.questions / "questions.jsonl"
    path.unlink()
    if spoil == "pipe":
        os.mkfifo(path)
    if spoil == "endless":
        path.symlink_to("/dev/zero")
    if spoil == "huge":
        with open(path, "wb") as file:
            file.truncate(files.MOST_BYTES + 1)  # takes no room on the disk
    words = {"huge": "at most 100 are read", "gone": "No such file"}.get(spoil, "questions.jsonl is not a file")
    with bounded_memory(2**28):
        assert_one_line_error(run(evaluate.main, world.questions, "--model", world.model), words)
        assert_one_line_error(run(calibrate.main, world.model, "--samples", world.questions), words)


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_a_line_of_questions_ends_at_its_line_feed_alone(world, character, end):
    """Control characters have to be written as numbers in JSON; the ends of lines that Unicode adds do not."""
    question = {"image": "../picture.png", "question": f"one{character}two"}
    lines = [json.dumps(question, ensure_ascii=character < " "), json.dumps(question)]
    text = (end or "\n").join(lines) + end
    (world.questions / "questions.jsonl").write_bytes(text.encode())
    assert [each.question for each in read_questions(world.questions)] == [question["question"]] * 2


def test_a_digest_is_that_of_images_and_questions(world):
    questions = read_questions(world.questions)
    expected = hashlib.sha256(world.picture.read_bytes() + questions[0].question.encode()).hexdigest()
    assert digest(questions) == expected
    assert files.sha256_of(world.picture) == hashlib.sha256(world.picture.read_bytes()).hexdigest()
    with pytest.raises(InputError, match="cannot read"):
        files.sha256_of_all([world.picture, world.folder / "nowhere"])


LATER = {"image": "../picture.png", "turns": [["Hm?", "a"], ["</s>", "a"]]}


@pytest.mark.parametrize(
    "broken, words",
    [
        ({"question": "Hm </s>?"}, "the prompt says </s>"),
        ({"question": "word " * 200}, "the model has 256 positions"),
        ({"image": "junk.png"}, "junk.png is not an image"),
        ({"image": "cut.png"}, "cannot read the image"),
        (LATER, "the prompt says </s>"),
    ],
)
def test_a_question_that_cannot_be_asked_is_named_before_the_work(world, monkeypatch, broken, words):
    question = {"image": "../picture.png", "family": "one", "question": "Hm?", "answer": "a"}
    lines = [json.dumps(one) for one in (question, question, question, question | broken, question)]
    (world.questions / "questions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (world.questions / "junk.png").write_bytes(b"no picture")
    (world.questions / "cut.png").write_bytes(world.picture.read_bytes()[:-99])
    monkeypatch.setattr("minivtw.vlm.VLM.embed", None)  # what would be the work
    where = f"{world.questions}/questions.jsonl, line 4: "
    for door, *arguments in (
        (evaluate.main, world.questions, "--model", world.model),
        (calibrate.main, world.model, "--samples", world.questions, "--threshold", 1e9),
        (calibrate.main, world.model, "--samples", world.questions, "--save", "40%"),
    ):
        ran = run(door, *arguments)
        assert_one_line_error(ran, where)
        assert words in ran.err
