"""nanoVLM in PyTorch, written from its published layout: random models in its files' form, and what they compute.

No package carries it. `Reference` has what `reference.Reference` has, so that both are recorded alike.
"""

import json
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from tests.reference import write_json

from .conversation import conversation_messages
from .reference import byte_tokenizer

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLACES = {f"r{row}c{column}": f"<row_{row}_col_{column}>" for row in range(1, 9) for column in range(1, 9)}
EXTRA = {"image_token": "<|image|>", "global_image_token": "<|global_image|>", **PLACES}


class Variant(NamedTuple):
    """One random nanoVLM: what differs from the small config below, and how the shared tensor is called in its file."""

    name: str
    changes: dict
    shared: str
    seed: int


def config(**changes):
    """A small config with the keys of the published ones."""
    sizes = dict(
        vit_hidden_dim=24, vit_inter_dim=40, vit_patch_size=8, vit_img_size=32, vit_n_heads=3, vit_dropout=0.0, vit_n_blocks=2,
        vit_ln_eps=1e-6, vit_cls_flag=False, lm_hidden_dim=32, lm_inter_dim=48, lm_rms_eps=1e-5, lm_re_base=100000,
        lm_max_position_embeddings=1024, lm_n_heads=4, lm_n_kv_heads=2, lm_dropout=0.0, lm_n_blocks=4, lm_attn_scaling=1.0,
        lm_use_tokens=False, lm_tie_weights=True, lm_tokenizer="HuggingFaceTB/cosmo2-tokenizer", mp_pixel_shuffle_factor=2,
    )  # fmt: skip
    return {**sizes, **changes}


LATER = dict(vlm_extra_tokens=EXTRA, max_img_size=96, lm_chat_template=CHATML, mp_image_token_length=4)
# Between the two: an image token, but no tiles. It was asked in plain words for its first week, then in ChatML.
SINGLE = dict(
    vlm_extra_tokens={"image_token": "<|image|>"}, mp_image_token_length=4, lm_eos_token_id=0, lm_max_length=512
)
FIRST = Variant("nanovlm-first", {}, "decoder.head.weight", 27)
PLAIN = Variant("nanovlm-plain", SINGLE, "decoder.head.weight", 28)
RECORDED = (
    FIRST,
    Variant("nanovlm-single", {**SINGLE, "lm_chat_template": CHATML}, "decoder.token_embedding.weight", 24),
    Variant("nanovlm-later", LATER, "decoder.token_embedding.weight", 22),
    Variant("nanovlm-filled", {**LATER, "resize_to_max_side_len": True, "lm_tie_weights": False}, None, 26),
)


def tensor_shapes(config, vocabulary):
    """Every tensor of the published files by name, with its shape."""
    wide, patch, text = config["vit_hidden_dim"], config["vit_patch_size"], config["lm_hidden_dim"]
    key_value = text // config["lm_n_heads"] * config["lm_n_kv_heads"]
    shapes = {
        "MP.proj.weight": (text, wide * config["mp_pixel_shuffle_factor"] ** 2),
        "vision_encoder.patch_embedding.conv.weight": (wide, 3, patch, patch),
        "vision_encoder.patch_embedding.conv.bias": (wide,),
        "vision_encoder.patch_embedding.position_embedding": (1, (config["vit_img_size"] // patch) ** 2, wide),
        "vision_encoder.layer_norm.weight": (wide,),
        "vision_encoder.layer_norm.bias": (wide,),
        "decoder.token_embedding.weight": (vocabulary, text),
        "decoder.head.weight": (vocabulary, text),
        "decoder.norm.weight": (text,),
        "decoder.rotary_embd.inv_freq": (text // config["lm_n_heads"] // 2,),
    }
    for index in range(config["vit_n_blocks"]):
        block = f"vision_encoder.blocks.{index}."
        linears = {"attn.qkv_proj": (3 * wide, wide), "attn.out_proj": (wide, wide)}
        linears |= {"mlp.fc1": (config["vit_inter_dim"], wide), "mlp.fc2": (wide, config["vit_inter_dim"])}
        for name, shape in linears.items():
            shapes |= {f"{block}{name}.weight": shape, f"{block}{name}.bias": shape[:1]}
        for name in ("ln1", "ln2"):
            shapes |= {f"{block}{name}.weight": (wide,), f"{block}{name}.bias": (wide,)}
    for index in range(config["lm_n_blocks"]):
        block, inner = f"decoder.blocks.{index}.", config["lm_inter_dim"]
        shapes |= {f"{block}attn.{name}_proj.weight": (text, text) for name in ("q", "out")}
        shapes |= {f"{block}attn.{name}_proj.weight": (key_value, text) for name in "kv"}
        shapes |= {f"{block}mlp.{name}_proj.weight": (inner, text) for name in ("gate", "up")}
        shapes |= {
            f"{block}mlp.down_proj.weight": (text, inner),
            f"{block}norm1.weight": (text,),
            f"{block}norm2.weight": (text,),
        }
    return shapes


def random_tensors(shapes, seed):
    """Weights under which attention is far from uniform, and every norm and every bias matters."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes.items():
        tensor = torch.randn(shape, generator=generator)
        if name.endswith("bias") or "embedding.weight" in name:
            tensor *= 0.3
        elif "norm" in name or ".ln" in name:
            tensor = 1 + 0.25 * tensor
        elif "position" not in name:
            tensor *= 1.4 * (shape[0] / tensor.numel()) ** 0.5  # 1 / sqrt(inputs)
        tensors[name] = tensor
    return tensors


def build(variant, folder):
    """Write a variant's folder: config and weights in the published form, and beside them the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    extra = variant.changes.get("vlm_extra_tokens", {})
    settings = config(**{"lm_vocab_size": tokenizer.get_vocab_size() + len(extra), **variant.changes})
    tensors = random_tensors(tensor_shapes(settings, settings["lm_vocab_size"]), variant.seed)
    if variant.shared:  # tied: the file holds the tensor once
        tensors[variant.shared] = tensors.pop("decoder.head.weight") * 0.3
        tensors.pop(
            "decoder.token_embedding.weight" if variant.shared == "decoder.head.weight" else "decoder.head.weight", None
        )
    write_json(folder / "config.json", settings)
    save_file(tensors, folder / "model.safetensors")


class Reference:
    """A nanoVLM folder computed in plain PyTorch."""

    def __init__(self, folder):
        self.config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.tensors = load_file(folder / "model.safetensors")
        self.extra = self.config.get("vlm_extra_tokens", {})
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json"),
            **({"extra_special_tokens": self.extra} if self.extra else {}),
        )
        image_token = self.extra.get("image_token")
        # The first layout has no token for an image: its features go before the text. Here a number stands for each one.
        self.image_token_id = self.tokenizer.convert_tokens_to_ids(image_token) if image_token else len(self.tokenizer)
        self.end_token_id = self.tokenizer.convert_tokens_to_ids(
            "<|im_end|>" if "lm_chat_template" in self.config else "<|endoftext|>"
        )
        embedding, head = "decoder.token_embedding.weight", "decoder.head.weight"
        self.embedding = self.tensors.get(embedding, self.tensors.get(head))
        self.head = self.tensors.get(head, self.embedding)

    def inputs(self, images, *turns):
        """What the published processors make of Pillow images and a conversation: (token_ids, tiles)."""
        side = self.config["vit_img_size"]
        tokens = (side // self.config["vit_patch_size"] // self.config["mp_pixel_shuffle_factor"]) ** 2
        if "max_img_size" not in self.config:
            squeeze = lambda image: to_tensor(image.resize((side, side), Image.Resampling.BILINEAR))
            seen = [(squeeze(image)[None], None) for image in images]
            image_string = self.extra.get("image_token", "") * tokens * len(images)
        else:
            seen = [self.split(image) for image in images]
            image_string = self.image_string([grid for _, grid in seen], tokens)
        if "lm_chat_template" not in self.config:
            text = self.tokenizer(f"{image_string}Question: {turns[0]} Answer:")["input_ids"]
            before = [] if self.extra else [self.image_token_id] * tokens * len(images)
            return np.array(before + text), torch.cat([tiles for tiles, _ in seen])
        messages = conversation_messages(0, turns)
        for message in messages:
            message["content"] = message["content"][-1]["text"]
        messages[0]["content"] = image_string + messages[0]["content"]
        text = self.tokenizer.apply_chat_template(
            messages, chat_template=self.config["lm_chat_template"], tokenize=False, add_generation_prompt=True
        )
        return np.array(self.tokenizer(text)["input_ids"]), torch.cat([tiles for tiles, _ in seen])

    def split(self, image):
        """(tiles, (rows, columns)): bicubic to whole tiles; the view of it all, bilinear, before several."""
        side, most = self.config["vit_img_size"], self.config["max_img_size"]
        longer, shorter = max(image.size), min(image.size)
        target = most if self.config.get("resize_to_max_side_len") else min(most, math.ceil(longer / side) * side)
        other = max(math.ceil(shorter * (target / longer) / side) * side, side)
        size = (target, other) if image.width >= image.height else (other, target)  # (width, height)
        pixels = to_tensor(image.resize(size, Image.Resampling.BICUBIC))
        tiles = [piece for row in pixels.split(side, 1) for piece in row.split(side, 2)]
        if len(tiles) > 1:
            view = F.interpolate(pixels[None], (side, side), mode="bilinear", antialias=True, align_corners=False)[0]
            tiles.insert(0, view)
        return torch.stack(tiles), (size[1] // side, size[0] // side)

    def image_string(self, grids, tokens):
        text, visual = "", self.extra["image_token"] * tokens
        for index, (rows, columns) in enumerate(grids):
            text += f"<image: {index}>" if len(grids) > 1 else ""
            text += self.extra["global_image_token"] + visual
            if rows * columns > 1:
                for row in range(1, rows + 1):
                    text += "".join(self.extra[f"r{row}c{column}"] + visual for column in range(1, columns + 1))
        return text

    def see(self, tiles, arrays):
        """Tiles to visual tokens (tokens, width); every array between is put into `arrays`."""
        config, get = self.config, lambda name: self.tensors[f"vision_encoder.{name}"]
        width, heads, eps = config["vit_hidden_dim"], config["vit_n_heads"], config["vit_ln_eps"]
        norm = lambda x, name: F.layer_norm(x, (width,), get(f"{name}.weight"), get(f"{name}.bias"), eps)
        linear = lambda x, name: F.linear(x, get(f"{name}.weight"), get(f"{name}.bias"))
        conv = F.conv2d(
            tiles, get("patch_embedding.conv.weight"), get("patch_embedding.conv.bias"), stride=config["vit_patch_size"]
        )
        hidden = conv.flatten(2).transpose(1, 2) + get("patch_embedding.position_embedding")
        arrays["vision.embeddings"] = hidden
        for index in range(config["vit_n_blocks"]):
            name = f"blocks.{index}"
            qkv = linear(norm(hidden, f"{name}.ln1"), f"{name}.attn.qkv_proj")
            q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in qkv.split(width, 2))
            attention = (q @ k.transpose(2, 3) / math.sqrt(width // heads)).softmax(-1)
            hidden = hidden + linear((attention @ v).transpose(1, 2).flatten(2), f"{name}.attn.out_proj")
            inner = F.gelu(linear(norm(hidden, f"{name}.ln2"), f"{name}.mlp.fc1"), approximate="tanh")
            hidden = hidden + linear(inner, f"{name}.mlp.fc2")
            arrays |= {f"vision.layers.{index}.attention": attention, f"vision.layers.{index}.hidden": hidden}
        features = norm(hidden, "layer_norm")
        # Pixel shuffle: neighbouring patches of a row side by side, then those of neighbouring rows.
        count, patches, factor = len(features), features.shape[1], config["mp_pixel_shuffle_factor"]
        side = math.isqrt(patches)
        shuffled = features.view(count, side, side // factor, width * factor).permute(0, 2, 1, 3)
        shuffled = shuffled.reshape(count, side // factor, side // factor, width * factor**2).permute(0, 2, 1, 3)
        visual = F.linear(shuffled.reshape(count, -1, width * factor**2), self.tensors["MP.proj.weight"]).flatten(0, 1)
        arrays |= {"vision.features": features, "connector.output": visual}
        return visual

    def decode(self, hidden, stays, withdraw_layer, arrays, last=1):
        """The last tokens' logits (last, vocabulary) when those that do not stay leave before a layer."""
        config, get = self.config, lambda name: self.tensors[f"decoder.{name}.weight"]
        heads, kv_heads = config["lm_n_heads"], config["lm_n_kv_heads"]
        head_dim = config["lm_hidden_dim"] // heads
        norm = lambda x, name: x * torch.rsqrt((x**2).mean(-1, keepdim=True) + config["lm_rms_eps"]) * get(name)
        frequencies = 1.0 / config["lm_re_base"] ** (torch.arange(0, head_dim, 2).float() / head_dim)
        positions = torch.arange(len(hidden))
        for index in range(config["lm_n_blocks"]):
            if index == withdraw_layer:
                hidden, positions = hidden[stays], positions[stays]
            name, count = f"blocks.{index}", len(hidden)
            angles = torch.cat([positions[:, None] * frequencies] * 2, -1)  # (tokens, head_dim)
            turn = lambda x: (
                x * angles.cos() + torch.cat([-x[..., head_dim // 2 :], x[..., : head_dim // 2]], -1) * angles.sin()
            )
            normed = norm(hidden, f"{name}.norm1")
            q, k, v = (
                F.linear(normed, get(f"{name}.attn.{letter}_proj")).unflatten(1, (-1, head_dim)).transpose(0, 1)
                for letter in "qkv"
            )
            k, v = (part.repeat_interleave(heads // kv_heads, 0) for part in (turn(k), v))
            scores = turn(q) @ k.transpose(1, 2) / math.sqrt(head_dim) + torch.full((count, count), -torch.inf).triu(1)
            attention = scores.softmax(-1)
            hidden = hidden + F.linear((attention @ v).transpose(0, 1).flatten(1), get(f"{name}.attn.out_proj"))
            normed = norm(hidden, f"{name}.norm2")
            inner = F.silu(F.linear(normed, get(f"{name}.mlp.gate_proj"))) * F.linear(
                normed, get(f"{name}.mlp.up_proj")
            )
            hidden = hidden + F.linear(inner, get(f"{name}.mlp.down_proj"))
            arrays |= {f"decoder.layers.{index}.attention": attention, f"decoder.layers.{index}.hidden": hidden}
        logits = F.linear(norm(hidden[-last:], "norm"), self.head)
        arrays["decoder.logits"] = logits[-1]
        return logits.numpy()

    @torch.no_grad()
    def prefill(self, token_ids, tiles):
        """Every array between the pixels and the last token's logits."""
        arrays = {"vision.pixels": tiles, "decoder.embeddings": self.embeddings(token_ids, tiles)}
        self.see(tiles, arrays)
        self.decode(arrays["decoder.embeddings"], None, None, arrays)
        return {name: array.numpy() for name, array in arrays.items()}

    @torch.no_grad()
    def embeddings(self, token_ids, tiles):
        """The decoder's input, (tokens, width)."""
        is_visual = torch.tensor(token_ids == self.image_token_id)
        hidden = self.embedding[torch.tensor(token_ids).masked_fill(is_visual, 0)]
        hidden[is_visual] = self.see(tiles, {})
        return hidden

    @torch.no_grad()
    def last_logits(self, hidden, stays, withdraw_layer, last=1):
        return self.decode(hidden, stays, withdraw_layer, {}, last)

    def embed(self, token_ids):
        return self.embedding[torch.tensor(token_ids)]

    def levels(self, tiles):
        """Pixel values from 0 to 1 in 65,535 steps; the view of it all is no picture of 256 levels."""
        return np.round(np.asarray(tiles) * 65535).astype(np.uint16)


def to_tensor(image):
    """A Pillow RGB image to (3, height, width), from 0 to 1."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255
