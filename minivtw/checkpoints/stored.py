"""What `minivtw.calibrate` stores with a model: withdrawal.json, with the method that `auto` stands for."""

import json
import pathlib
from typing import Any

from ..errors import InputError
from ..inputs.files import sha256_of_all
from ..inputs.writing import check_writable, replace_file
from ..methods.shelf import method_of
from ..methods.text import Method, NamedMethod, check
from ..methods.withdrawal import withdraw as withdraw_before
from .checkpoint import shard_paths
from .files import file_of, read_fields
from .hub import JSON, TEMPLATE

STORED = "withdrawal.json"


def check_storable(folder: pathlib.Path) -> None:
    """Raise InputError where nothing can be stored with a model, or would not be read there: before the work."""
    check_writable(folder / STORED)
    file_of(folder, STORED)  # refuses a link out of the folder


def store(folder: pathlib.Path, found: dict[str, Any]) -> None:
    """Write what a calibration found into the model's folder. Raises InputError."""
    replace_file(folder / STORED, json.dumps(found, indent=1) + "\n")


def stored_method(folder: pathlib.Path) -> str | None:
    """The text of the method stored with a model; None where nothing is stored. Raises InputError for a broken file."""
    if not file_of(folder, STORED):
        return None
    fields = read_fields(folder, STORED)
    if fields.has("method"):
        return fields.text("method")
    return f"withdraw:layer={fields.integer('withdraw_layer')}"


def resolve_method(
    folder: pathlib.Path, layers: int, withdraw: str | int | None, method: Method | str | None
) -> NamedMethod | None:
    """What the arguments `withdraw` and `method` of `VLM.answer` mean for a model with so many layers, checked.

    "auto" is what is stored with the model, half the depth until something is; None: every token goes through every
    layer. Raises InputError.
    """
    if method is not None:
        if withdraw not in ("auto", "off", None):
            raise InputError("withdraw and method both say which tokens go on; give one of them")
        return check(method_of(method) if isinstance(method, str) else method, layers)
    if withdraw in (None, "off"):
        return None
    text = stored_method(folder) if withdraw == "auto" else None
    if text is None:
        return check(withdraw_before(layers // 2 if withdraw == "auto" else withdraw), layers)
    try:
        return check(method_of(text, files=False), layers)
    except InputError as error:
        raise InputError(f"{folder}/{STORED}: {error}") from error


def fingerprint(folder: pathlib.Path) -> str:
    """SHA-256 of what a model's answers come from: its weights, and all settings beside them but what is stored here."""
    names = {path.name for pattern in (JSON, TEMPLATE) for path in folder.glob(pattern)} - {STORED}
    settings = [path for name in sorted(names) if (path := file_of(folder, name))]
    return sha256_of_all([*shard_paths(folder), *settings])
