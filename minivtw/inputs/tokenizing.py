"""What the tokenizers library raises, as the one error: it has no class of its own for it, and where it panics, not even
an Exception."""

import contextlib
from collections.abc import Iterator

from ..errors import InputError


@contextlib.contextmanager
def tokenizing(what: str) -> Iterator[None]:
    """Whatever the tokenizers library raises in this block becomes one InputError that begins with `what`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # plain Exception, and TypeError for what is not UTF-8
        raise InputError(f"{what}: {error}") from error
    except BaseException as error:  # Rust's panic, which nothing but its name tells from Ctrl-C
        if type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{what}: {error}") from error
