"""The same model in transformers, on the same weights in memory, to measure beside ours. Needs torch and transformers."""

import time
import warnings
from typing import Any

import numpy as np
import torch
import transformers

from ..model.decoder import Decoder
from ..model.vision import Vision
from ..vlm import VLM

warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nobody writes into the weights


def with_weights(model: Any, weights: dict[str, torch.Tensor]) -> Any:
    """The model with these tensors for its parameters; `weights`: by name, without what all names begin with."""
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in model.state_dict()) else ""
    model.load_state_dict({prefix + name: tensor for name, tensor in weights.items()}, assign=True)
    model.set_attn_implementation("sdpa")
    return model.eval()


def tower(vision: Vision) -> Any:
    """A CLIP or SigLIP model that computes what `model.vision.encode` does, up to the features' last norm."""
    config = vision.config
    sizes = dict(
        hidden_size=config.width, intermediate_size=config.mlp_width, num_hidden_layers=config.used_layers,
        num_attention_heads=config.heads, image_size=config.image_size, patch_size=config.patch_size,
        hidden_act=config.activation, layer_norm_eps=config.layer_norm_eps,
    )  # fmt: skip
    patch = vision.patch_embedding.weight.T.reshape(config.width, 3, config.patch_size, config.patch_size)
    weights = {"embeddings.patch_embedding.weight": torch.from_numpy(patch)}
    weights |= linear_or_norm("post_layernorm", vision.post_norm)
    weights["embeddings.position_embedding.weight"] = torch.from_numpy(vision.position_embedding)
    if config.class_token:
        model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes))
        weights["embeddings.class_embedding"] = torch.from_numpy(vision.class_embedding)
        weights |= linear_or_norm("pre_layrnorm", vision.pre_norm)
    else:
        model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**sizes, vision_use_head=False))
        weights["embeddings.patch_embedding.bias"] = torch.from_numpy(vision.patch_embedding.bias)
    for index in range(config.used_layers):
        name, layer = f"encoder.layers.{index}.", vision.layers[index]
        weights |= linear_or_norm(f"{name}layer_norm1", layer.attention_norm)
        weights |= linear_or_norm(f"{name}layer_norm2", layer.mlp_norm)
        weights |= linear_or_norm(f"{name}self_attn.out_proj", layer.output)
        weights |= linear_or_norm(f"{name}mlp.fc1", layer.up) | linear_or_norm(f"{name}mlp.fc2", layer.down)
        for part, letter in enumerate("qkv"):
            rows = slice(part * config.width, (part + 1) * config.width)
            weights |= linear_or_norm(f"{name}self_attn.{letter}_proj", layer.qkv.columns(rows.start, rows.stop))
    return with_weights(model, weights)


def linear_or_norm(name: str, parameters: Any) -> dict[str, torch.Tensor]:
    """A `Linear` or `LayerNorm` by transformers' names. A linear map's weight is (out, in) there."""
    named = {f"{name}.weight": torch.from_numpy(parameters.weight.T)}  # of a norm's one axis, T changes nothing
    return named if parameters.bias is None else named | {f"{name}.bias": torch.from_numpy(parameters.bias)}


def language_model(decoder: Decoder) -> Any:
    """A Llama or Qwen2 model on a decoder's weights."""
    config = decoder.config
    sizes = dict(
        vocab_size=config.vocabulary, hidden_size=config.width, num_hidden_layers=config.layers,
        num_attention_heads=config.heads, num_key_value_heads=config.kv_heads, head_dim=config.head_dim,
        intermediate_size=config.mlp_width, rms_norm_eps=config.rms_norm_eps, rope_theta=config.rope_theta,
        max_position_embeddings=config.max_positions, tie_word_embeddings=decoder.head is None,
    )  # fmt: skip
    if config.qkv_bias:
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    head = decoder.embedding if decoder.head is None else decoder.head.T
    arrays = {"model.embed_tokens.weight": decoder.embedding, "lm_head.weight": head, "model.norm.weight": decoder.norm}
    query, key_value = config.heads * config.head_dim, config.kv_heads * config.head_dim
    ends = {"q": (0, query), "k": (query, query + key_value), "v": (query + key_value, query + 2 * key_value)}
    weights = {name: torch.from_numpy(array) for name, array in arrays.items()}
    for index in range(config.layers):
        name, layer = f"model.layers.{index}.", decoder.layers[index]
        arrays = {
            "input_layernorm": layer.input_norm, "post_attention_layernorm": layer.mlp_norm,
            "self_attn.o_proj": layer.output.T, "mlp.down_proj": layer.down.T,
            "mlp.gate_proj": layer.gate_up.T[: config.mlp_width], "mlp.up_proj": layer.gate_up.T[config.mlp_width :],
        }  # fmt: skip
        weights |= {f"{name}{part}.weight": torch.from_numpy(array) for part, array in arrays.items()}
        for letter, (start, stop) in ends.items():
            weights |= linear_or_norm(f"{name}self_attn.{letter}_proj", layer.qkv.columns(start, stop))
    return with_weights(model, weights)


class Twin:
    """What is measured beside a `VLM`: its tower and its decoder."""

    def __init__(self, vlm: VLM, threads: int) -> None:
        torch.set_num_threads(threads)
        self.name = f"transformers {transformers.__version__}, torch {torch.__version__}, sdpa, {threads} threads"
        self.tower: Any = tower(vlm.parts.vision.encoder) if vlm.parts.vision else None
        self.language_model = language_model(vlm.decoder)

    @torch.no_grad()
    def see(self, tiles: np.ndarray) -> tuple[float, np.ndarray]:
        """Seconds for the tower on tiles (tiles, 3, height, width), all in one batch, and the last tile's features."""
        started = time.perf_counter()
        features = self.tower(pixel_values=torch.from_numpy(tiles)).last_hidden_state
        return time.perf_counter() - started, features[-1].numpy()

    @torch.no_grad()
    def read(self, hidden: np.ndarray, new_tokens: int) -> tuple[float, float, np.ndarray]:
        """(prefill seconds, seconds for one decoded token, the prompt's last logits) for hidden (tokens, width)."""
        prompt, token = torch.from_numpy(hidden[None]), torch.from_numpy(hidden[None, :1])
        started = time.perf_counter()
        last = self.language_model(inputs_embeds=prompt, use_cache=True, logits_to_keep=1)
        prefilled = time.perf_counter()
        name = "cache" if "cache" in last else "past_key_values"  # as transformers calls it from 5.40 on, and before
        for _ in range(new_tokens):
            self.language_model(inputs_embeds=token, **{name: last[name]}, use_cache=True, logits_to_keep=1)
        decoded = time.perf_counter() - prefilled
        return prefilled - started, decoded / new_tokens, last.logits[0, -1].numpy()
