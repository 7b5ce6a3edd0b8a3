"""The guided walk: every stop is reached, in order, and what one prints there is a line."""

import importlib.util
import os
import pathlib
import re
import select
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minivtw
from minivtw import step, threads
from minivtw.cli.stops import STOPS
from minivtw.model import attention, decoder, vision
from minivtw.page.printing import in_one_line, part

from .doors import assert_one_line_error, make_world, run

ROOT = pathlib.Path(__file__).parent.parent
SCENE, QUESTION = "docs/pictures/scene.png", "What color is the star?"
CHAPTER = ROOT / "docs" / "01-from-picture-to-answer.md"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def typed(*lines, arguments=(SCENE, QUESTION)):
    """What `minivtw.step` prints when these lines are typed: [text before each prompt]."""
    ran = subprocess.run(
        [sys.executable, "-m", "minivtw.step", *arguments], input="".join(f"{line}\n" for line in lines), cwd=ROOT,
        capture_output=True, encoding="utf-8", env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    assert ran.returncode == 0 and not ran.stderr, ran.stderr
    return ran.stdout.split("(step) ")


def titles(pieces):
    return [title for piece in pieces for title in re.findall(r"^--- \d+ of \d+: (.+?) ---", piece, re.M)]


class Collector(step.Guide):
    """Goes from stop to stop by itself, and keeps what every name in scope would print."""

    def __init__(self, *arguments):
        self.printed = []
        super().__init__(*arguments)

    def arrive(self, stop, frame):
        self.reached = self.stops.index(stop) + 1
        values = {**frame.f_locals, **{code: self.value(code, frame) for code in stop.look}}
        self.printed += [(stop.title, name, part(value)) for name, value in values.items()]
        ours = {name: value for name, value in values.items() if type(value).__repr__ is in_one_line}
        self.printed += [(stop.title, name, repr(value)) for name, value in ours.items()]
        self.arm()

    def interaction(self, *_):
        self.set_continue()


def collected(image, prompt, **options):
    vlm = minivtw.load()
    method = vlm.method(**options)
    layer = method.withdraw_layer if method else 0
    collector = Collector([stop for stop in STOPS if image or not stop.needs_image], layer, vlm.config.layers)
    with step.in_plain_steps():
        answer = collector.lead(vlm.answer, image, prompt, **options)
    return collector, answer


@pytest.mark.parametrize("withdraw", ["auto", 3, None])
def test_every_stop_is_reached_and_whatever_is_printed_there_is_short(withdraw):
    collector, answer = collected(SCENE, QUESTION, withdraw=withdraw)
    assert collector.reached == len(STOPS)
    assert list(dict.fromkeys(title for title, *_ in collector.printed)) == [stop.title for stop in STOPS]
    for title, name, shown in collector.printed:
        assert len(shown) <= 300 and "\n" not in shown and "array(" not in shown, (title, name, shown)
    assert answer.text == minivtw.load().answer(SCENE, QUESTION, withdraw=withdraw).text


def test_a_question_without_an_image_passes_the_stops_of_the_image_by():
    collector, answer = collected(None, "Hello", withdraw=2)
    assert {title for title, *_ in collector.printed} == {stop.title for stop in STOPS if not stop.needs_image}
    assert answer.token_ids == minivtw.load().answer(None, "Hello", withdraw=2).token_ids


def test_five_presses_of_enter_lead_to_the_withdrawal_and_four_steps_into_it():
    pieces = typed("", "", "", "", "", "s", "s", "s", "s", "p tokens", "r", "p tokens", "q")
    assert titles(pieces) == [stop.title for stop in STOPS[:6]]
    assert "[layer 5 of 12]" in pieces[5] and "->             if method:" in pieces[5]
    assert "methods/withdrawal.py" in pieces[9]
    assert pieces[10].startswith("Tokens(77: 64 visual, 13 text; before layer 5;")
    assert pieces[12].startswith("Tokens(13: 0 visual, 13 text; before layer 5;")


def test_jumps_and_plain_pdb():
    pieces = typed(
        "K", "layer 7", "p len(tokens), index", "layer 99", "p nothing", "tokens.hidden", "w", "b forward", "q"
    )
    assert titles(pieces) == ["An image file", "The decoder's loop", "The decoder's loop"]
    assert "[layer 5 of 12]" in pieces[1] and "[layer 7 of 12]" in pieces[2]
    assert pieces[3] == "(13, 7)\n"
    assert pieces[4] == "*** layer takes a number from 0 to 11\n" and "NameError" in pieces[5]
    assert re.fullmatch(r"\(13, 128\) ±[\d.]+\n", pieces[6])
    assert "respond()" in pieces[7] and "advance()" in pieces[7] and "Breakpoint" in pieces[8]


@pytest.mark.parametrize("before", [["K"], ["layer 7"], ["layer 3", *[""] * 5], [""] * 12])
def test_k_never_leads_past_where_the_image_leaves(before):
    pieces = typed(*before, "K", "q")
    assert pieces[-2] == "*** the image leaves here, or has left\n"


def test_stepping_stays_in_what_is_to_be_read():
    """Ninety lines on from the connector: no NumPy, no threads, no dataclasses, nothing of the standard library."""
    pieces = typed("", "", "", "", *["s"] * 90, "q")
    files = re.findall(r"^> (.+?)\(\d+\)", "".join(pieces), re.M)
    assert len(files) >= 80
    assert all(
        file.startswith(str(ROOT / "minivtw")) and not file.endswith(("blocks.py", "threads.py")) for file in files
    )
    assert len({pathlib.Path(file).name for file in files}) >= 3


@pytest.mark.parametrize("options, layer", [(["--withdraw", "off"], 0), (["--withdraw", "12"], 11),
                                            (["--method", "freeze:layers=3-4"], 4), (["--method", "fastv:layer=2"], 2)])  # fmt: skip
def test_without_a_withdrawal_there_is_no_k(options, layer):
    pieces = typed("K", "run", "", "", "", "", "", "q", arguments=(SCENE, QUESTION, *options))
    assert pieces[1] == "*** the image never leaves\n" and pieces[2].startswith("*** q, and")
    assert titles(pieces) == [stop.title for stop in STOPS[:6]] and f"[layer {layer} of 12]" in pieces[7]


def test_the_end_of_what_is_typed_ends_it():
    assert titles(typed("")) == [stop.title for stop in STOPS[:2]]
    assert "Answer('white', 2 tokens" in typed(*[""] * 20)[-1]


def test_mistakes_are_one_line():
    assert_one_line_error(run(step.main), "give an image and a question, or a question alone; --list prints the stops")
    assert_one_line_error(run(step.main, QUESTION, SCENE), "first the image, then the question")
    assert_one_line_error(run(step.main, "a", "b", "c"), "give an image and a question")
    assert_one_line_error(run(step.main, "nope.png", QUESTION), "cannot read the image nope.png")


def test_a_fault_in_a_method_of_one_s_own_is_one_line_that_names_its_line(tmp_path):
    (tmp_path / "mine.py").write_text("def mine(index, tokens):\n    raise KeyError(index)\n", encoding="utf-8")
    ran = run(step.main, SCENE, QUESTION, "--method", f"{tmp_path}/mine.py:mine", stdin="\n" * 40)
    assert (ran.code, ran.err) == (2, "minivtw: error: KeyError: 0 (mine.py, line 2: raise KeyError(index))\n")


def test_the_list_names_lines_that_begin_as_the_stops_say():
    listed = run(step.main, "--list").out.splitlines()
    assert len(listed) == len(STOPS)
    for stop, line in zip(STOPS, listed):
        file, number = re.search(r"b (minivtw/\S+\.py):(\d+)", line).groups()
        source = (ROOT / file).read_text(encoding="utf-8").splitlines()[int(number) - 1]
        assert source.strip().startswith(stop.statement) and line.startswith(stop.title)


def stepping():
    """docs/stepping.py"""
    spec = importlib.util.spec_from_file_location("stepping", ROOT / "docs" / "stepping.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_chapter_1_and_the_editor_say_what_happens(monkeypatch):
    """Renewed by `python docs/stepping.py`; the last digits of a magnitude are the machine's."""
    monkeypatch.chdir(ROOT)
    module, page = stepping(), CHAPTER.read_text(encoding="utf-8")
    same = [re.sub(r"±[\d.]+", "±", text) for text in (page, module.renewed(page))]
    assert same[0] == same[1]
    assert module.LAUNCH.read_text(encoding="utf-8") == module.launch()


def test_every_stop_of_chapter_1_stops_in_plain_pdb():
    """As it is printed: each breakpoint, then what is to be looked at."""
    page = CHAPTER.read_text(encoding="utf-8")
    command = re.search(r"`python (-m pdb -m minivtw\.generate .*?)`", page)[1]
    rows = re.findall(r"^\| `(b minivtw/\S+?:(\d+).*?)` \| `(.+?)`: (.*?)[;|]", page, re.M)
    assert len(rows) == len(STOPS)
    lines = [breakpoint for breakpoint, *_ in rows]
    for number, (_, _, code, _) in enumerate(rows, 1):
        lines += ["c", f"p 'stop', {number}, {code}"]
    arguments = re.findall(r'"[^"]+"|\S+', command)
    ran = subprocess.run(
        [sys.executable, *(argument.strip('"') for argument in arguments)], input="\n".join([*lines, "q", ""]), cwd=ROOT,
        capture_output=True, encoding="utf-8", env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    reached = re.findall(r"> .+?\.py\((\d+)\)", ran.stdout)[1:]  # the first is the program's own start
    assert reached[: len(rows)] == [line for _, line, _, _ in rows], ran.stdout[-3000:]
    for number, (_, _, _, shown) in enumerate(rows, 1):
        value = re.search(rf"\('stop', {number}, (.*)\)$", ran.stdout, re.M)[1]
        assert shown.strip().split("±")[0] in value or value in shown, (number, value, shown)


@pytest.mark.skipif(os.name != "posix", reason="a pseudo-terminal")
def test_at_a_terminal():
    """Every stop by Enter, as a person does it."""
    import pty

    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "dumb", "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [sys.executable, "-m", "minivtw.step", SCENE, QUESTION], stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT,
        env=environment,
    )  # fmt: skip
    os.close(theirs)
    said, asked = "", 0
    try:
        while select.select([ours], [], [], 60)[0]:
            try:
                said += os.read(ours, 65536).decode("utf-8", "replace")
            except OSError:  # Linux' way to say that the other side has closed
                break
            if said.count("(step) ") > asked:
                asked += 1
                os.write(ours, b"\n")
    finally:
        child.kill()
        child.wait()
        os.close(ours)
    assert titles([said.replace("\r", "")]) == [stop.title for stop in STOPS]
    assert "Answer('white'" in said


@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(0, 5))
def test_attention_as_it_is_written_is_attention(seed, kv_heads, group, new, before):
    random = np.random.default_rng(seed)
    queries = random.standard_normal((kv_heads * group, new, 4)).astype(np.float32)
    keys, values = random.standard_normal((2, kv_heads, before + new, 4)).astype(np.float32)
    for sees in (None, np.arange(before, before + new) + 1):
        plain = step.attention_as_written(queries, keys, values, sees)
        np.testing.assert_allclose(plain, attention.attention(queries, keys, values, sees), atol=2e-6)


def test_what_is_changed_while_one_watches_is_as_before_afterwards():
    before = threads.THREADS, decoder.attention, vision.attention
    with pytest.raises(KeyError), step.in_plain_steps():
        assert decoder.attention is vision.attention is step.attention_as_written
        raise KeyError
    assert (threads.THREADS, decoder.attention, vision.attention) == before
