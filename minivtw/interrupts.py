"""Ctrl-C while a command still imports: it ends as it would later (`terminal.command`), without a traceback."""

import os
import signal
import sys

INTERRUPTED = 130  # the exit code: 128 + SIGINT


def is_command() -> bool:
    """Whether Python was started for a command of ours, and not for a program that imports us."""
    started = sys.argv[0] if getattr(sys, "argv", None) else ""
    if started == "-m":  # what Python puts there while it looks for the module that it will run
        return any(argument.partition(".")[0] == "minivtw" for argument in sys.orig_argv)
    return os.path.basename(started).removesuffix(".exe") == "minivtw"


def leave(*_: object) -> None:
    """End at once: nothing has been begun that would have to be tidied up."""
    os._exit(INTERRUPTED)


def raise_again() -> None:
    """From here on Ctrl-C raises KeyboardInterrupt, as usual."""
    if signal.getsignal(signal.SIGINT) is leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it may be ignored: nohup, &
    signal.signal(signal.SIGINT, leave)
