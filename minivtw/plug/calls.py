"""How the layers of a transformers decoder are called: which arguments are understood, and which belong to tokens."""

from collections.abc import Callable
from typing import Any

import torch

from ..errors import InputError
from .anatomy import Anatomy
from .rows import Rows, take

ANGLES = "position_embeddings"  # some models have several: position_embeddings_global, …
USUAL = {  # a layer's other arguments; `generate` may hand down token types, which no layer looks at
    "hidden_states", "attention_mask", "position_ids", "cache_position", "cache", "past_key_values", "token_type_ids",
    "mm_token_type_ids",
}  # fmt: skip


def hidden_states(args: tuple, kwargs: dict[str, Any]) -> Any:
    """A layer's hidden states among its arguments."""
    return args[0] if args else kwargs["hidden_states"]


def replaced(output: Any, change: Callable) -> Any:
    """A layer's output, a tensor or a tuple that begins with one, with that tensor changed."""
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


def belongs_to_tokens(name: str) -> bool:
    """Whether an argument says something of each token's position."""
    return name.startswith(ANGLES) or name == "position_ids"


def part_of(value: Any, rows: Rows, name: str) -> Any:
    """Of positions (…, batch or 1, tokens) or their angles (…, tokens, width), in tuples or not, those of some rows."""
    if value is None:
        return None
    if isinstance(value, tuple | list):
        return tuple(part_of(each, rows, name) for each in value)
    return take(value[..., None], rows)[..., 0] if name == "position_ids" else take(value, rows)


def sees_later_tokens(layer: Any, attention: str) -> bool:
    """Whether a layer that gets no mask lets a token see later ones, too: where nothing says that it is causal."""
    return attention == "eager" or not getattr(layer.self_attn, "is_causal", True)


def checked_attention(parts: Anatomy, freezes: bool) -> str:
    """The kind of attention that the decoder runs with. Raises InputError for one that is not understood."""
    attention = str(getattr(parts.decoder.config, "_attn_implementation", None))
    if attention not in ("eager", "sdpa") and "flash" not in attention:
        raise InputError(f"attention of the kind {attention} is not understood; load the model with sdpa or eager")
    if "flash" in attention and freezes:
        raise InputError("flash attention cannot say which text stands before a frozen image; use sdpa or eager")
    return attention


def check_arguments(name: str, layer: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Raise InputError where a layer of the model `name` is called in a way that is not understood."""
    if ANGLES not in " ".join(kwargs) or "attention_mask" not in kwargs:
        raise InputError(f"the layers of {name} get no {ANGLES} or no attention_mask; they are not understood")
    strange = [argument for argument, value in kwargs.items() if not is_understood(argument, value)]
    if strange or args[1:]:
        strange = strange or [f"{len(args)} arguments without a name"]
        raise InputError(f"the layers of {name} get {' and '.join(strange)}, which is not understood")
    if (axes := hidden_states(args, kwargs).ndim) != 3:
        raise InputError(f"the layers of {name} get hidden states of {axes} axes, not 3, which is not understood")
    if layer.training and getattr(layer, "gradient_checkpointing", False):
        raise InputError("gradient checkpointing runs layers twice and cannot know what had left; turn it off")


def is_understood(argument: str, value: Any) -> bool:
    """Whether a layer's argument is one that the hooks change where needed, or has nothing to do with tokens."""
    is_one_number = value is None or isinstance(value, bool | int | float | str) or getattr(value, "ndim", 1) == 0
    leaves = value if isinstance(value, tuple | list) else [value]
    are_tensors = all(leaf is None or torch.is_tensor(leaf) for leaf in leaves)
    return is_one_number or argument in USUAL or (argument.startswith(ANGLES) and are_tensors)
