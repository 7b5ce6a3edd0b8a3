"""Ctrl-C while a command still imports: it ends as it would later (`terminal.command`), without a traceback."""

import os  # Python has loaded these two by itself: nothing else is imported before Ctrl-C is heard
import sys

INTERRUPTED = 130  # the exit code: 128 + SIGINT


def is_command() -> bool:
    """Whether Python was started for a command of ours, and not for a program that imports us."""
    started = sys.argv[0] if getattr(sys, "argv", None) else ""
    if started == "-m":  # what Python puts there while it looks for the module that it will run
        return any(argument.partition(".")[0] == "minivtw" for argument in sys.orig_argv)
    return os.path.basename(started).removesuffix(".exe") == "minivtw"


def end_quietly(kind, error, trace) -> None:
    """What Python calls for an error that nobody caught: a Ctrl-C then finds nothing that would have to be tidied up."""
    if issubclass(kind, KeyboardInterrupt):
        os._exit(INTERRUPTED)
    sys.__excepthook__(kind, error, trace)


if is_command():
    sys.excepthook = end_quietly
