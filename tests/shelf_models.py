"""Two small random LLaVAs, and questions about random pixels, for recordings of the methods of the shelf. Free of torch."""

import json

import numpy as np

from tests.small_llava import CONFIG, PIXELS, tensor_shapes, write_folder

METHODS = [
    "fastv:layer=2,keep=0.3",
    "pyramiddrop:layers=1/3/4,keep=0.6",
    "sparsevlm:layers=2/4,keep=0.5",
    f"dart:layer=2,keep={21 / 36},pivots=3",
    "divprune:keep=0.4",
    "fastervlm:keep=0.4",
    f"visionzip:keep={16 / 36},merged=0.25",
]
TOWERS = ("clip", "siglip")  # with a class token and without
SEEDS = range(3)
LAYERS, VISUAL, SIDE, IMAGE_TOKEN = 6, 36, 36, 3


def config(tower):
    """36 patches, features out of the second of three layers, a decoder of six layers."""
    text = CONFIG["text_config"] | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS}
    vision = {"image_size": SIDE, "patch_size": 6, "hidden_size": 24, "intermediate_size": 40}
    vision |= {"model_type": f"{tower}_vision_model", "num_hidden_layers": 3, "num_attention_heads": 3}
    if tower == "siglip":
        vision["vision_use_head"] = False
    selected = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default" if tower == "clip" else "full"}
    text |= {"max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 1e4}
    return CONFIG | selected | {"text_config": text, "vision_config": vision, "tie_word_embeddings": True}


def tensors(tower):
    """Weights under which attention is far from uniform, and every norm and every bias matters."""
    random, shapes = np.random.default_rng(7), tensor_shapes(config(tower))
    if tower == "siglip":
        embeddings = "vision_tower.vision_model.embeddings."
        shapes = {name: shape for name, shape in shapes.items() if "pre_layrnorm" not in name and "class" not in name}
        shapes[f"{embeddings}position_embedding.weight"] = (VISUAL, 24)
        shapes[f"{embeddings}patch_embedding.bias"] = (24,)
    return {name: scaled(name, random.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}


def scaled(name, drawn):
    if name.endswith("bias"):
        return 0.3 * drawn
    if "norm" in name:
        return 1 + 0.25 * drawn
    if "embed_tokens" in name:
        return 0.3 * drawn
    if drawn.ndim == 1 or "position_embedding" in name:
        return drawn
    return (1.6 if "q_proj" in name or "k_proj" in name else 1.2) * drawn * (len(drawn) / drawn.size) ** 0.5


def write(tower, folder):
    """A model folder. Returns it."""
    write_folder(folder, tensors(tower), config(tower))
    pixels = PIXELS | {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels), encoding="utf-8")
    return folder


def question(seed):
    """(token ids (tokens,), the image's among them; pixels (1, 3, side, side) float32)"""
    random = np.random.default_rng(seed)
    before, after = random.integers(4, 300, 5), random.integers(4, 300, 9)
    token_ids = np.concatenate([[0], before, np.full(VISUAL, IMAGE_TOKEN), after])
    coarse = random.standard_normal((1, 3, 6, 6)).repeat(6, 2).repeat(6, 3)
    return token_ids, (coarse + 0.5 * random.standard_normal((1, 3, SIDE, SIDE))).astype(np.float32)
