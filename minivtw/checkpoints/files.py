"""The files of a model folder: ordinary ones, that lie in it."""

import json
import os
import pathlib

from ..errors import InputError, reading
from ..inputs.files import text_of
from .fields import Fields


def file_of(folder: str | os.PathLike, name: str) -> pathlib.Path | None:
    """The path of a file of a model folder, None where there is none. What is no ordinary file, and a link that leads out
    of the folder, raise InputError; only the snapshots of a hub cache link to the `blobs` beside them.
    """
    path, home = pathlib.Path(folder, name), pathlib.Path(os.path.realpath(folder))
    with reading(path):
        try:
            os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
    target, blobs = pathlib.Path(os.path.realpath(path)), os.path.realpath(home.parent.parent / "blobs")
    if not target.is_relative_to(home) and not (home.parent.name == "snapshots" and target.is_relative_to(blobs)):
        raise InputError(f"{path} is a link out of the model folder, to {target}; only what lies in the folder is read")
    if not target.is_file():
        raise InputError(f"{path} is not a file" if target.exists() else f"{path} is a link to nothing")
    return path


def read_text(folder: str | os.PathLike, name: str) -> str | None:
    """The text of a file of a model folder, None where there is none. Raises InputError."""
    path = file_of(folder, name)
    return None if path is None else text_of(path)


def read_fields(folder: str | os.PathLike, name: str, optional: bool = False) -> Fields:
    """The object in a folder's JSON file; optional: an empty one where there is no such file. Raises InputError."""
    path, text = pathlib.Path(folder, name), read_text(folder, name)
    if text is None and not optional:
        raise InputError(f"{folder} lacks {name}")
    try:
        content = {} if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object")
    return Fields(content, str(path))
