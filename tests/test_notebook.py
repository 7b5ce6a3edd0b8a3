"""The notebook is what its text makes of it, and every exercise can be solved: its stub fails the check, its solution passes."""

import base64
import importlib.util
import io
import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from minivtw.methods.shelf import method_of

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
NAMES = sorted(path.stem for path in (DOCS / "exercises").glob("[!_]*.py"))
CHAPTERS = sorted(DOCS.glob("[0-9]*.md"))
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")


@pytest.fixture(scope="module")
def maker():
    """docs/notebook.py, which makes the notebook and writes exercises into chapters."""
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("notebook_maker", DOCS / "notebook.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


@pytest.fixture(scope="module")
def exercises(maker):
    return sys.modules["exercises"]


@pytest.fixture(scope="module")
def made(maker):
    """The notebook, and what its cells define."""
    names = {}
    return maker.notebook((DOCS / "notebook.md").read_text(encoding="utf-8"), names), names


def written(maker, exercises, name, which):
    """The stub or the solution of an exercise as a reader saves it, as a function."""
    module, names = exercises.exercise(name), {}
    exec(f"{maker.imports(module)}\n{maker.code(module, which)}", names)
    return names[name]


@pytest.mark.parametrize("name", NAMES)
def test_a_stub_fails_its_check_and_the_solution_passes(maker, exercises, name):
    is_right, sentence = exercises.verdict(written(maker, exercises, name, "stub"))
    assert not is_right and " " in sentence and not sentence.startswith("it raises")
    is_right, sentence = exercises.verdict(written(maker, exercises, name, "solution"))
    assert is_right, sentence


@pytest.mark.parametrize("name", NAMES)
def test_a_check_says_what_is_wrong_with_nothing_and_with_a_fault(exercises, name):
    def fault(*arguments, **options):
        return 1 / 0

    is_right, sentence = exercises.verdict(lambda *arguments, **options: None, name)
    assert not is_right and ("must" in sentence or "not None" in sentence or "store" in sentence), sentence
    is_right, sentence = exercises.verdict(fault, name)
    assert (is_right, sentence) == (
        False,
        f"it raises ZeroDivisionError in line {fault.__code__.co_firstlineno + 1}: division by zero",
    )


@pytest.mark.parametrize(
    "name, wrong, words",
    [
        ("cut_patches", "lambda pixels, side: right(pixels.swapaxes(1, 2), side)", "must be"),
        (
            "cut_patches",
            "lambda pixels, side: right(pixels, side).reshape(8, 8, -1).swapaxes(0, 1).reshape(64, -1)",
            "must go along the rows",
        ),
        ("embed_patches", "lambda patches, vision: np.roll(right(patches, vision), -1, axis=0)", "must be"),
        ("causal_softmax", "lambda scores: np.tril(np.exp(scores) / np.exp(scores).sum(-1, keepdims=True))", "sum to"),
        ("causal_softmax", "lambda s: np.tril(np.exp(s)) / np.tril(np.exp(s)).sum(-1, keepdims=True)", "overflow"),
        (
            "attend",
            "lambda store, q, k, v: store.append((k, v)) or right(store[:-2], q, *store[max(len(store) - 2, 0)])",
            "does not see itself",
        ),
        ("count_bytes", "lambda held, config: right(held, config) // 2", "a key and a value"),
        ("where_it_leaves", "lambda cache: right(cache) or 12", "the answer is None"),
        ("moved", "lambda index, tokens: replace(tokens, rotary_positions=tokens.rotary_positions + 100)", "never are"),
        ("kl", "lambda withdrawn, full: right(full, withdrawn)", "exchange the two"),
        ("kl", "lambda withdrawn, full: right(withdrawn, full) / math.log(2)", "natural logarithm"),
        ("image_share", "lambda pattern, is_visual: float(pattern[:, ~is_visual][:, :, is_visual].sum(-1).mean())", "before the image"),
        ("beat_the_grid", "lambda index, tokens: tokens", "64 visual tokens enter layer 2; at most 16 may"),
        ("beat_the_grid", "lambda index, tokens: tokens[-1:] if index == 2 else tokens", "all text must stay"),
    ],
)  # fmt: skip
def test_a_usual_mistake_has_its_own_sentence(maker, exercises, name, wrong, words):
    import math
    from dataclasses import replace

    names = {"right": written(maker, exercises, name, "solution"), "np": np, "math": math, "replace": replace}
    is_right, sentence = exercises.verdict(eval(wrong, names), name)
    assert not is_right and words in sentence


def test_every_exercise_stands_in_one_chapter_as_it_is(maker):
    pages = [path.read_text(encoding="utf-8") for path in CHAPTERS]
    assert sorted(name for page in pages for name in maker.MARK.findall(page)) == NAMES
    for page in pages:
        assert maker.renewed(page) == page  # else: python docs/notebook.py


def test_a_file_of_solutions_is_checked_by_name(maker, exercises, tmp_path):
    parts = [
        maker.code(exercises.exercise(name), which) for name, which in (("kl", "stub"), ("even_share", "solution"))
    ]
    (tmp_path / "mine.py").write_text("\n\n".join(["import numpy as np", *parts]), encoding="utf-8")
    (tmp_path / "none.py").touch()
    for file, code, words in (
        ("mine.py", 1, ("even_share: right: 88%", "kl: not yet: for two random answers it must be")),
        ("none.py", 2, ("solves no exercise; there are attend, ",)),
    ):
        command = [sys.executable, DOCS / "exercises", tmp_path / file]
        ran = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
        assert ran.returncode == code and all(part in ran.stdout + ran.stderr for part in words)


def test_the_method_with_a_parameter_is_named_on_the_command_line(maker, exercises, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import numpy as np\n" + maker.code(exercises.exercise("checkerboard"), "solution"), encoding="utf-8"
    )
    is_right, sentence = exercises.verdict(
        lambda layer: method_of(f"{tmp_path}/mine.py:checkerboard,layer={layer}"), "checkerboard"
    )
    assert is_right, sentence


def assert_close(found, stored):
    """Texts that differ in no word, and in numbers by rounding alone: another machine adds in another order."""
    assert NUMBER.sub("#", found).split() == NUMBER.sub("#", stored).split()
    for one, other in zip(NUMBER.findall(found), NUMBER.findall(stored)):
        assert float(one) == pytest.approx(float(other), rel=0.05, abs=1e-3)


def test_the_notebook_is_what_its_text_makes(made):
    """Without jupyter: cell by cell the same source, and outputs that are the same but for rounding and compression."""
    made, stored = made[0], json.loads((DOCS / "notebook.ipynb").read_text(encoding="utf-8"))
    assert [cell["source"] for cell in made["cells"]] == [cell["source"] for cell in stored["cells"]]
    for cell, kept in zip(made["cells"], stored["cells"]):
        assert {**cell, "outputs": 0} == {**kept, "outputs": 0}
        for output, was in zip(cell.get("outputs", []), kept.get("outputs", []), strict=True):
            assert_close("".join(output.get("text", [])), "".join(was.get("text", [])))
            shown, shown_then = output.get("data", {}), was.get("data", {})
            assert shown.keys() == shown_then.keys()
            for kind in shown.keys() - {"image/png"}:
                texts = (re.sub(r"base64,[^\"]*", "", "".join(data[kind])) for data in (shown, shown_then))
                assert_close(*texts)
            if "image/png" in shown:
                pictures = (Image.open(io.BytesIO(base64.b64decode(data["image/png"]))) for data in (shown, shown_then))
                now, then = (np.asarray(picture, np.float32) for picture in pictures)
                assert now.shape == then.shape and np.abs(now - then).mean() < 4
    assert {key: made[key] for key in made.keys() - {"cells"}} == {key: stored[key] for key in made.keys() - {"cells"}}
    assert (DOCS / "notebook.ipynb").stat().st_size < 600_000


def test_a_solution_can_be_pasted_into_the_notebook(maker, exercises, made):
    used = maker.MARK.findall((DOCS / "notebook.md").read_text(encoding="utf-8"))
    assert len(used) >= 5
    for name in used:
        exec(maker.code(exercises.exercise(name), "solution"), made[1])
        is_right, sentence = exercises.verdict(made[1][name])
        assert is_right, (name, sentence)
