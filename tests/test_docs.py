"""What the reading course says is code runs, and does what the page says."""

import functools
import importlib
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

import minivtw
from minivtw.methods.withdrawal import withdraw
from minivtw.model.cache import KVCache

ROOT = pathlib.Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "pictures" / "scene.png"


def programs_of(chapter):
    """The Python blocks of a page with what the page says they print."""
    return re.findall(
        r"^```python\n(.*?)^```\n(?:```text\n(.*?)^```)?", chapter.read_text(encoding="utf-8"), re.M | re.S
    )


RUN = (
    "01-from-picture-to-answer",
    "02-the-decoder-and-its-cache",
    "03-withdrawal",
    "04-which-layer",
    "05-attention-leaves",
    "08-your-own-method",
)


@pytest.mark.parametrize("name", RUN)
def test_the_chapters_programs_print_what_the_page_says(name, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    programs, names = [pair for pair in programs_of(ROOT / "docs" / f"{name}.md") if "import" in pair[0] or pair[1]], {}
    assert any(output for _, output in programs)
    for program, output in programs:
        exec(compile(program, name, "exec"), names)
        assert capsys.readouterr().out == output


def test_the_method_of_the_last_page_is_withdrawal_when_it_keeps_nothing(monkeypatch):
    monkeypatch.chdir(ROOT)
    names = {}
    exec(compile(programs_of(ROOT / "docs" / "08-your-own-method.md")[0][0], "8", "exec"), names)
    vlm, question = minivtw.load(), "How many objects are there?"
    prompt = vlm.prepare(PICTURE, question)

    def next_logits(method):
        return vlm.advance(vlm.embed(prompt), KVCache(vlm.config), method)[0]

    keeping = {keep: next_logits(functools.partial(names["most_looked_at"], keep=keep)) for keep in (0, 8, 64)}
    assert np.array_equal(keeping[0], next_logits(withdraw(3))) and np.array_equal(keeping[64], next_logits(None))
    assert np.abs(keeping[8] - keeping[64]).max() > 1e-4


def test_the_exercise_for_a_class_keeps_sixteen_patches():
    vlm, names = minivtw.load(), {}
    exec(compile(programs_of(ROOT / "docs" / "for-teachers.md")[0][0], "for teachers", "exec"), names)
    run = vlm.answer(PICTURE, "What color is the star?", max_new_tokens=0, method=names["sixteen"]).stats["prefill"]
    assert run["entered"] == [77] * 3 + [13 + 16] * 9


def test_the_readme_shows_the_loop_that_runs():
    """And the method: each line of the README's first block stands in the code as it is shown."""
    block = re.search(
        r"^```python\n(def withdraw.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S
    ).group(1)
    source = "".join(
        (ROOT / "minivtw" / name).read_text(encoding="utf-8") for name in ("methods/withdrawal.py", "model/decoder.py")
    )
    source = re.sub(r"\s+", " ", source)
    for line in block.splitlines():
        if line.strip() and not line.startswith(("def", "for")):
            assert re.sub(r"\s+", " ", line).strip() in source


@pytest.mark.parametrize(
    "page",
    [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("weights/**/*.md"))],
    ids=lambda p: p.name,
)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not missing


def test_the_limits_and_tests_of_the_promise_are_there():
    page = (ROOT / "docs" / "robustness.md").read_text(encoding="utf-8")
    limits = re.findall(r"^\| .* \| ([\d,]+)[^|]* \| `([\w/]+)\.py:(\w+)` \|", page, re.M)
    assert len(limits) >= 8
    for number, module, name in limits:
        value = getattr(importlib.import_module("minivtw." + module.replace("/", ".")), name)
        assert value == int(number.replace(",", "")), name
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    named = re.findall(r"`(test_\w+)`", page)
    assert len(named) >= 5 and not [name for name in named if f"def {name}(" not in tests]


@pytest.mark.parametrize("script", ["rooms", "journey"])
def test_a_script_that_draws_says_what_it_does_before_it_does_it(script):
    path = ROOT / "docs" / "pictures" / f"{script}.py"
    drawn = path.with_suffix(".svg")
    before, environment = drawn.stat().st_mtime_ns, {**os.environ, "PYTHONPATH": str(ROOT)}
    for option, code in (("--help", 0), ("--halp", 2)):
        ran = subprocess.run([sys.executable, str(path), option], capture_output=True, env=environment)
        assert (ran.returncode, drawn.stat().st_mtime_ns) == (code, before)


def test_every_drawing_can_be_heard_and_stands_in_the_dark():
    drawings = sorted((ROOT / "docs" / "pictures").glob("*.svg"))
    assert len(drawings) > 30
    for drawing in drawings:
        text = drawing.read_text(encoding="utf-8")
        assert re.search(r'role="img" aria-label="[^"]{15,}"', text), drawing.name
        assert "@media (prefers-color-scheme: dark)" in text, drawing.name
