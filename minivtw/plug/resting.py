"""What others read of the visual tokens that rest in a layer: the keys and values that the layer itself makes of them.

The layer runs on those rows until it writes into its cache, and no further. So whatever it does before that (norms,
rotary positions or none, clamps, scales) is its own doing. Its queries, which nobody needs, are made of one row.
"""

import contextlib
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from ..errors import InputError


class Written(Exception):
    """The layer has written: nothing further is needed of it."""


class Catch(DynamicCache):
    """A cache that keeps what a layer writes as it comes, and ends the layer's work there."""

    caught: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.caught = key_states, value_states
        raise Written


def keys_and_values(
    layer: Any, call: tuple[tuple, dict[str, Any]], cache_name: str, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(batch, kv_heads, tokens, head_dim) each, as the layer would write them. call: its (args, kwargs);
    cache_name: which of them is the cache; name: the model's, for messages. Raises InputError if it writes nothing.
    """
    catch = Catch()
    with contextlib.suppress(Written):  # not a call of the layer: hooks are for the pass that is going on
        layer.forward(*call[0], **{**call[1], cache_name: catch})
    if catch.caught is None:
        raise InputError(f"layers of {name} cannot be frozen: their attention writes no keys and values into a cache")
    return catch.caught
