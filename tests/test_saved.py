"""What was seen of an image, as a file: the same answers from it, and one line for whatever else the file may hold."""

import json
import pathlib

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

import minivtw
from minivtw import InputError
from minivtw.saved import SAVED
from tests.small_llava import write_folder
from tests.test_seen import BLIND, QUESTIONS, ROOT, SCENE, THREE, contents, counted


@pytest.fixture(scope="module")
def vlm():
    return minivtw.load()


@pytest.fixture(scope="module")
def path(vlm, tmp_path_factory):
    path = tmp_path_factory.mktemp("seen") / "scene.safetensors"
    vlm.see(SCENE, 5).save(path)
    return path


@pytest.mark.parametrize(
    "method", [*BLIND[:2], "freeze:layers=3-4+withdraw:layer=5", "visionzip:keep=0.55+renumber:layer=3"]
)
def test_a_file_answers_as_what_it_was_written_from(vlm, tmp_path, method):
    seen = vlm.see(SCENE, None, method, system="Answer in one word.")
    seen.save(tmp_path / "scene.safetensors")
    loaded = vlm.seen(tmp_path / "scene.safetensors")
    assert contents(loaded.cache) == contents(seen.cache)
    for question in QUESTIONS[:2]:
        ours, theirs = loaded.ask(question), seen.ask(question)
        assert (ours.token_ids, ours.text, counted(ours)) == (theirs.token_ids, theirs.text, counted(theirs))
        assert ours.stats["reused"] == theirs.stats["reused"]


@pytest.mark.parametrize(
    "folder", sorted(path.parent.name for path in (ROOT / "tests/golden/families").glob("*/config.json"))
)
def test_every_family_and_several_images_in_one_file(folder, tmp_path):
    model = minivtw.load(ROOT / "tests/golden/families" / folder)
    seen = model.see([SCENE, THREE], 1)
    seen.save(tmp_path / "both.safetensors")
    loaded = model.seen(str(tmp_path / "both.safetensors"))
    turns = [each.chat() for each in (seen, loaded)]
    for question in ("Hi", "What is it?"):
        ours, theirs = (chat.ask(question, max_new_tokens=3).token_ids for chat in turns)
        assert ours == theirs


def test_withdrawal_halves_the_file(vlm, path, tmp_path):
    vlm.see(SCENE, None).save(tmp_path / "whole.safetensors")
    assert path.stat().st_size == pytest.approx(196e3, rel=0.01)
    assert (tmp_path / "whole.safetensors").stat().st_size == pytest.approx(429e3, rel=0.01)
    about = json.loads(safetensors.safe_open(path, "np").metadata()[SAVED])
    assert about["method"] == "withdraw:layer=5" and about["tiles"] == vlm.see(SCENE, None).tiles_sha256
    assert about["tiles"] != vlm.see(THREE).tiles_sha256


def test_an_own_method_and_a_place_that_cannot_be_written_are_refused(vlm, tmp_path):
    with pytest.raises(InputError, match="the method mine is your own; of an image seen under it no file is written"):
        vlm.see(SCENE, None, mine).save(tmp_path / "x")
    (tmp_path / "mine.py").write_text("def all(index, tokens):\n    return tokens\n", encoding="utf-8")
    with pytest.raises(InputError, match="is your own"):
        vlm.see(SCENE, None, f"{tmp_path}/mine.py:all+withdraw:layer=3").save(tmp_path / "x")
    with pytest.raises(InputError, match="cannot write"):
        vlm.see(SCENE).save(tmp_path / "nowhere" / "x")
    assert [each.name for each in tmp_path.iterdir()] == ["mine.py"]
    vlm.see(SCENE).save("/dev/null")
    assert pathlib.Path("/dev/null").is_char_device()


def mine(index, tokens):
    return tokens[~tokens.is_visual] if index == 3 else tokens


def test_another_model_refuses_the_file(path, tmp_path):
    with pytest.raises(InputError, match=r"scene.safetensors was not written with the model"):
        minivtw.load(write_folder(tmp_path / "other")).seen(path)


def changed(path, target, tensors=None, **about):
    """The file with other tensors (None: without it) or metadata; returns the path of the copy."""
    held = safetensors.numpy.load_file(path) | (tensors or {})
    said = json.loads(safetensors.safe_open(path, "np").metadata()[SAVED]) | about
    held = {name: np.ascontiguousarray(tensor) for name, tensor in held.items() if tensor is not None}
    safetensors.numpy.save_file(held, target, {SAVED: json.dumps(said)})
    return target


KEYS = np.zeros((2, 68, 32), np.float32)
ASCENDING = np.arange(68)


@pytest.mark.parametrize(
    "name, tensor, words",
    [
        ("layers.3.keys", None, "does not hold layers.3.keys as finite float32, of shape"),
        ("layers.3.keys", np.zeros((2, 68, 31), np.float32), "does not hold layers.3.keys"),
        ("layers.3.values", np.full((2, 68, 32), np.nan, np.float32), "does not hold layers.3.values"),
        ("layers.3.values", np.zeros((2, 68, 32)), "does not hold layers.3.values"),
        ("layers.3.positions", ASCENDING[::-1], "positions of layer 3 that do not ascend"),
        ("layers.3.positions", ASCENDING + 1, "positions of layer 3 that do not ascend"),
        ("layers.3.positions", ASCENDING - 1, "positions of layer 3 that do not ascend"),
        ("layers.3.positions", ASCENDING[:9], "does not hold layers.3.keys"),
        ("layers.3.positions", ASCENDING[:, None], "does not hold layers.3.positions"),
        ("ran", np.zeros((12, 4), np.int64), "does not count what layer 0 did"),
        ("ran", np.full((12, 4), -1), "does not count what layer 0 did"),
        ("ran", np.zeros((11, 4), np.int64), "does not hold ran"),
        ("token_ids", np.zeros(68, np.int64), "holds other tokens"),
        ("layers.12.keys", KEYS, "holds tensors that nobody needs, such as layers.12.keys"),
    ],
)
def test_other_tensors_are_one_line(vlm, path, tmp_path, name, tensor, words):
    with pytest.raises(InputError, match=words) as refused:
        vlm.seen(changed(path, tmp_path / "x.safetensors", {name: tensor}))
    assert str(refused.value).startswith(str(tmp_path)) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "about, words",
    [
        ({"method": "withdraw:layer=99"}, "a layer must be from 0 to 12"),
        ({"method": "evil.py:run"}, "names a Python file"),
        ({"method": 3}, "method in .* must be text"),
        ({"system": ["x"]}, "system in .* must be text"),
        ({"system": "Answer."}, "does not hold token_ids|holds other tokens"),
        ({"system": "<image>"}, "cannot be used"),
        ({"sizes": []}, "sizes in .* must be a list"),
        ({"sizes": [[64, 64], [64, 64]]}, "must say for each image"),
        ({"expansions": "x"}, "must say for each image"),
        ({"expansions": [3]}, "must say for each image"),
        ({"expansions": ["Hm?"]}, "does not hold token_ids"),
        ({"expansions": ["\ud800"]}, "cannot be used"),
        ({"expansions": ["a " * 5000]}, "does not hold token_ids|cannot be used"),
        ({"tiles": None}, "lacks tiles"),
        ({"model": None}, "lacks model"),
    ],
)
def test_other_metadata_are_one_line(vlm, path, tmp_path, about, words):
    with pytest.raises(InputError, match=words):
        vlm.seen(changed(path, tmp_path / "x.safetensors", **about))


@pytest.mark.parametrize("said", [None, {}, {SAVED: "["}, {SAVED: "[" * 100_000}, {SAVED: "[]"}, {"x": "{}"}])
def test_other_safetensors_files_are_one_line(vlm, tmp_path, said):
    safetensors.numpy.save_file({"x": np.zeros(3)}, tmp_path / "x", said)
    with pytest.raises(InputError, match=r"is not what `Seen.save` writes"):
        vlm.seen(tmp_path / "x")


def test_what_is_no_such_file_is_one_line(vlm, tmp_path):
    for place in (tmp_path, "/dev/zero"):
        with pytest.raises(InputError, match="is not a file of at most"):
            vlm.seen(place)
    with open(tmp_path / "large", "wb") as file:
        file.truncate(10**9)
    with pytest.raises(InputError, match="is not a file of at most"):
        vlm.seen(tmp_path / "large")
    with pytest.raises(InputError, match="cannot read"):
        vlm.seen(tmp_path / "nowhere")


@settings(max_examples=40)
@given(st.data())
def test_a_file_that_is_cut_off_or_damaged_is_one_line_or_answers(vlm, path, tmp_path_factory, data):
    content, other = bytearray(path.read_bytes()), tmp_path_factory.getbasetemp() / "damaged"
    header = 8 + int.from_bytes(content[:8], "little")
    place = data.draw(st.integers(0, header - 1) | st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        del content[place:]
    else:
        content[place] ^= data.draw(st.integers(1, 255))
    other.write_bytes(content)
    try:
        seen = vlm.seen(other)
        seen.ask("Hm?", max_new_tokens=1)
    except InputError as error:
        assert len(str(error).splitlines()) == 1


def test_what_runs_whole_prompts_is_not_saved(tmp_path):
    seen = minivtw.load().see(SCENE, None, "fastv:layer=2,keep=0.5", fallback=True)
    with pytest.raises(InputError, match="looks at the question; there is nothing to be saved"):
        seen.save(tmp_path / "scene.safetensors")
    assert not list(tmp_path.iterdir())
