"""The one error that a user is meant to see."""

import contextlib
import operator
from collections.abc import Iterator
from typing import Any


class InputError(ValueError):
    """Something the caller gave cannot be used; the message is one complete sentence for them, in one line."""

    def __init__(self, message: object) -> None:
        super().__init__(" ".join(str(message).splitlines()))


@contextlib.contextmanager
def reading(what: object, does: str = "read") -> Iterator[None]:
    """What the system refuses in this block, in any file of it, becomes one InputError; the cause is chained."""
    try:
        yield
    except OSError as error:
        where = "" if error.filename in (None, str(what)) else f" ({error.filename})"
        raise InputError(f"cannot {does} {what}: {error.strerror or error}{where}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{what} is not UTF-8 text: {error}") from error
    except UnicodeEncodeError as error:
        raise InputError(f"cannot {does} {what}: no file can have this name in the locale at hand") from error


@contextlib.contextmanager
def tokenizing(what: str) -> Iterator[None]:
    """Whatever the tokenizers library raises in this block becomes one InputError that begins with `what`.

    The library has no class of its own for it, and where it panics, not even an Exception.
    """
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        # Rust's panic, which nothing but its name tells from Ctrl-C
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{what}: {error}") from error


def shortened(text: str, most: int = 300) -> str:
    """At most that many characters of a text: what it is about stands in front, what is wrong at the end."""
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 3 :]}"


def counted(number: int, noun: str) -> str:
    """1 tile, 2 tiles."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def check_functions(**given: Any) -> None:
    """Raise InputError for what a caller gave to be called, by its name, and cannot be; None is nothing given."""
    for name, function in given.items():
        if function is not None and not callable(function):
            raise InputError(f"{name} must be a function, not {function!r}")


def checked_int(value: Any, name: str, least: int = 0) -> int:
    """An option that must be an integer of at least `least`. Raises InputError."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise InputError(f"{name} must be a whole number, not {value!r}")
    if number < least:
        raise InputError(f"{name} must be {least} or more, not {number}")
    return number
