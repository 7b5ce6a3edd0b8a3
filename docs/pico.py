"""A vision-language model and Visual Tokens Withdrawal, whole, on one page: python docs/pico.py IMAGE QUESTION [K]

No class, and nothing of the package: an image, a vision tower, a connector, a decoder with its cache, and before layer K
the two lines that are the method. `minivtw/` does the same properly; tests/test_pico.py holds the two together.
"""

import json
import pathlib
import sys

import numpy as np
from PIL import Image
from safetensors.numpy import load_file
from tokenizers import Tokenizer

FOLDER = pathlib.Path(__file__).parent.parent / "weights" / "minivtw-tiny"
CONFIG = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
TEXT, VISION = CONFIG["text_config"], CONFIG["vision_config"]
WEIGHTS = {name: array.astype(np.float32) for name, array in load_file(FOLDER / "model.safetensors").items()}
EMBEDDING = WEIGHTS["language_model.model.embed_tokens.weight"]  # (vocabulary, width)


def linear(x, name):  # (tokens, in) -> (tokens, out)
    return x @ WEIGHTS[f"{name}.weight"].T + WEIGHTS.get(f"{name}.bias", 0)


def layer_norm(x, name):  # (tokens, width) -> (tokens, width)
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return normed * WEIGHTS[f"{name}.weight"] + WEIGHTS[f"{name}.bias"]


def rms_norm(x, name):  # (tokens, width) -> (tokens, width)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + TEXT["rms_norm_eps"]) * WEIGHTS[f"{name}.weight"]


def gelu(x):  # x Phi(x), with the error function of Abramowitz and Stegun, 7.1.26: right to 1.5e-7
    t = 1 / (1 + 0.3275911 * np.abs(x) / np.sqrt(2))
    powers = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    return x * (1 + np.copysign(1 - powers * np.exp(-x * x / 2), x)) / 2


def split(x, heads):  # (tokens, heads * head_dim) -> (heads, tokens, head_dim)
    return x.reshape(len(x), heads, -1).swapaxes(0, 1)


def attention(q, k, v, mask=0):  # (heads, new, head_dim), twice (kv_heads, tokens, head_dim) -> (new, heads * head_dim)
    k, v = (np.repeat(x, len(q) // len(x), axis=0) for x in (k, v))  # several heads share the keys of one
    scores = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1]) + mask  # (heads, new, tokens)
    exponentials = np.exp(scores - scores.max(-1, keepdims=True))
    context = exponentials / exponentials.sum(-1, keepdims=True) @ v  # (heads, new, head_dim)
    return context.swapaxes(0, 1).reshape(q.shape[1], -1)


def see(image):  # a file -> visual tokens (patches, width of the decoder)
    size, patch, name = VISION["image_size"], VISION["patch_size"], "vision_tower.vision_model."
    pixels = Image.open(image).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    pixels = (np.asarray(pixels, np.float32) / 255 - 0.5) / np.float32(64 / 255)  # (height, width, 3)
    grid = pixels.reshape(size // patch, patch, size // patch, patch, 3).transpose(0, 2, 4, 1, 3)
    kernel = WEIGHTS[f"{name}embeddings.patch_embedding.weight"].reshape(VISION["hidden_size"], -1)
    x = np.concatenate(
        [WEIGHTS[f"{name}embeddings.class_embedding"][None], grid.reshape(-1, kernel.shape[1]) @ kernel.T]
    )
    x = layer_norm(x + WEIGHTS[f"{name}embeddings.position_embedding.weight"], f"{name}pre_layrnorm")
    for index in range(VISION["num_hidden_layers"]):
        layer = f"{name}encoder.layers.{index}."
        h = layer_norm(x, f"{layer}layer_norm1")
        q, k, v = (split(linear(h, f"{layer}self_attn.{part}_proj"), VISION["num_attention_heads"]) for part in "qkv")
        x = x + linear(attention(q, k, v), f"{layer}self_attn.out_proj")
        h = linear(layer_norm(x, f"{layer}layer_norm2"), f"{layer}mlp.fc1")
        x = x + linear(h / (1 + np.exp(-1.702 * h)), f"{layer}mlp.fc2")
    return linear(gelu(linear(x[1:], "multi_modal_projector.linear_1")), "multi_modal_projector.linear_2")


def rotate(x, positions):  # (heads, tokens, head_dim): channel pair i turns by position * theta^(-2i / head_dim)
    half = x.shape[-1] // 2
    angles = positions[:, None] * TEXT["rope_theta"] ** -(np.arange(half, dtype=np.float32) / half)
    partner = np.concatenate([-x[..., half:], x[..., :half]], axis=-1)
    return x * np.tile(np.cos(angles), 2) + partner * np.tile(np.sin(angles), 2)


def decode(x, positions, is_visual, cache, withdraw):  # tokens (tokens, width) -> the last one's logits (vocabulary,)
    for index in range(TEXT["num_hidden_layers"]):
        if index == withdraw:  # Visual Tokens Withdrawal
            x, positions, is_visual = x[~is_visual], positions[~is_visual], is_visual[~is_visual]
        layer = f"language_model.model.layers.{index}."
        h = rms_norm(x, f"{layer}input_layernorm")
        q = rotate(split(linear(h, f"{layer}self_attn.q_proj"), TEXT["num_attention_heads"]), positions)
        k = rotate(split(linear(h, f"{layer}self_attn.k_proj"), TEXT["num_key_value_heads"]), positions)
        v = split(linear(h, f"{layer}self_attn.v_proj"), TEXT["num_key_value_heads"])
        seen, keys, values = cache.get(index, (positions[:0], k[:, :0], v[:, :0]))  # of the tokens before
        seen, k, v = np.append(seen, positions), np.append(keys, k, axis=1), np.append(values, v, axis=1)
        cache[index] = seen, k, v
        mask = np.where(seen > positions[:, None], -np.inf, 0)  # (new, tokens): nobody looks ahead
        x = x + linear(attention(q, k, v, mask), f"{layer}self_attn.o_proj")
        h = rms_norm(x, f"{layer}post_attention_layernorm")
        gate = linear(h, f"{layer}mlp.gate_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(h, f"{layer}mlp.up_proj"), f"{layer}mlp.down_proj")
    return rms_norm(x[-1:], "language_model.model.norm")[0] @ EMBEDDING.T


def answer(
    image, question, withdraw=None, most=64
):  # -> text, token ids, the logits of each, tokens in each layer's cache
    tokenizer, visual = Tokenizer.from_file(str(FOLDER / "tokenizer.json")), see(image)
    ids = np.array(tokenizer.encode(f"USER: {'<image>' * len(visual)}\n{question} ASSISTANT:").ids)
    is_visual, positions, cache, said, logits = ids == CONFIG["image_token_index"], np.arange(len(ids)), {}, [], []
    x = EMBEDDING[ids]
    x[is_visual] = visual
    while len(said) < most and TEXT["eos_token_id"] not in said:
        logits.append(decode(x, positions, is_visual, cache, withdraw))
        said.append(int(logits[-1].argmax()))
        x, positions, is_visual = EMBEDDING[said[-1:]], positions[-1:] + 1, np.array([False])
    return tokenizer.decode(said).strip(), said, np.array(logits), [len(seen) for seen, _, _ in cache.values()]


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    print(answer(*sys.argv[1:3], *map(int, sys.argv[3:4]))[0])
