"""How commands speak and end, whatever their streams are: closed, full, ASCII, a terminal."""

import importlib
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

import minivtw
from minivtw import chat, generate, terminal
from minivtw.__main__ import COMMANDS
from minivtw.__main__ import main as all_commands
from tests.doors import assert_one_line_error, assert_promise, make_world, run


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def short(*arguments):
    return [*arguments, "--max-new-tokens", "2"]


@pytest.mark.parametrize(
    "door, arguments, redirected, code, words",
    [
        ("generate", "{picture} hi", ">/dev/full", 2, "standard output: No space left on device"),
        ("generate", "--help", ">/dev/full", 2, "standard output: No space left on device"),
        ("generate", "{picture} hi --json", ">&-", 0, ""),
        ("generate", "nope.png hi", "2>&-", 2, ""),
        ("generate", "nope.png hi", "2>/dev/full", 2, ""),
        ("chat", "{picture}", "<&-", 0, ""),
    ],
)
def test_streams_that_are_full_or_closed(world, door, arguments, redirected, code, words):
    line = arguments.format(picture=world.picture)
    command = f"{sys.executable} -m minivtw.{door} {line} {'' if '--help' in line else f'--model {world.model}'}"
    done = subprocess.run(["bash", "-c", f"exec {command} {redirected}"], capture_output=True, text=True)
    assert done.returncode == code and done.stdout == ""
    assert done.stderr == (f"minivtw: error: {words}\n" if words else "")


def test_a_reader_who_leaves_is_no_error(world):
    line = shlex.join([sys.executable, "-m", "minivtw.generate", str(world.picture), "hi", "--model", str(world.model)])
    done = subprocess.run(
        ["bash", "-c", f"{line} --trace | head -1; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr == "" and done.stdout.startswith("vision.pixels")


def test_a_closed_stream_does_not_give_its_number_to_a_file(monkeypatch):
    saved = os.dup(2)
    try:
        os.close(2)
        monkeypatch.setattr(sys, "stderr", None)
        terminal.open_streams()
        assert sys.stderr.fileno() == 2
    finally:
        sys.stderr.close()
        os.dup2(saved, 2)
        os.close(saved)


@pytest.mark.parametrize("door", ["", *COMMANDS])
def test_help_on_an_ascii_terminal(door, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    monkeypatch.setattr(sys, "argv", ["door", *([door] if door else []), "--help"])
    try:
        terminal.command(all_commands)
    except SystemExit as end:
        assert not end.code
    assert raw.getvalue().isascii() and raw.getvalue().count(b"\n") >= 5


def test_an_answer_on_an_ascii_terminal(world, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    monkeypatch.setattr(sys, "argv", ["door"])
    terminal.command(lambda _: print("déjà vu"))
    assert raw.getvalue() == b"d\\xe9j\\xe0 vu\n"


def test_what_a_terminal_would_obey_is_written_out(world):
    assert_one_line_error(run(generate.main, "\x1b[31m\x07.png", "x", "--model", world.model), r"\x1b[31m\x07.png")
    assert_one_line_error(run(generate.main, "a\n\udcff.png", "x", "--model", world.model), r"a \udcff.png")
    printer = terminal.Printer(terminal.Progress())
    assert run(lambda _: printer("a\x1b]0;b\n\tc"), terminal=True).out == "a\\x1b]0;b\n\tc"
    assert run(lambda _: terminal.Printer(terminal.Progress())("a\x1b]0;b")).out == "a\x1b]0;b"  # a file gets all


def test_a_long_error_keeps_its_beginning_and_its_end(world):
    ran = run(generate.main, world.picture, "x", "--model", "m" * 9000)
    assert_one_line_error(ran, "minivtw: error: cannot read mmm")
    assert ran.err.endswith(": File name too long\n")


def test_a_chat_goes_on_after_a_line_that_is_not_text(world):
    ran = run(chat.main, world.picture, *short("--model", world.model), stdin="\udcff\n/image\n/image nope.png\nhi\n")
    assert ran.code == 0 and ran.err.count("\n") == 3 and ran.out.count("\n") == 1
    assert "the prompt is not UTF-8 text" in ran.err and "nope.png" in ran.err


def test_a_chat_without_standard_input_ends(world, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setattr(sys, "argv", ["door", str(world.picture), "--model", str(world.model)])
    terminal.command(chat.main)


def test_what_the_system_refuses_is_one_line(world):
    def no_room(_):
        raise OSError(28, "No space left on device")

    assert_one_line_error(run(no_room), "standard output: No space left on device")
    assert_one_line_error(run(lambda _: os.stat("/no/such/file")), "/no/such/file: No such file or directory")
    assert_one_line_error(run(lambda _: bytearray(2**62)), "more memory than the machine has")


def test_every_command_is_listed_and_found():
    ran = run(all_commands)
    assert ran.code == 0 and all(f"\n  {name} " in ran.out for name in COMMANDS)
    assert all(callable(importlib.import_module(f"minivtw.{name}").main) for name in COMMANDS)
    assert_one_line_error(run(all_commands, "paint"), "there is no command 'paint'")


def test_a_picture_without_a_name_is_not_a_question_without_a_picture(world):
    assert_one_line_error(run(generate.main, "", "What?", "--model", world.model), "the name of the picture is empty")


@pytest.mark.parametrize("temperature", [1e-320, 5e-324, 1e-308, 1e308])
def test_any_temperature_draws(world, temperature):
    vlm = minivtw.load(world.model)
    answer = vlm.answer(world.picture, "Hm?", temperature=temperature, max_new_tokens=3)
    assert len(answer.token_ids) == 3
    if temperature < 1:
        assert answer.token_ids == vlm.answer(world.picture, "Hm?", max_new_tokens=3).token_ids


def test_a_home_that_is_not_there(monkeypatch, world):
    monkeypatch.setenv("MINIVTW_CACHE", "~no-such-user/cache")
    ran = run(generate.main, world.picture, "x", "--model", "smol")
    assert_one_line_error(ran, "there is no such home folder; set MINIVTW_CACHE")


def test_ctrl_c_while_python_imports_says_nothing():
    """From the first line of the package on; before that, Python itself starts."""
    code = (
        "import os, signal, sys, importlib.abc\n"
        "class Interrupt(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'numpy': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "sys.argv, sys.orig_argv = ['-m'], ['python', '-m', {module!r}]\n"
        "import minivtw\n"
    )
    ended = subprocess.run([sys.executable, "-c", code.format(module="minivtw.generate")], capture_output=True)
    assert ended.returncode == 130 and ended.stderr == b""
    others = subprocess.run([sys.executable, "-c", code.format(module="theirs")], capture_output=True)
    assert others.returncode != 130 and b"KeyboardInterrupt" in others.stderr  # a program that imports us is left alone


def test_ctrl_c_in_an_answer_keeps_what_was_said(world):
    arguments = [world.picture, "hi", "--model", world.model, "--temperature", 3, "--max-new-tokens", 10]
    whole = run(generate.main, *arguments).out

    def stopped(piece_count):
        left = piece_count

        class Stops(terminal.Printer):
            def __call__(self, piece):
                nonlocal left
                super().__call__(piece)
                left -= 1
                if not left:
                    signal.raise_signal(signal.SIGINT)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(generate, "Printer", Stops)
            return run(generate.main, *arguments)

    for count in (1, 4, 9):
        ran = stopped(count)
        assert_promise(ran, 130)
        assert whole.startswith(ran.out.removesuffix("\n"))
    assert len(stopped(9).out) > 3


class Slow:
    """A clock on which every look takes so many seconds."""

    def __init__(self, seconds=0.5):
        self.now, self.seconds = 0.0, seconds

    def monotonic(self):
        self.now += self.seconds
        return self.now


def shown(err):
    """What a terminal shows at each moment: a line is written over the one before."""
    line, lines = "", []
    for part in err.split("\r")[1:]:
        line = part + line[len(part) :]
        lines.append(line.rstrip())
    return lines


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_terminal_sees_how_far_the_prompt_is(world, monkeypatch, options):
    monkeypatch.setattr(terminal, "time", Slow())
    ran = run(generate.main, world.picture, "hi", *short("--model", world.model, *options), terminal=True)
    plain = run(generate.main, world.picture, "hi", *short("--model", world.model, *options))
    assert plain.err == "" and ran.code == 0
    lines = shown(ran.err)
    assert lines[:3] == [f"[{'#' * (10 * n)}{'.' * (40 - 10 * n)}] {n}/4 layers" for n in (1, 2, 3)]
    assert not any(lines[3:])  # gone before the answer, and for good
    if not options:
        assert ran.out == terminal.visible(plain.out)


def test_a_quick_answer_shows_no_progress(world):
    assert run(generate.main, world.picture, "hi", *short("--model", world.model), terminal=True).err == ""


def test_tiles_are_counted_before_the_layers(world, monkeypatch):
    monkeypatch.setattr(terminal, "time", Slow(2))
    more = short("--image", world.picture, "--model", world.model)
    lines = shown(run(generate.main, world.picture, "hi", *more, terminal=True).err)
    assert [line.partition("] ")[2] for line in lines[:3]] == ["1/2 tiles", "2/2 tiles", "0/4 layers"]


def test_every_turn_begins_anew(world, monkeypatch):
    monkeypatch.setattr(terminal, "time", Slow())
    ran = run(
        chat.main, world.picture, world.picture, *short("--model", world.model), stdin="hi\nhi\n", terminal=True
    )  # fmt: skip
    assert ran.code == 0
    lines = [line.partition("] ")[2] for line in shown(ran.err)]
    first = [f"{n}/4 layers" for n in range(4)]
    assert [line for line in lines if line] == first + ["2/4 layers", "3/4 layers"]
    assert lines[len(first)] == "" and lines[-1] == ""  # before each answer


def test_watching_changes_no_answer(world, monkeypatch):
    vlm = minivtw.load(world.model)
    with monkeypatch.context() as patch:
        patch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
        watched, progress = terminal.watched(vlm)
    assert watched is not vlm
    with progress:
        ours = watched.answer(world.picture, "Hm?", max_new_tokens=4, method="fastv:layer=2")
    plain = vlm.answer(world.picture, "Hm?", max_new_tokens=4, method="fastv:layer=2")
    assert ours.token_ids == plain.token_ids
    drop = lambda stats: json.dumps({name: value for name, value in stats.items() if name != "seconds"})
    assert drop(ours.stats) == drop(plain.stats)


def test_numpy_warns_of_nothing_in_any_thread():
    """Each thread has its own `np.errstate`, and what a mean over nothing says is none of its business."""

    def main(arguments):
        for work in (np.zeros(0).mean, lambda: np.log(np.zeros(1)), lambda: np.float32(1e38) * np.float32(1e38)):
            work()
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()

    assert run(main) == (0, "", "")
