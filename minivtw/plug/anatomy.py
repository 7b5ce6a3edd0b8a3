"""Where a transformers model keeps its decoder: found by what the modules have, not by what they are called."""

import inspect
import sys
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import InputError

USUAL = {  # what a decoder may be called with; anything else reaches layers in ways that are not understood
    "input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position", "cache", "past_key_values",
    "use_cache", "output_attentions", "output_hidden_states", "return_dict", "args", "kwargs", "flash_attn_kwargs",
}  # fmt: skip
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}
SMALL_PARTS = {"q_norm", "k_norm", "rotary_emb"}  # of an attention module, besides its projections


class Anatomy(NamedTuple):
    """The parts of a vision-language model that withdrawal touches."""

    name: str  # the class, for messages
    parent: nn.Module  # turns input_ids and images into embeddings and calls the decoder
    decoder: nn.Module  # embed_tokens, layers, norm
    layers: nn.ModuleList
    visual_ids: tuple[int, ...]  # the token ids that stand for pieces of an image or a video


def is_decoder(module: nn.Module) -> bool:
    """A language model's stack: vision towers have layers, too, but embed no tokens."""
    layers = getattr(module, "layers", None)
    parts = all(hasattr(module, part) for part in ("embed_tokens", "norm"))
    return parts and isinstance(layers, nn.ModuleList) and all(hasattr(layer, "self_attn") for layer in layers)


def anatomy(model: Any) -> Anatomy:
    """Find the decoder of a transformers model. Raises InputError for a model that is not understood."""
    name = type(model).__name__
    if not isinstance(model, nn.Module) or not hasattr(model, "config") or not hasattr(model, "generate"):
        raise InputError(f"this needs a generating model of transformers, not {name}")
    if hasattr(model, "_orig_mod") or any(module._compiled_call_impl for module in model.modules()):
        raise InputError(f"{name} is compiled, but tokens that leave change its shapes; use it without torch.compile")
    decoders = [module for module in model.modules() if is_decoder(module)]
    if len(decoders) != 1 or not len(decoders[0].layers):
        found = f"{len(decoders)} decoders with embed_tokens, layers and norm"
        raise InputError(f"{name} is not understood: it has {found}, not one")
    arguments = inspect.signature(decoders[0].forward).parameters
    if unusual := " and ".join(argument for argument in arguments if argument not in USUAL):
        raise InputError(f"{name} is not supported: its decoder takes {unusual} for tokens that withdrawal would move")
    parent = next(module for module in model.modules() if any(child is decoders[0] for child in module.children()))
    named = (getattr(parent.config, key, None) for key in ("image_token_id", "video_token_id"))
    visual_ids = tuple(token for token in named if token is not None)
    if not visual_ids:
        raise InputError(f"{name} has no visual tokens to withdraw: its config names no image_token_id")
    return Anatomy(name, parent, decoders[0], decoders[0].layers, visual_ids)


def hidden_states(args: tuple, kwargs: dict[str, Any]) -> Any:
    """A layer's hidden states among its arguments."""
    return args[0] if args else kwargs["hidden_states"]


def window(layer: nn.Module) -> int | None:
    """How many tokens a layer of local attention looks back, itself included; None if it sees them all."""
    return getattr(layer.self_attn, "sliding_window", None)


def check_freezable(parts: Anatomy, index: int) -> None:
    """Raise InputError unless the keys and values of this layer can be made apart from the rest of it."""
    layer = parts.layers[index]
    attention = layer.self_attn
    children = {name for name, _ in attention.named_children()}
    needs = PROJECTIONS <= children <= PROJECTIONS | SMALL_PARTS and hasattr(layer, "input_layernorm")
    if not needs or not hasattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb"):
        raise InputError(f"layers of {parts.name} cannot be frozen: their attention is not understood")
    if (span := window(layer)) is not None:
        raise InputError(f"layer {index} of {parts.name} cannot be frozen: it sees only the last {span} tokens")


def keys_and_values(layer: Any, hidden: torch.Tensor, angles: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """What a layer lets others read of some tokens: their keys and values, (batch, kv_heads, tokens, head_dim).

    hidden: (batch, tokens, width), as it comes to the layer; angles: the pair cos, sin of the same tokens.
    """
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    keys, values = (
        linear(normed).view(*normed.shape[:-1], -1, attention.head_dim).transpose(1, 2)
        for linear in (attention.k_proj, attention.v_proj)
    )
    keys = attention.k_norm(keys) if hasattr(attention, "k_norm") else keys
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    return rotate(keys, keys, *(part.to(keys.device) for part in angles))[1], values
