"""What the reading course says is code runs, and does what the page says."""

import pathlib
import re

import numpy as np
import pytest

import minivtw
from minivtw.model.cache import KVCache

ROOT = pathlib.Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "pictures" / "scene.png"


def programs_of(chapter):
    """The Python blocks of a page with what the page says they print."""
    return re.findall(r"^```python\n(.*?)^```\n(?:```text\n(.*?)^```)?", chapter.read_text(encoding="utf-8"), re.M | re.S)


RUN = ("01-from-picture-to-answer", "02-the-decoder-and-its-cache", "03-withdrawal", "04-which-layer", "05-attention-leaves", "10-your-own-method")


@pytest.mark.parametrize("name", RUN)
def test_the_chapters_programs_print_what_the_page_says(name, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    programs, names = [pair for pair in programs_of(ROOT / "docs" / f"{name}.md") if "import" in pair[0] or pair[1]], {}
    assert any(output for _, output in programs)
    for program, output in programs:
        exec(compile(program, name, "exec"), names)
        assert capsys.readouterr().out == output


def test_the_method_of_the_last_page_is_withdrawal_when_it_keeps_nothing(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    names = {}
    for program, _ in programs_of(ROOT / "docs" / "10-your-own-method.md"):
        exec(compile(program, "10", "exec"), names)
    vlm, question = minivtw.load(), "How many objects are there?"
    prompt = vlm.prepare(PICTURE, question)
    for keep, withdraw in ((0, 3), (int(prompt.is_visual.sum()), None)):
        ours = vlm.advance(vlm.embed(prompt), prompt.is_visual, KVCache(vlm.config.layers), vlm.withdrawal(withdraw))
        assert np.abs(names["next_token"](vlm, PICTURE, question, 3, keep) - ours).max() < 1e-4
    some = names["next_token"](vlm, PICTURE, question, 3, 8)
    assert np.abs(some - ours).max() > 1e-4


def test_the_readme_shows_the_loop_that_runs():
    block = re.search(r"^```python\n(for index.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S).group(1)
    source = re.sub(r"\s+", " ", (ROOT / "minivtw" / "model" / "decoder.py").read_text(encoding="utf-8"))
    for line in block.splitlines()[1:]:
        assert re.sub(r"\s+", " ", line).strip() in source


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("weights/**/*.md"))], ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not missing
