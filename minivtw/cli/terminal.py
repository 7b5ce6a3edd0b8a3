"""How a command speaks and how it ends: exit codes, errors in one line, progress, answers piece by piece."""

import contextlib
import copy
import io
import os
import pathlib
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TextIO

from ..errors import InputError, shortened
from ..inputs.opening import hush
from ..vlm import VLM
from . import interrupts

MOST_CHARACTERS = 500  # of a line on standard error
SLOW = 1.0  # seconds after which progress is shown
BAR = 40  # characters


def command(main: Callable[[list[str]], None]) -> None:
    """Run a command. What the caller can mend becomes one line on standard error and exit code 2; Ctrl-C is 130.

    A reader who has left (`| head`) is no error.
    """
    code = 0
    try:
        interrupts.hear(True)
        open_streams()
        hush()
        warnings.showwarning = lambda message, *_: say(message)
        main(sys.argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = interrupts.INTERRUPTED
    except InputError as error:
        code = refuse(error)
    except Exception as error:
        code = exit_code(error)
    finally:
        interrupts.hear(False)
    if code:
        sys.exit(code)


def exit_code(error: Exception) -> int:
    """Say what the system refused. Raises what is a fault, of ours or of a reader's own method, whatever its kind."""
    if getattr(error, "is_the_readers", False):
        raise error
    if isinstance(error, MemoryError):
        return refuse("this needs more memory than the machine has")
    if isinstance(error, OSError):  # of a file, or no room or no reader where standard output goes
        silence(sys.stdout)
        if isinstance(error, BrokenPipeError):
            return 0
        return refuse(f"{error.filename or 'standard output'}: {error.strerror or error}")
    if isinstance(error.__context__, KeyboardInterrupt):  # what was interrupted could not tidy up
        return interrupts.INTERRUPTED
    raise error


def refuse(message: object) -> int:
    """Say what is wrong. Returns the exit code for what the caller can mend."""
    interrupts.hear(False)
    say(f"error: {message}")
    return 2


def say(message: object) -> None:
    """One line on standard error; where that is full or closed, nothing."""
    line = error_line(f"minivtw: {message}")
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)
        return
    silence(sys.stderr)


def one_line(message: object) -> str:
    """A message without line breaks, and without characters that a terminal would obey."""
    return visible(" ".join(str(message).split()))


def error_line(message: object) -> str:
    """As `one_line`, at most MOST_CHARACTERS."""
    return shortened(one_line(message), MOST_CHARACTERS)


def located(error: BaseException, method: str | None) -> tuple[str, bool]:
    """A fault in words, with its file and line, and whether that is in a file that the text of a method names."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if f"{frame.filename}:" in (method or "")]
    at, words = (theirs or frames)[-1], "".join(traceback.format_exception_only(error))
    return f"{words} ({pathlib.Path(at.filename).name}, line {at.lineno}: {at.line})", bool(theirs)


def visible(text: str) -> str:
    """Text with every control character written as its number; line breaks and tabs stay."""
    return "".join(
        char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode() for char in text
    )


def open_streams() -> None:
    """Closed standard streams lead nowhere; characters that a terminal lacks, or would obey, are shown as numbers."""
    for name in ("stdin", "stdout", "stderr"):
        stream, is_read = getattr(sys, name), name == "stdin"
        if stream is None:  # opening takes the stream's own number, which is free; no other file may get it
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), "r" if is_read else "w", encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(io.UnsupportedOperation):  # of what has been read from already, by a debugger
                stream.reconfigure(errors="surrogateescape" if is_read else "backslashreplace")
        if name == "stdout" and sys.stdout.isatty():
            setattr(sys, name, VisibleStream(sys.stdout))


class VisibleStream:
    """Standard output where it is a terminal: whatever is printed, it gets no character that it would obey."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._stream.write(visible(text))


def silence(stream: TextIO) -> None:
    """What a stream still holds goes nowhere: its reader has left, or there is no room for it."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def progress_line(total: int | None = None, what: str = "") -> Callable[[int], None]:
    """A bar on standard error while a terminal shows it; without a total, how many of `what`. It is told how many."""

    def progress(done: int) -> None:
        if sys.stderr.isatty():
            line = f"\r{done} {what}" if total is None else bar(done, total)
            print(line, end="\n" if done == total else "", file=sys.stderr, flush=True)

    return progress


def bar(done: int, total: int) -> str:
    filled = BAR * done // total
    return f"\r[{'#' * filled}{'.' * (BAR - filled)}] {done}/{total}"


class Progress:
    """What a terminal shows of one turn, as a context: how far vision and prefill are, from the first second on, and then
    the answer, piece by piece. The answer's line ends, whatever ends the answer.
    """

    def __init__(self) -> None:
        self._began, self._shown, self._last = 0.0, 0, ("", 0)
        self._answer: str | None = None  # what has been printed of it

    def __enter__(self) -> "Progress":
        self._began, self._last, self._answer = time.monotonic(), ("", 0), None
        return self

    def __exit__(self, error: type | None, *_: Any) -> None:
        try:
            self.clear()
        finally:
            if self._answer or (self._answer is not None and error is None):
                print(flush=True)

    def __call__(self, done: int, total: int, what: str) -> None:
        if what == self._last[0] and done < self._last[1]:  # the layers begin again: the prompt has been read
            self.clear()
        self._last = what, done
        if time.monotonic() - self._began > SLOW:
            line = f"{bar(done, total)} {what}"
            print(line.ljust(self._shown), end="", file=sys.stderr, flush=True)
            self._shown = len(line)

    def clear(self) -> None:
        """Take the line away, and show no more of the progress in this turn."""
        if self._shown:
            print(f"\r{' ' * self._shown}\r", end="", file=sys.stderr, flush=True)
        self._began, self._shown = float("inf"), 0

    def print_piece(self, piece: str) -> None:
        """Print a piece of the answer, without the space that most answers begin with."""
        piece = piece if self._answer else piece.lstrip()
        self._answer = (self._answer or "") + piece
        self.clear()
        print(piece, end="", flush=True)


class WatchedLayers(Sequence):
    """A decoder's layers that report to a `Progress` which of them is read."""

    def __init__(self, layers: Sequence, progress: Progress) -> None:
        self._layers, self._progress = layers, progress

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, index: Any) -> Any:
        self._progress(index, len(self), "layers")
        return self._layers[index]


def watched(vlm: VLM) -> tuple[VLM, Progress]:
    """The model as it is or, where standard error is a terminal, one that shows how far it is; the `Progress` of it."""
    progress = Progress()
    if not sys.stderr.isatty():
        return vlm, progress
    vlm, vision = copy.copy(vlm), vlm.parts.vision
    vlm.decoder = replace(vlm.decoder, layers=WatchedLayers(vlm.decoder.layers, progress))
    if vision:
        done = total = 0

        def tile(*arguments: Any) -> Any:
            nonlocal done, total
            cut = vision.tile(*arguments)
            done, total = 0, len(cut[0])
            return cut

        def connect(features: Any) -> Any:
            nonlocal done
            done += 1
            progress(done, total, "tiles")
            return vision.connect(features)

        vlm.parts = replace(vlm.parts, vision=replace(vision, tile=tile, connect=connect))
    return vlm, progress
