"""What `minivtw.calibrate` stores with a model: withdrawal.json, with the method that `auto` stands for."""

import pathlib

from ..inputs.files import sha256_of_all
from .checkpoint import shard_paths
from .files import file_of, read_fields
from .hub import JSON, TEMPLATE

STORED = "withdrawal.json"


def stored_method(folder: pathlib.Path) -> str | None:
    """The text of the method stored with a model; None where nothing is stored. Raises InputError for a broken file."""
    if not file_of(folder, STORED):
        return None
    fields = read_fields(folder, STORED)
    if fields.has("method"):
        return fields.text("method")
    return f"withdraw:layer={fields.integer('withdraw_layer')}"


def fingerprint(folder: pathlib.Path) -> str:
    """SHA-256 of what a model's answers come from: its weights, and all settings beside them but what is stored here."""
    names = {path.name for pattern in (JSON, TEMPLATE) for path in folder.glob(pattern)} - {STORED}
    settings = [path for name in sorted(names) if (path := file_of(folder, name))]
    return sha256_of_all([*shard_paths(folder), *settings])
