"""Ctrl-C before and after a command's own time: while its modules are imported, and while Python ends.

Nothing is open then that would have to be tidied up, and a KeyboardInterrupt would end somewhere in NumPy's import, or be
lost. So the process dies of the signal, without a word. `terminal.command` hears Ctrl-C in between.
"""

import _signal  # type: ignore[import-not-found]  # `signal` without its enums: no file is read before Ctrl-C is heard
import os
import sys

INTERRUPTED = 130  # the exit code: 128 + SIGINT, as a shell also writes the death by it


def is_command() -> bool:
    """Whether Python was started for a command of ours, and not for a program that imports us."""
    started = sys.argv[0] if getattr(sys, "argv", None) else ""
    if started == "-m":  # what Python puts there while it looks for the module that it will run
        return sys.orig_argv[-len(sys.argv)].partition(".")[0] in ("minivtw", "-mminivtw")
    return os.path.basename(started).removesuffix(".exe") == "minivtw"


def hear(is_heard: bool) -> None:
    """Whether Ctrl-C raises KeyboardInterrupt; only where it did before we came, in a process of ours."""
    if OURS:
        _signal.signal(_signal.SIGINT, _signal.default_int_handler if is_heard else _signal.SIG_DFL)


OURS = is_command() and _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler
hear(False)
