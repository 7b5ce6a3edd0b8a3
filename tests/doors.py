"""Running a command in this process, as `python -m` would."""

import contextlib
import io
import sys
from typing import NamedTuple
from unittest import mock

from minivtw.terminal import command


class Ran(NamedTuple):
    code: int
    out: str
    err: str


def run(main, *arguments):
    """(exit code, standard output, standard error) of a door's `main`."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with mock.patch.object(sys, "argv", ["door", *map(str, arguments)]):
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
    assert words in ran.err, ran.err
