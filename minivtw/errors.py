"""The one error that a user is meant to see."""

import contextlib
from collections.abc import Iterator


class InputError(ValueError):
    """Something the caller gave cannot be used; the message is one complete sentence for them, in one line."""

    def __init__(self, message: object) -> None:
        super().__init__(" ".join(str(message).splitlines()))


@contextlib.contextmanager
def reading(what: object) -> Iterator[None]:
    """What the system refuses in this block, in any file of it, becomes one InputError; the cause is chained."""
    try:
        yield
    except OSError as error:
        where = "" if error.filename in (None, str(what)) else f" ({error.filename})"
        raise InputError(f"cannot read {what}: {error.strerror or error}{where}") from error
