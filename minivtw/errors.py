"""The one error a user is meant to see, and how a door shows it."""

import argparse
import os
import sys


class InputError(ValueError):
    """Something the caller gave cannot be used; the message is one complete sentence for them."""


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a wrong option in one line, like every other error."""

    def error(self, message):
        raise InputError(message)


def door(main):
    """Run a command-line entry: errors become one line on standard error and exit code 2."""
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except InputError as error:
        print(f"minivtw: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except MemoryError:
        print("minivtw: error: this needs more memory than the machine has", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader (`| head`) has left; there is nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
