"""How commands speak and end, whatever their streams are: closed, full, ASCII, a terminal."""

import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

import minivtw
from minivtw import chat, evaluate, generate
from minivtw.__main__ import COMMANDS, found
from minivtw.__main__ import main as all_commands
from minivtw.cli import terminal
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
    more = "" if arguments == "--help" else " --model {model}"
    command = shlex.join([sys.executable, "-m", f"minivtw.{door}", *world.arguments(arguments + more)])
    done = subprocess.run(["bash", "-c", f"exec {command} {redirected}"], capture_output=True, encoding="utf-8")
    assert done.returncode == code and done.stdout == ""
    assert done.stderr == (f"minivtw: error: {words}\n" if words else "")


def test_a_reader_who_leaves_is_no_error(world):
    line = shlex.join([sys.executable, "-m", "minivtw.generate", str(world.picture), "hi", "--model", str(world.model)])
    done = subprocess.run(
        ["bash", "-c", f"{line} --trace | head -1; exit ${{PIPESTATUS[0]}}"], capture_output=True, encoding="utf-8"
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
    for says in (terminal.Progress().print_piece, lambda text: print(text, end="")):
        assert run(lambda _: says("a\x1b]0;b\n\tc\r"), terminal=True).out == "a\\x1b]0;b\n\tc\\r"
    assert run(lambda _: terminal.Progress().print_piece("a\x1b]0;b")).out == "a\x1b]0;b"  # a file gets all


@pytest.mark.parametrize("door", [evaluate.main, generate.main])
def test_no_table_is_obeyed_by_a_terminal(world, door):
    """What strangers name: the folder of a model, the family of a question."""
    folder, questions = world.folder / "m\x1b]0;\x07", world.folder / "q\x1b[2J"
    if not folder.exists():
        folder.symlink_to(world.model)
        shutil.copytree(world.questions, questions)
        asked = (questions / "questions.jsonl").read_text(encoding="utf-8").replace('"one"', '"\\u001b]0;one\\u0007"')
        (questions / "questions.jsonl").write_text(asked, encoding="utf-8")
    arguments = {
        evaluate.main: [questions, "--model", folder],
        generate.main: short(world.picture, "Hm?", "--model", folder, "--stats"),
    }[door]
    ran = run(door, *arguments, terminal=True)
    assert ran.code == 0 and r"\x1b]0;" in ran.out
    assert ran.out.replace("\n", "").isprintable()


def test_a_long_error_keeps_its_beginning_and_its_end(world):
    ran = run(generate.main, world.picture, "x", "--model", "m" * 9000)
    assert_one_line_error(ran, "minivtw: error: cannot read mmm")
    assert ran.err.endswith(": File name too long\n")


def test_a_chat_goes_on_after_a_line_that_is_not_text(world):
    ran = run(chat.main, world.picture, *short("--model", world.model), stdin="\udcff\n/image\n/image nope.png\nhi\n")
    assert ran.code == 0 and ran.err.count("\n") == 3 and ran.out.count("\n") == 1
    assert "the prompt is not UTF-8 text" in ran.err and "nope.png" in ran.err


@pytest.mark.parametrize("many", [30, 1])
def test_a_chat_goes_on_without_a_picture_that_cannot_be_used(world, many):
    """Too many for the positions; and one, with a question that leaves it no room."""
    lines = ["/image " + str(world.picture)] * many + ["What?" if many > 1 else "What? " * 39, "What?"]
    ran = run(chat.main, *short("--model", world.model), stdin="\n".join(lines))
    assert ran.code == 0 and ran.err.count("\n") == 1
    assert "the model has 256 positions; the next question goes without an image" in ran.err
    assert ran.out == run(chat.main, *short("--model", world.model), stdin="What?").out


def test_a_chat_keeps_a_picture_that_the_words_have_not_been_said_to(world):
    lines = ["</s>", "/image nope.png", "<image> and <image>?", "What?"]
    ran = run(chat.main, world.picture, *short("--model", world.model), stdin="\n".join(lines))
    assert ran.code == 0 and ran.err.count("\n") == 3 and "without an image" not in ran.err
    assert ran.out == run(chat.main, world.picture, *short("--model", world.model), stdin="What?").out


def test_a_chat_takes_its_last_turn_back_and_shows_its_picture_again(world):
    arguments = (world.picture, *short("--model", world.model))
    ran = run(chat.main, *arguments, stdin="Hm?\n/undo\nWhat?\nAnd?\n/undo\nWhy?")
    first, straight = (run(chat.main, *arguments, stdin=lines).out.splitlines() for lines in ("Hm?", "What?\nWhy?"))
    answers = ran.out.splitlines()
    assert ran.err == "" and len(answers) == 4 and [answers[0], answers[1], answers[3]] == first + straight
    ran = run(chat.main, *arguments, stdin="/undo\nHm?\n/undo\n/undo\nHm?")
    assert ran.out.splitlines() == first * 2
    assert ran.err.count("there is no turn to take back") == ran.err.count("\n") == 2


def test_a_chat_says_its_commands_and_asks_the_model_nothing(world):
    ran = run(chat.main, *short("--model", world.model), stdin="/help\n/imagine a.png\n/quit\nWhat?")
    assert (ran.code, ran.out) == (0, f"{chat.HELP}\n")
    assert ran.err == "minivtw: error: there is no command /imagine; /help names them\n"


def test_a_chat_without_standard_input_ends(world, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setattr(sys, "argv", ["door", str(world.picture), "--model", str(world.model)])
    terminal.command(chat.main)
    sys.stdin.close()  # what the command opened in its place


def test_what_the_system_refuses_is_one_line(world):
    def no_room(_):
        raise OSError(28, "No space left on device")

    assert_one_line_error(run(no_room), "standard output: No space left on device")
    assert_one_line_error(run(lambda _: os.stat("/no/such/file")), "/no/such/file: No such file or directory")
    assert_one_line_error(run(lambda _: bytearray(2**62)), "more memory than the machine has")


def test_every_command_is_listed_and_found():
    ran = run(all_commands)
    assert ran.code == 0 and all(f"\n  {name} " in ran.out for name in COMMANDS)
    assert all(callable(found(name)) for name in COMMANDS)
    assert_one_line_error(run(all_commands, "paint"), "there is no command 'paint'")


def test_a_picture_without_a_name_is_not_a_question_without_a_picture(world):
    assert_one_line_error(run(generate.main, "", "What?", "--model", world.model), "the name of the image is empty")


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


STARTED = """
import atexit, importlib.abc, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which `nohup` takes away
interrupt = lambda *_: os.kill(os.getpid(), signal.SIGINT)
class AtNumPy(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "numpy":
            interrupt()
sys.argv, sys.orig_argv = ["-m"], ["python", "-m", {module!r}]
{before}
from minivtw.cli.terminal import command
{after}
"""
IMPORTING = "sys.meta_path.insert(0, AtNumPy())"


@pytest.mark.parametrize(
    "module, before, after, code, said",
    [
        ("minivtw.generate", IMPORTING, "print('imported')", -signal.SIGINT, b""),
        ("minivtw.generate", "", "command(interrupt)", 130, b""),
        ("minivtw", "atexit.register(interrupt)", "command(lambda _: print('done'))", -signal.SIGINT, b"done\n"),
        ("minivtw", f"signal.signal(signal.SIGINT, signal.SIG_IGN); {IMPORTING}", "command(interrupt)", 0, b""),
        ("theirs", "", "print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)", 0, b"True\n"),
    ],
    ids=["while modules are imported", "in a command", "while Python ends", "where it is ignored", "in a program"],
)
def test_ctrl_c_says_nothing_at_any_moment_of_a_command(module, before, after, code, said):
    """From the first module of the package on; before that, Python itself starts. What imports us is left alone."""
    script = STARTED.format(module=module, before=before, after=after)
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (code, said, b"")


def test_the_plug_without_torch_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(minivtw.InputError, match="needs two packages"):
        from minivtw.plug import withdraw  # noqa: F401
    needs = "minivtw.plug needs two packages: pip install 'minivtw[transformers]'"
    assert_one_line_error(run(all_commands, "plug", "llava-1.5-7b"), needs)
    assert_one_line_error(run(all_commands, "plug", "llava-1.5-7b", "--text", 2), "--text 3 or more")
    with pytest.raises(SystemExit) as ended:
        all_commands(["plug", "--help"])
    assert ended.value.code == 0 and "qwen2.5-vl-7b" in capsys.readouterr().out


def test_ctrl_c_in_an_answer_keeps_what_was_said(world):
    arguments = [world.picture, "hi", "--model", world.model, "--temperature", 3, "--max-new-tokens", 10]
    whole = run(generate.main, *arguments).out

    def stopped(piece_count):
        left, print_piece = piece_count, terminal.Progress.print_piece

        def stops(progress, piece):
            nonlocal left
            print_piece(progress, piece)
            left -= 1
            if not left:
                signal.raise_signal(signal.SIGINT)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(terminal.Progress, "print_piece", stops)
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


def test_a_quick_answer_shows_no_progress(world, monkeypatch):
    monkeypatch.setattr(terminal, "time", Slow(0))
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
