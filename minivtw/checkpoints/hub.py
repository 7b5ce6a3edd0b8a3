"""Resolve a model argument: a local folder, a model made by `minivtw.fetch`, or a name on the hub.

Only safetensors, JSON and a chat template are ever requested, and nothing that is read is run.
"""

import os
import pathlib
import re
from typing import Any

from ..errors import InputError
from .files import file_of, read_text

EMBEDDED = "minivtw-tiny"
NAME = re.compile(r"[\w.-]+/[\w.-]+")  # such as HuggingFaceTB/SmolVLM-256M-Instruct
WEIGHTS, JSON, TEMPLATE = "*.safetensors", "*.json", "chat_template.jinja"
# What `python -m minivtw.fetch` makes, and its folder in minivtw's own cache.
FETCHED = {"smol": "minivtw-smol", "smollm2": "smollm2-135m-instruct"}


def shipped_folder(name: str) -> pathlib.Path:
    """A folder of weights/: inside the installed package, or beside it in a checkout."""
    package = pathlib.Path(__file__).parent.parent
    installed = package / "weights" / name
    return installed if installed.is_dir() else package.parent / "weights" / name


def embedded_folder() -> pathlib.Path:
    """The model that comes with the package."""
    return shipped_folder(EMBEDDED)


def is_name(model: Any) -> bool:
    """Whether `model` is a name, and not a folder. Raises InputError for what is neither."""
    if not isinstance(model, str | os.PathLike) or model == "":
        raise InputError(f"a model is a folder or a name, not {model!r}")
    return not pathlib.Path(model).is_dir()


def model_folder(model: str | os.PathLike) -> pathlib.Path:
    """The folder of a model's files, downloaded first if `model` is a name on the hub. Raises InputError."""
    if not is_name(model):
        folder = pathlib.Path(model)
        return snapshot(folder) if (folder / "snapshots").is_dir() else folder
    if str(model) in FETCHED:
        folder = own_cache() / FETCHED[str(model)]
        if not folder.is_dir():
            raise InputError(f"{model} is not fetched yet: python -m minivtw.fetch {model}")
        return folder
    if not NAME.fullmatch(str(model)):
        raise InputError(f"there is no model folder {model}")
    return fetched(str(model), [WEIGHTS, JSON, TEMPLATE])


def tokenizer_folder(folder: pathlib.Path, name: str | None, downloads: bool) -> pathlib.Path:
    """The folder of a model's tokenizer: its own or, where it has none, that of the model `name` on the hub.

    downloads: whether it may come from the hub. It is the model's files that say the name.
    """
    if name is None or file_of(folder, "tokenizer.json"):
        return folder
    try:
        return fetched(name, [JSON], downloads)
    except InputError as error:
        raise InputError(f"{folder} has no tokenizer.json, and {name}'s cannot be fetched: {error}") from error


def model_name(folder: pathlib.Path) -> str:
    """What a model is called: its folder or, in the Hugging Face cache, its name on the hub."""
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    return folder.name


def own_cache() -> pathlib.Path:
    """Where minivtw keeps what it makes: $MINIVTW_CACHE, else $XDG_CACHE_HOME/minivtw, else ~/.cache/minivtw."""
    user_cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    path = pathlib.Path(os.environ.get("MINIVTW_CACHE") or pathlib.Path(user_cache, "minivtw"))
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise InputError(f"{path} cannot be found: there is no such home folder; set MINIVTW_CACHE") from error


def snapshot(folder: pathlib.Path) -> pathlib.Path:
    """The files of a cached model, models--OWNER--NAME: the revision that its branch `main` is at, or the only one."""
    main = read_text(folder, "refs/main")
    revisions = [path for path in (folder / "snapshots").iterdir() if path.is_dir()]
    found = [path for path in revisions if main is None or path.name == main.strip()]
    if len(found) != 1:
        raise InputError(f"{folder} holds {len(revisions)} revisions, refs/main names none; choose a folder below it")
    return found[0]


def fetched(name: str, patterns: list[str], downloads: bool = True) -> pathlib.Path:
    """The folder of a model on the hub in the Hugging Face cache; what it lacks is downloaded first, or refused."""
    from huggingface_hub import snapshot_download  # the tokenizers library needs it, so it is there; and it is slow

    try:
        return pathlib.Path(snapshot_download(name, allow_patterns=patterns, local_files_only=not downloads))
    except Exception as error:  # no network, no such model, no right to it, offline: each has its own class
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        failed = f"cannot download {name}: {reason}; or bring its files and pass their folder"
        refused = "it is not in the Hugging Face cache, and no folder makes us download; bring it"
        raise InputError(failed if downloads else refused) from error
