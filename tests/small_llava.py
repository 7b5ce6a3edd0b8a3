"""A small random LLaVA folder, written without torch: for tests of files and doors, where the numbers do not matter."""

import json
import pathlib

import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

SPECIALS = ("<s>", "</s>", "<pad>", "<image>")
CONFIG = {
    "model_type": "llava",
    "image_token_index": 3,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
    "text_config": {
        "model_type": "llama",
        "vocab_size": 300,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    },
    "vision_config": {
        "model_type": "clip_vision_model",
        "image_size": 12,
        "patch_size": 4,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
}
PIXELS = {
    "size": {"shortest_edge": 12},
    "crop_size": {"height": 12, "width": 12},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def tensor_shapes(config=CONFIG):
    """Every tensor of the folder by name, with its stored shape."""
    text, vision = config["text_config"], config["vision_config"]
    width, inner = text["hidden_size"], text["intermediate_size"]
    key_value = width // text["num_attention_heads"] * text["num_key_value_heads"]
    shapes = {
        "language_model.model.embed_tokens.weight": (text["vocab_size"], width),
        "language_model.model.norm.weight": (width,),
    }
    for index in range(text["num_hidden_layers"]):
        layer = f"language_model.model.layers.{index}."
        shapes |= {f"{layer}self_attn.{name}_proj.weight": (width, width) for name in "qo"}
        shapes |= {f"{layer}self_attn.{name}_proj.weight": (key_value, width) for name in "kv"}
        shapes |= {f"{layer}mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        shapes |= {f"{layer}mlp.down_proj.weight": (width, inner)}
        shapes |= {f"{layer}{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    tower, wide, patch = "vision_tower.vision_model.", vision["hidden_size"], vision["patch_size"]
    patches = (vision["image_size"] // patch) ** 2
    shapes |= {
        f"{tower}embeddings.class_embedding": (wide,),
        f"{tower}embeddings.patch_embedding.weight": (wide, 3, patch, patch),
        f"{tower}embeddings.position_embedding.weight": (patches + 1, wide),
    }
    norms = [f"{tower}pre_layrnorm", f"{tower}post_layernorm"]
    linears = {}
    for index in range(vision["num_hidden_layers"]):
        layer = f"{tower}encoder.layers.{index}."
        norms += [f"{layer}layer_norm1", f"{layer}layer_norm2"]
        linears |= {f"{layer}self_attn.{name}": (wide, wide) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
        linears |= {
            f"{layer}mlp.fc1": (vision["intermediate_size"], wide),
            f"{layer}mlp.fc2": (wide, vision["intermediate_size"]),
        }
    linears |= {"multi_modal_projector.linear_1": (width, wide), "multi_modal_projector.linear_2": (width, width)}
    for name in norms:
        shapes |= {f"{name}.weight": (wide,), f"{name}.bias": (wide,)}
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def random_tensors(seed=0):
    random = np.random.default_rng(seed)
    return {name: (random.standard_normal(shape) * 0.4).astype(np.float32) for name, shape in tensor_shapes().items()}


def byte_tokenizer():
    """One token a byte, after the specials."""
    vocabulary = {token: index for index, token in enumerate([*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def save_tokenizer(tokenizer, folder):
    """As `tokenizer.save`, which knows no path that is not UTF-8."""
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")


def write_folder(folder, tensors=None, config=CONFIG):
    """A whole model folder that minivtw loads."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(random_tensors() if tensors is None else tensors, folder / "model.safetensors")
    for name, content in (
        ("config", config),
        ("preprocessor_config", PIXELS),
        ("generation_config", {"eos_token_id": 1}),
    ):
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    save_tokenizer(byte_tokenizer(), folder)
    return folder


def write_onevision(folder, tiles=((1, 2, 3), (1, 2, 3))):
    """A small LLaVA-OneVision: a golden LLaVA with what ends a line; tiles of 3 x 3 patches, in these rows and columns."""
    golden, side = pathlib.Path(__file__).parent / "golden" / "llava" / "siglip-llama", 24
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_bytes((golden / "tokenizer.json").read_bytes())
    tensors = {"image_newline": np.ones(32, np.float32)}
    for path in golden.glob("model*.safetensors"):
        tensors |= load_file(path)
    save_file(tensors, folder / "model.safetensors")
    pinpoints = [[side * rows, side * columns] for rows in tiles[0] for columns in tiles[1]]
    changes = {"model_type": "llava_onevision", "vision_feature_layer": -1, "image_grid_pinpoints": pinpoints}
    for name, more in (("config", changes), ("preprocessor_config", {"image_grid_pinpoints": pinpoints})):
        content = json.loads((golden / f"{name}.json").read_text(encoding="utf-8")) | more
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder
