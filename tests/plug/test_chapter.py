"""The chapter's programs that need no GPU run, and print what the page says."""

import pathlib
import re

import pytest

pytestmark = pytest.mark.live

ROOT = pathlib.Path(__file__).parent.parent.parent


def test_the_chapters_programs_print_what_the_page_says(plug, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "09-in-transformers.md").read_text(encoding="utf-8")
    programs = re.findall(r"^```python\n(.*?)^```\n(?:```text\n(.*?)^```)?", page, re.M | re.S)
    names = {}
    for program, output in programs[:6]:  # the seventh downloads a model
        exec(compile(program, "chapter 9", "exec"), names)
        printed = capsys.readouterr().out
        assert printed == output or not output
    assert 0 <= names["found"]["withdraw_layer"] <= 12 and len(names["found"]["curve"]) == 12
