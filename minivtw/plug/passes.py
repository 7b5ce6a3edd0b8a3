"""One forward pass through a decoder from which tokens left: what each layer gets in place of what it would get."""

import dataclasses
from typing import Any

import torch

from ..errors import InputError
from . import caches
from .calls import belongs_to_tokens, part_of, sees_later_tokens
from .rows import Keys, Rows, causal_mask, narrow_mask


@dataclasses.dataclass
class Pass:
    """One forward pass through the decoder, between the parent's hook and the last layer's end."""

    visual: torch.Tensor | None  # (batch, tokens) booleans; None if there is none among them
    padding: torch.Tensor | None  # (batch, places), 0 for padding; None if not said
    text: Rows | None = None  # what goes on; None: every row
    resting: Rows | None = None  # the visual rows
    hidden: torch.Tensor | None = None  # (batch, tokens, width), as it came to the frozen layer that is at work
    cache: Any = None
    cache_name: str = "cache"  # as this version of transformers calls it
    past: int = 0  # places before this pass
    total: int = 0  # places up to its end
    attention: str = "sdpa"
    held: Any = None  # `caches.Held`, this pass included
    memo: dict = dataclasses.field(default_factory=dict)  # masks and angles that the layers of one kind share
    writing: int | None = None  # while a frozen layer writes what its visual rows let others read: how many they are

    def narrowed(self, layer: Any, hidden: torch.Tensor, args: tuple, kwargs: dict, keys: Keys) -> tuple | None:
        """A layer's (args, kwargs) for the rows `hidden` and the `Keys` it will read; None to leave them alone."""
        cached = caches.shown(kwargs.get(self.cache_name), layer.self_attn.layer_idx)
        keys = keys._replace(places=keys.places[:, -(cached + hidden.shape[1]) :])
        mask = self.mask(layer, kwargs["attention_mask"], keys)
        if mask is None and self.text is None:  # a token that is decoded, and nothing is hidden from it
            return None
        return self.changed(hidden, args, {**kwargs, "attention_mask": mask}, self.text)

    def changed(self, hidden: torch.Tensor, args: tuple, kwargs: dict, rows: Rows | None) -> tuple:
        """A layer's (args, kwargs) for the states `hidden` of some rows; rows: None where these are all."""
        if rows is not None:
            kwargs = {
                **kwargs,
                **{name: self.part(name, kwargs[name], rows) for name in kwargs if belongs_to_tokens(name)},
            }
            if "flash" in self.attention:
                kwargs["position_ids"] = None  # flash attention takes a gap in them for the start of another prompt
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def part(self, name: str, value: Any, rows: Rows) -> Any:
        """Of positions or their angles, those of some rows; a pass asks for few different ones."""
        memo, key = self.memo, (name, id(value), id(rows))
        if key not in memo:
            memo[key] = value, part_of(value, rows, name)  # the value, too, so that no other gets its id
        return memo[key][1]

    def mask(self, layer: Any, mask: torch.Tensor | None, keys: Keys) -> torch.Tensor | None:
        """The mask of a layer that does not get all tokens, or does not hold all."""
        attention = layer.self_attn
        span, is_flash = caches.window(self.cache, attention.layer_idx), "flash" in self.attention
        if is_flash:
            span = span or getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))
        slides = span is not None and self.total > span
        if is_flash and slides:
            raise InputError(f"flash attention would count a window of {span} by the tokens left; use sdpa or eager")
        in_order = keys.ordered or self.total - self.past == 1
        if mask is None and keys.whole and in_order and not slides:
            return None  # causal by counting
        key = (id(mask), span, keys.places.shape, keys.ordered)
        if key in self.memo:
            return self.memo[key][1]
        if mask is not None:
            made = narrow_mask(mask, self.text, keys, self.total)
        elif is_flash:
            made = keys.places >= 0  # (batch, keys), False in holes
        else:
            query = torch.arange(self.past, self.total, device=keys.places.device).expand(len(keys.places), -1)
            query = query if self.text is None else query.gather(1, self.text.index)
            made = causal_mask(query, keys, span, sees_later_tokens(layer, self.attention))
        self.memo[key] = mask, made
        return made
