"""Withdrawal in a transformers model, by hooks that the layers offer: nothing of the model is changed or replaced.

A forward pass meets, in this order: the parent's hook, where `input_ids` say which tokens are visual; that of layer 0,
where the cache says what went before; those of the frozen layers; from layer K on, one before every layer. What a layer
would take for all tokens (states, angles of the positions, mask) it then gets for the tokens that go on. After the last
layer the rows return to their places, so that all outputs keep their shapes.
"""

import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from ..errors import InputError, checked_int
from . import caches
from .anatomy import Anatomy, check_freezable, hidden_states, keys_and_values, window
from .rows import Keys, Rows, all_keys, causal_mask, narrow_mask, put, rows_of, take

ANGLES = "position_embeddings"  # some models have several: position_embeddings_global, …
USUAL = {  # a layer's other arguments; `generate` may hand down token types, which no layer looks at
    "hidden_states", "attention_mask", "position_ids", "cache_position", "cache", "past_key_values", "token_type_ids",
    "mm_token_type_ids",
}  # fmt: skip


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
    flash: bool = False
    held: Any = None  # `caches.Held`, this pass included
    memo: dict = dataclasses.field(default_factory=dict)  # masks and angles that the layers of one kind share


def replaced(output: Any, change: Callable) -> Any:
    """A layer's output, a tensor or a tuple that begins with one, with that tensor changed."""
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


def check_layer(layer: Any, layers: int, name: str) -> None:
    """Raise InputError unless `layer` is one of 0 … layers."""
    if checked_int(layer, f"the {name} layer") > layers:
        raise InputError(f"the {name} layer must be from 0 to {layers}, not {layer}")


class Hooks:
    """The hooks of one context, and the forward pass that each thread is in."""

    def __init__(self, parts: Anatomy, layer: Any, frozen: tuple):
        count = len(parts.layers)
        if layer is not None or not frozen:
            check_layer(layer, count, "withdrawal")
        self.parts, self.layer, self.frozen = parts, count if layer is None else layer, frozen
        for index in frozen:
            check_layer(index, count - 1, "frozen")
            if index >= self.layer:
                raise InputError(f"layer {index} cannot be frozen: the visual tokens leave before layer {self.layer}")
            check_freezable(parts, index)
        hooked = parts.parent._forward_pre_hooks.values()
        if any(isinstance(getattr(hook, "__self__", None), Hooks) for hook in hooked):
            raise InputError(f"tokens of {parts.name} are withdrawn or frozen already; leave that context first")
        self.plan = (self.layer, frozen)
        self.short = sorted({*frozen, *range(self.layer, count)})  # the layers that do not get every token
        self.thread = threading.local()  # .now: the `Pass`; a server may run several threads through one model

    def places(self) -> Iterator[tuple]:
        """(module, "before" or "after", hook) of every hook, in the order of a forward pass."""
        if not self.short:
            return
        layers = self.parts.layers
        yield self.parts.parent, "before", self.enter
        yield layers[0], "before", self.start
        for index in self.short:
            yield layers[index], "before", self.rest if index in self.frozen else self.go_on
            if index in self.frozen:
                yield layers[index], "after", self.wake
        yield layers[-1], "after", self.finish

    def enter(self, parent: Any, args: tuple, kwargs: dict) -> None:
        """Before the parent: which tokens are visual."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            raise InputError("visual tokens are recognised by their input_ids; inputs_embeds alone do not tell")
        visual, padding = None, kwargs.get("attention_mask", 0)
        if ids.shape[1] > 1:
            visual = torch.isin(ids, torch.tensor(self.parts.visual_ids, device=ids.device))  # (batch, tokens)
            visual = visual if visual.any() else None
        self.thread.now = Pass(visual, padding if torch.is_tensor(padding) and padding.ndim == 2 else None)

    def start(self, layer: Any, args: tuple, kwargs: dict) -> None:
        """Before layer 0: what the cache holds, and with it the rows and keys of every kind of layer."""
        now = getattr(self.thread, "now", None)
        if now is None:
            raise InputError("the decoder was called by itself; call the model, which knows its visual tokens")
        hidden = hidden_states(args, kwargs)
        batch, tokens = hidden.shape[:2]
        now.cache_name = "cache" if "cache" in kwargs else "past_key_values"
        now.cache = cache = kwargs.get(now.cache_name)
        self.check(layer, args, kwargs)
        if cache is not None:
            caches.check(cache)
            caches.prepare(cache, self.short, getattr(self.parts.decoder.config, "layer_types", None))
            now.past = int(cache.get_seq_length())
        past, now.total = now.past, now.past + tokens
        text, frozen = self.before(cache, past, batch, hidden.device)
        if now.visual is None:
            text, frozen = (keys.grown(None, past, now.total) for keys in (text, frozen))
            now.held = caches.Held(self.plan, now.total, text, frozen)
            return
        stays = ~now.visual
        if now.padding is not None:
            stays = stays & now.padding[:, -tokens:].to(stays.device, torch.bool)
        if bool(now.visual[:, -1].any()) or not bool(stays.any(1).all()):
            raise InputError("a prompt must end with text, for where an image is withdrawn nothing is left to answer")
        now.text, now.resting = rows_of(stays), rows_of(now.visual)
        frozen = frozen.grown(now.resting, past, now.total).grown(now.text, past, now.total)._replace(ordered=False)
        now.held = caches.Held(self.plan, now.total, text.grown(now.text, past, now.total), frozen)

    def before(self, cache: Any, past: int, batch: int, device: torch.device) -> tuple[Keys, Keys]:
        """The `Keys` that layers from K on, and frozen layers, hold of the `past` tokens before this pass."""
        held = getattr(cache, caches.NOTE, None) if past else None
        if held is None:  # nothing has left yet
            return all_keys(batch, past, device), all_keys(batch, past, device)
        if held.plan != self.plan:
            raise InputError("this cache was made with other layers withdrawn or frozen; go on with it as it was made")
        held = held.cut(past)
        return held.text.spread(batch), held.frozen.spread(batch)

    def check(self, layer: Any, args: tuple, kwargs: dict) -> None:
        """Raise InputError where a layer is called in a way that is not understood."""
        attention = getattr(self.parts.decoder.config, "_attn_implementation", None)
        flash = "flash" in str(attention)
        if attention not in ("eager", "sdpa") and not flash:
            raise InputError(f"attention of the kind {attention} is not understood; load the model with sdpa or eager")
        if flash and self.frozen:
            raise InputError("flash attention cannot say which text stands before a frozen image; use sdpa or eager")
        name = self.parts.name
        if ANGLES not in " ".join(kwargs) or "attention_mask" not in kwargs:
            raise InputError(f"the layers of {name} get no {ANGLES} or no attention_mask; they are not understood")
        is_plain = lambda value: value is None or isinstance(value, bool | int | float | str)  # not about tokens
        known = lambda argument, value: argument in USUAL or argument.startswith(ANGLES) or is_plain(value)
        strange = [argument for argument, value in kwargs.items() if not known(argument, value)]
        if strange or args[1:]:
            strange = strange or [f"{len(args)} arguments without a name"]
            raise InputError(f"the layers of {name} get {' and '.join(strange)}, which is not understood")
        if layer.training and getattr(layer, "gradient_checkpointing", False):
            raise InputError("gradient checkpointing runs layers twice and cannot know what had left; turn it off")
        self.thread.now.flash = flash

    def go_on(self, layer: Any, args: tuple, kwargs: dict) -> tuple | None:
        """Before a layer from K on: text alone."""
        now = self.thread.now
        hidden = hidden_states(args, kwargs)
        if now.text is not None and layer is self.parts.layers[self.layer]:
            hidden = take(hidden, now.text)
        return self.narrowed(layer, hidden, args, kwargs, now.held.text)

    def rest(self, layer: Any, args: tuple, kwargs: dict) -> tuple | None:
        """Before a frozen layer: the visual tokens leave their keys and values in the cache, and text goes on."""
        now = self.thread.now
        now.hidden = hidden = hidden_states(args, kwargs)
        if now.text is not None:
            cache = kwargs.get(now.cache_name)
            cache = DynamicCache() if cache is None else cache  # without one, a cache for this layer's call
            kwargs = {**kwargs, now.cache_name: cache}
            angles = self.angles(kwargs[ANGLES], now.resting, "resting")
            keys, values = keys_and_values(layer, take(hidden, now.resting), angles)
            cache.update(keys, values, layer.self_attn.layer_idx)
            hidden = take(hidden, now.text)
        return self.narrowed(layer, hidden, args, kwargs, now.held.frozen)

    def wake(self, layer: Any, args: tuple, output: Any) -> Any:
        """After a frozen layer: text as the layer left it among the visual tokens as they came."""
        now = self.thread.now
        if now.text is None:
            return None
        return replaced(output, lambda states: put(now.hidden, now.text, states))

    def finish(self, layer: Any, args: tuple, output: Any) -> Any:
        """After the last layer: every row to its place, zeros where a token left; the cache remembers who did."""
        now, self.thread.now = self.thread.now, None
        if now.cache is not None:
            caches.settle(now.cache, self.short, now.total)
            setattr(now.cache, caches.NOTE, now.held)
        if now.text is None or self.layer == len(self.parts.layers):
            return None
        shape = now.visual.shape
        return replaced(output, lambda states: put(states.new_zeros(*shape, states.shape[-1]), now.text, states))

    def narrowed(self, layer: Any, hidden: torch.Tensor, args: tuple, kwargs: dict, keys: Keys) -> tuple | None:
        """A layer's (args, kwargs) for the rows `hidden` and the `Keys` it will read; None to leave them alone."""
        now = self.thread.now
        cached = caches.length(kwargs.get(now.cache_name), layer.self_attn.layer_idx)
        keys = keys._replace(places=keys.places[:, -(cached + hidden.shape[1]) :])
        mask = self.mask(layer, kwargs["attention_mask"], keys)
        if mask is None and now.text is None:  # a token that is decoded, and nothing is hidden from it
            return None
        changed = {**kwargs, "attention_mask": mask}
        if now.text is not None:
            changed |= {name: self.angles(kwargs[name], now.text, name) for name in kwargs if name.startswith(ANGLES)}
            changed["position_ids"] = None  # flash attention takes a gap in them for the start of another prompt
        if args:
            return (hidden, *args[1:]), changed
        return args, {**changed, "hidden_states": hidden}

    def angles(self, pair: tuple, rows: Rows, name: str) -> tuple:
        """cos and sin, (…, batch or 1, tokens, head_dim) each, of some rows; a pass asks for few different ones."""
        memo, key = self.thread.now.memo, (name, id(pair[0]))
        if key not in memo:
            memo[key] = tuple(take(part, rows) for part in pair)
        return memo[key]

    def mask(self, layer: Any, mask: torch.Tensor | None, keys: Keys) -> torch.Tensor | None:
        """The mask of a layer that does not get all tokens, or does not hold all."""
        now, span = self.thread.now, window(layer)
        slides = span is not None and now.total > span
        if now.flash and slides:
            raise InputError(f"flash attention would count a window of {span} by the tokens left; use sdpa or eager")
        in_order = keys.ordered or now.total - now.past == 1
        if mask is None and keys.whole and in_order and not slides:
            return None  # causal by counting
        key = (id(mask), span, keys.places.shape, keys.ordered)
        if key in now.memo:
            return now.memo[key]
        if mask is not None:
            made = narrow_mask(mask, now.text, keys, now.total)
        elif now.flash:
            made = keys.places >= 0  # (batch, keys), False in holes
        else:
            query = torch.arange(now.past, now.total, device=keys.places.device).expand(len(keys.places), -1)
            made = causal_mask(query if now.text is None else query.gather(1, now.text.index), keys, span)
        now.memo[key] = made
        return made
