"""Text files from strangers: ordinary ones, no longer than they need to be, in UTF-8. And what files are told apart by."""

import hashlib
import os
import pathlib
from collections.abc import Iterable

from ..errors import InputError, reading

MOST_BYTES = 100_000_000  # of a text file; the largest published tokenizer.json takes about a third


def text_of(path: str | os.PathLike) -> str:
    """The text of a file. Raises InputError for one that is missing, is not ordinary (a pipe may never end), or is too
    long, and for other text than UTF-8.
    """
    path = pathlib.Path(path)
    with reading(path):
        size = path.stat().st_size
        if not path.is_file():
            raise InputError(f"{path} is not a file")
        if size > MOST_BYTES:
            raise InputError(f"{path} is {size / 1e6:,.0f} MB long; at most {MOST_BYTES / 1e6:.0f} are read")
        return path.read_text(encoding="utf-8")


def sha256_of(path: str | os.PathLike) -> str:
    """SHA-256 of a file, in hexadecimal. Raises InputError."""
    with reading(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_all(paths: Iterable[str | os.PathLike]) -> str:
    """One digest of several files. Raises InputError."""
    return hashlib.sha256("".join(map(sha256_of, paths)).encode()).hexdigest()
