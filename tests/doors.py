"""Running a command in this process, as `python -m` would."""

import contextlib
import io
import json
import os
import pathlib
import resource
import shutil
import socket
import stat
import sys
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from minivtw.cli.terminal import MOST_CHARACTERS, command, visible
from tests.small_llava import CONFIG, write_folder


def copied(source, target, ignore=None):
    """A copy of a file or folder of the repository that can be written to, also where the repository cannot.

    target: where the copy is to be, or for a file the folder that it goes to. Returns its path.
    """
    if source.is_dir():
        shutil.copytree(source, target, ignore=ignore)
    else:
        target = pathlib.Path(shutil.copy(source, target))
    for path in (target, *target.rglob("*")):
        path.chmod(path.stat().st_mode | stat.S_IWUSR)
    return target


def needs_loopback():
    """Skip a test that opens a connection to its own machine where there is no way to."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), 5):
            pass
    except OSError as error:
        pytest.skip(f"needs the loopback interface and a free port: {error}")


def examples(quick, deep):
    """Run a property quickly in the suite, and deeply under `pytest -m deep`."""
    drawn = pytest.mark.hypothesis  # as hypothesis itself marks a test under `@given`; here that is within the test
    deeply = pytest.param(deep, marks=[drawn, pytest.mark.deep])
    return pytest.mark.parametrize("examples", [pytest.param(quick, marks=drawn), deeply])


class Ran(NamedTuple):
    code: int
    out: str
    err: str


class Terminal(io.StringIO):
    """Standard output or standard error as a terminal."""

    def isatty(self):
        return True


def in_bytes(argument):
    """What a shell hands on: UTF-8, the bytes that a name of a file stands for, or half of a character as it is."""
    try:
        return argument.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return argument.encode("utf-8", "surrogatepass")


def run(main, *arguments, stdin="", terminal=False):
    """(exit code, standard output, standard error) of a door's `main`; its arguments are typed in UTF-8."""
    typed = [os.fsdecode(in_bytes(str(argument))) for argument in arguments]
    out, err, code = (Terminal(), Terminal(), 0) if terminal else (io.StringIO(), io.StringIO(), 0)
    with mock.patch.object(sys, "argv", ["door", *typed]), mock.patch("sys.stdin", io.StringIO(stdin)):
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                command(main)
            except SystemExit as end:
                code = end.code or 0
    return Ran(code, out.getvalue(), err.getvalue())


def assert_one_line_error(ran, words):
    """Exit code 2, nothing on standard output, one line on standard error that says what is wrong."""
    assert ran.code == 2, ran
    assert ran.out == ""
    assert ran.err.startswith("minivtw: error: ") and ran.err.count("\n") == 1 and ran.err.endswith("\n"), ran.err
    assert len(ran.err) <= MOST_CHARACTERS, ran.err
    assert visible(words) in ran.err, ran.err


def assert_promise(ran, code=None):
    """What holds for every run of every command: done and silent, or one line that a terminal shows as it stands."""
    assert ran.code in (0, 2) if code is None else ran.code == code, ran
    if ran.code == 2:
        line = ran.err.removesuffix("\n")
        assert line.startswith("minivtw: error: ") and line.isprintable() and len(line) <= MOST_CHARACTERS, ran.err
        assert "more memory than the machine has" not in line, ran.err
    else:
        assert ran.err == ""
    assert ran.out == "" or ran.out.endswith("\n"), ran.out


@contextlib.contextmanager
def interrupted(after):
    """Ctrl-C at one of the calls of Python functions from here on: at the first if `after` is 0.

    Not at the door of an `__exit__`: what tidies up may be interrupted within, but it is begun. And not in what hypothesis
    lets the garbage collector call, which swallows it.
    """
    left = after

    def count(frame, event, argument):
        nonlocal left
        is_collected = (
            "hypothesis" in pathlib.Path(frame.f_code.co_filename).parts
        )  # its garbage, whenever Python likes
        left -= event == "call" and frame.f_code.co_name not in ("__exit__", "gc_callback") and not is_collected
        if left < 0:
            sys.setprofile(None)
            raise KeyboardInterrupt

    sys.setprofile(count)
    try:
        yield
    finally:
        sys.setprofile(None)


@contextlib.contextmanager
def bounded_memory(more=2 * 2**30):
    """Whoever asks for so many bytes more than are held now gets a MemoryError."""
    held = int(pathlib.Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (held + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


class World(NamedTuple):
    """Files that every command can work on."""

    folder: pathlib.Path
    model: pathlib.Path  # a small random LLaVA: four layers, 256 positions
    picture: pathlib.Path
    questions: pathlib.Path  # a folder with questions.jsonl

    def files(self):
        """Every file of the world with its content, but for weights and tokenizers."""
        paths = (path for path in self.folder.rglob("*") if path.is_file() and path.suffix != ".safetensors")
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in paths}

    def arguments(self, line, **more):
        """A command's arguments from a line such as `{picture} Hm? --model {model}`; a path may hold spaces."""
        return [word.format(**self._asdict(), **more) for word in line.split()]

    @contextlib.contextmanager
    def left_as_it_was(self):
        """What is written here within is removed at the end; what was here must not change."""
        before = self.files()
        try:
            yield
        finally:
            after = self.files()
            for path in after.keys() - before.keys():
                (self.folder / path).unlink()
        assert after.items() >= before.items()


def make_world(folder):
    config = CONFIG | {"text_config": CONFIG["text_config"] | {"max_position_embeddings": 256}}
    model = write_folder(folder / "model", config=config)
    world = World(folder, model, folder / "picture.png", folder / "questions")
    world.questions.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)).save(world.picture)
    question = {"image": "../picture.png", "family": "one", "question": "Hm?", "answer": "a"}
    (world.questions / "questions.jsonl").write_text(json.dumps(question), encoding="utf-8")
    return world
