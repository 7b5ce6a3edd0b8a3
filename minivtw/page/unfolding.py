"""A layer unfolded: every statement that ran in it, with the arrays that it made.

Nothing is computed a second time or in another way: Python tells a trace function each line as it runs, and what is new
among the names of a function since its line before is what that line made. So the page shows the code as it stands.
"""

import ast
import functools
import pathlib
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NamedTuple

import numpy as np

from ..threads import alone

PACKAGE = pathlib.Path(__file__).parent.parent
TraceFunction = Callable[[FrameType, str, Any], Any]


class Step(NamedTuple):
    """One statement that made arrays."""

    file: str  # in the package
    line: int
    source: str
    arrays: dict[str, np.ndarray]
    inside: list["Called"]  # what it called


class Called(NamedTuple):
    """A function of the model that ran, statement by statement."""

    name: str
    summary: str  # the first line of its docstring
    steps: list[Step]


class RunningFunction:
    """A function while it runs."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.line: int | None = None
        self.known: dict[str, Any] = {}
        self.made: dict[str, np.ndarray] = {}
        self.steps: list[Step] = []
        self.inside: list[Called] = []
        self.lines: set[int] = set()

    def is_new(self, name: str, value: np.ndarray) -> bool:
        """Whether a name stands for another array than before, or for the same with other numbers in it."""
        is_other = self.known.get(name) is not value
        return is_other or (name in self.made and not np.array_equal(self.made[name], value))

    def passed(self, line: int | None, names: dict[str, Any], returned: Any = None) -> None:
        """The line before this one has run, and these are the function's names now."""
        arrays = {
            name: value.copy()  # what comes next may write into it
            for name, value in names.items()
            if isinstance(value, np.ndarray) and self.is_new(name, value)
        }
        if self.line is not None:
            self.made.update(arrays)  # not what it was called with, such as weights
        if isinstance(returned, np.ndarray):
            arrays["returned"] = returned
        is_repeated = self.line in self.lines  # of a loop, the first round is shown
        if self.line is not None and (arrays or self.inside) and not is_repeated:
            self.lines.add(self.line)
            first, source = statement(self.path, self.line)
            file = pathlib.Path(self.path).relative_to(PACKAGE).as_posix()
            self.steps.append(Step(file, first, source, arrays, self.inside))
        self.inside = []
        self.line, self.known = line, dict(names)


@functools.cache
def statements(path: str) -> list[tuple[int, int]]:
    """The simple statements and headers of a Python file: [(first line, last line)]."""
    nodes = ast.walk(ast.parse(pathlib.Path(path).read_text(encoding="utf-8")))
    simple = [node for node in nodes if isinstance(node, ast.stmt) and not hasattr(node, "body")]
    return [(node.lineno, node.end_lineno or node.lineno) for node in simple]


def statement(path: str, line: int) -> tuple[int, str]:
    """The first line, and the text, of the statement that a line belongs to."""
    first, last = next((span for span in statements(path) if span[0] <= line <= span[1]), (line, line))
    lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()[first - 1 : last]
    return first, " ".join(part.strip() for part in lines)


def unfolded(function: Callable[..., Any], *arguments: Any) -> Called:
    """Run a function of `minivtw.model` and note what every statement made, in it and in what it calls there."""
    running: list[RunningFunction] = []
    whole: list[Called] = []

    def trace(frame: FrameType, event: str, argument: Any) -> TraceFunction | None:
        code = frame.f_code
        if not code.co_filename.startswith(str(PACKAGE / "model")) or code.co_name.startswith(("<", "_")):
            return None
        running.append(RunningFunction(code.co_filename))
        return local

    def local(frame: FrameType, event: str, argument: Any) -> TraceFunction:
        if event == "line":
            running[-1].passed(frame.f_lineno, frame.f_locals)
        elif event == "return":
            done = running.pop()
            done.passed(None, frame.f_locals, argument)
            named = frame.f_globals.get(frame.f_code.co_name)
            called = Called(frame.f_code.co_name, (getattr(named, "__doc__", None) or "").split("\n")[0], done.steps)
            (running[-1].inside if running else whole).append(called)
        return local

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with alone():  # other threads are not traced, and share products in another order
            function(*arguments)
    finally:
        sys.settrace(before)
    return whole[-1]
