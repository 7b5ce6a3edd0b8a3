"""Where a transformers model keeps its decoder: found by what the modules have, not by what they are called."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import InputError, checked_int

VisualIds = int | Iterable[int] | Callable[[torch.Tensor], torch.Tensor] | None

USUAL = {  # what a decoder may be called with; anything else reaches layers in ways that are not understood
    "input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position", "cache", "past_key_values",
    "use_cache", "output_attentions", "output_hidden_states", "return_dict", "args", "kwargs", "flash_attn_kwargs",
    "logits_to_keep", "visual_pos_masks", "deepstack_visual_embeds",
}  # fmt: skip
DEEPSTACK = "deepstack_visual_embeds"  # Qwen3-VL adds these to the visual rows after the first layers, one per layer
VISUAL = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")  # in a config


class Anatomy(NamedTuple):
    """The parts of a vision-language model that withdrawal touches."""

    name: str  # the class, for messages
    parent: nn.Module  # turns input_ids and images into embeddings and calls the decoder
    decoder: nn.Module  # embed_tokens, layers, norm
    layers: nn.ModuleList
    visual_ids: Any  # a tuple of the ids that stand for pieces of an image or a video, or a function that finds them

    def visual(self, ids: torch.Tensor) -> torch.Tensor:
        """Which of the token ids (batch, tokens) stand for an image or a video: booleans."""
        if callable(self.visual_ids):
            return self.visual_ids(ids)
        return torch.isin(ids, torch.tensor(self.visual_ids, device=ids.device))


def is_stack(module: nn.Module) -> bool:
    """A language model's stack of layers: vision towers have layers, too, but embed no tokens."""
    layers = getattr(module, "layers", None)
    return hasattr(module, "embed_tokens") and isinstance(layers, nn.ModuleList) and len(layers) > 0


def decoder_of(model: nn.Module, name: str) -> Any:
    """The one decoder whose layers all attend to earlier tokens. Raises InputError, saying what there is instead."""
    stacks: Any = [module for module in model.modules() if is_stack(module)]
    others = [layer for stack in stacks for layer in stack.layers if not hasattr(layer, "self_attn")]
    attending = [
        stack for stack in stacks if hasattr(stack, "norm") and not any(layer in others for layer in stack.layers)
    ]
    if len(attending) == 1:
        return attending[0]
    if attending or not others:
        found = f"{len(attending)} decoders with embed_tokens, layers and norm"
        raise InputError(f"{name} is not understood: it has {found}, not one")
    kinds = " and ".join(sorted({type(layer).__name__ for layer in others}))
    mixers = sorted({part for layer in others for part, _ in layer.named_children() if is_mixer(part)})
    instead = f", but {' and '.join(mixers)}" if mixers else ""
    raise InputError(f"{name} is not supported: some of its layers ({kinds}) have no self_attn{instead}")


def is_mixer(part: str) -> bool:
    """Whether a layer's part, by its name, moves information between tokens: neither a norm nor a feed-forward."""
    return not any(word in part for word in ("norm", "mlp", "feed_forward", "ffn", "moe", "dropout", "act"))


def anatomy(model: Any, visual_ids: VisualIds = None) -> Anatomy:
    """Find the decoder of a transformers model. Raises InputError for a model that is not understood.

    visual_ids: the ids of the tokens that stand for images, or a function from token ids (batch, tokens) to a boolean
    mask; None for the ids that the config names.
    """
    name = type(model).__name__
    if not isinstance(model, nn.Module) or not hasattr(model, "config") or not hasattr(model, "generate"):
        raise InputError(f"this needs a generating model of transformers, not {name}")
    decoder = decoder_of(model, name)
    around = [module for module in model.modules() if any(part is decoder for part in module.modules())]
    parent = next(module for module in around if any(child is decoder for child in module.children()))
    if hasattr(model, "_orig_mod") or any(part._compiled_call_impl for part in (*around, *decoder.modules())):
        raise InputError(f"{name} is compiled, but tokens that leave change its shapes; use it without torch.compile")
    arguments = inspect.signature(decoder.forward).parameters
    if unusual := " and ".join(argument for argument in arguments if argument not in USUAL):
        raise InputError(f"{name} is not supported: its decoder takes {unusual} for tokens that withdrawal would move")
    if visual_ids is None:
        named = [getattr(config, key, None) for config in (parent.config, model.config) for key in VISUAL]
        visual_ids = [token for token in named if isinstance(token, int)]
        if not visual_ids:
            why = "its config names no image_token_id; say visual_ids=, the ids of the tokens that stand for images"
            raise InputError(f"{name} has no visual tokens to withdraw: {why}")
    elif not callable(visual_ids):
        visual_ids = [visual_ids] if isinstance(visual_ids, int) else visual_ids
        visual_ids = [checked_int(token, "a visual token's id") for token in visual_ids]
    return Anatomy(name, parent, decoder, decoder.layers, visual_ids if callable(visual_ids) else tuple(visual_ids))
