"""Withdrawal in a transformers model, by hooks that the layers offer: nothing that it computes with is replaced.

A forward pass meets, in this order: the parent's hook, where `input_ids` say which tokens are visual; that of layer 0,
where the cache says what went before; those of the frozen layers; from layer K on, one before every layer. What a layer
would take for all tokens (states, angles of the positions, mask) it then gets for the tokens that go on. After the last
layer the rows return to their places, so that all outputs keep their shapes.
"""

import contextlib
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from ..errors import InputError, checked_int
from . import caches
from .anatomy import DEEPSTACK, Anatomy
from .calls import check_arguments, checked_attention, hidden_states, replaced
from .figures import Generation, note, sizes
from .passes import Pass
from .resting import keys_and_values
from .rows import Keys, all_keys, put, rows_of, take

LOCK = threading.Lock()  # while hooks are put on a model and taken off


class Here(threading.local):
    """What one thread is in; a server may run several threads through one model."""

    now: Any = None  # the `Pass` that is going on
    generating = 0  # calls of `generate` that began within the context
    told: Generation | None = None  # the figures of its last pass
    passes = 0  # its own of those that went through the hooks to their end


def check_layer(layer: Any, layers: int, name: str) -> None:
    """Raise InputError unless `layer` is one of 0 … layers."""
    if checked_int(layer, f"the {name} layer") > layers:
        raise InputError(f"the {name} layer must be from 0 to {layers}, not {layer}")


def hooks_on(parts: Anatomy) -> list["Hooks"]:
    """The contexts whose hooks are on a model."""
    owners = [getattr(hook, "__self__", None) for hook in [*parts.parent._forward_pre_hooks.values()]]
    return [owner for owner in owners if isinstance(owner, Hooks)]


def of_this_thread(parts: Anatomy) -> "Hooks | None":
    """Of the contexts on a model, the one that this thread's calls belong to: its generation's, else the open block's."""
    here = hooks_on(parts)
    generating = [hooks for hooks in here if hooks.thread.generating]
    return next(iter([*generating, *(hooks for hooks in here if hooks.is_open)]), None)


@contextlib.contextmanager
def on(hooks: "Hooks") -> Iterator[None]:
    """The hooks are on the model for as long as any block or generation needs them."""
    with LOCK:
        hooks.users += 1
        if hooks.users == 1:
            for module, place, hook in hooks.places():
                register = module.register_forward_hook if place == "after" else module.register_forward_pre_hook
                hooks.handles.callback(register(hook, with_kwargs=place == "before").remove)
    try:
        yield
    finally:
        with LOCK:
            hooks.users -= 1
            if not hooks.users:
                hooks.handles.close()


class Hooks:
    """The hooks of one context, and the forward pass that each thread is in."""

    is_open: bool = False  # whether the with-block lasts: calls of the model that are no one's generation belong to it

    def __init__(self, parts: Anatomy, layer: Any, frozen: tuple):
        count = len(parts.layers)
        if layer is not None or not frozen:
            check_layer(layer, count, "withdrawal")
        self.parts, self.layer, self.frozen = parts, count if layer is None else layer, frozen
        for index in frozen:
            check_layer(index, count - 1, "frozen")
            if index >= self.layer:
                raise InputError(f"layer {index} cannot be frozen: the visual tokens leave before layer {self.layer}")
        if any(hooks.is_open for hooks in hooks_on(parts)):
            raise InputError(f"tokens of {parts.name} are withdrawn or frozen already; leave that context first")
        checked_attention(parts, bool(frozen))
        self.plan = (self.layer, frozen)
        self.short = sorted({*frozen, *range(self.layer, count)})  # the layers that do not get every token
        self.users, self.handles = 0, contextlib.ExitStack()  # blocks and generations, and their hooks on the model
        self.thread, self.called = Here(), False  # called: whether a call of the model met a hook
        self.told: list[Generation] = []
        self.sizes = [sizes(layer) for layer in parts.layers]

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise InputError(
            f"{self.parts.name} has hooks of minivtw's withdraw or freeze; copy or pickle it outside the block"
        )

    @contextlib.contextmanager
    def generation(self) -> Iterator[None]:
        """What this thread does with the model meanwhile belongs to this context, whether or not its block lasts."""
        before, here = self.thread.passes, self.thread
        here.generating, here.told = here.generating + 1, None
        try:
            yield
        finally:
            here.generating, here.told = here.generating - 1, None
        if self.short and here.passes == before:
            raise InputError(f"nothing was withdrawn from {self.parts.name}: its layers ran without their hooks")

    def places(self) -> Iterator[tuple]:
        """(module, "before" or "after", hook) of every hook, in the order of a forward pass."""
        if not self.short:
            return
        layers = self.parts.layers
        yield self.parts.parent, "before", self.enter
        yield self.parts.decoder, "before", self.add_to_fewer
        yield layers[0], "before", self.start
        for index in self.short:
            yield layers[index], "before", self.rest if index in self.frozen else self.go_on
            if index in self.frozen:
                yield layers[index], "after", self.wake
                if query := getattr(layers[index].self_attn, "q_proj", None):
                    yield query, "before", self.ask_little
                    yield query, "after", self.ask_as_much
        yield layers[-1], "after", self.finish

    def enter(self, parent: Any, args: tuple, kwargs: dict) -> None:
        """Before the parent: which tokens are visual."""
        self.thread.now, self.called = None, True
        if self is not of_this_thread(self.parts):
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            raise InputError("visual tokens are recognised by their input_ids; inputs_embeds alone do not tell")
        visual, padding = None, kwargs.get("attention_mask", 0)
        if ids.shape[1] > 1:
            visual = self.parts.visual(ids)  # (batch, tokens)
            visual = visual if visual.any() else None
            if visual is None and torch.is_tensor(kwargs.get("pixel_values")):
                raise InputError(f"{self.parts.name} gets an image, but no token of the prompt is a visual one")
        self.thread.now = Pass(visual, padding if torch.is_tensor(padding) and padding.ndim == 2 else None)

    def add_to_fewer(self, decoder: Any, args: tuple, kwargs: dict) -> tuple | None:
        """Before the decoder: what deepstack adds to visual rows after layers from K on would find none."""
        added = kwargs.get(DEEPSTACK)
        if self.thread.now is None or added is None:
            return None
        return args, {**kwargs, DEEPSTACK: added[: self.layer]}

    def start(self, layer: Any, args: tuple, kwargs: dict) -> None:
        """Before layer 0: what the cache holds, and with it the rows and keys of every kind of layer."""
        now = self.thread.now
        self.called = True
        if now is None:
            if self is of_this_thread(self.parts):
                raise InputError("the decoder was called by itself; call the model, which knows its visual tokens")
            return
        check_arguments(self.parts.name, layer, args, kwargs)
        now.attention = checked_attention(self.parts, bool(self.frozen))
        hidden = hidden_states(args, kwargs)
        batch, tokens = hidden.shape[:2]
        now.cache_name = "cache" if "cache" in kwargs else "past_key_values"
        now.cache = cache = kwargs.get(now.cache_name)
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
            raise InputError(
                "a prompt, and each chunk of one (prefill_chunk_size), must end with text: where an image is withdrawn "
                "nothing is left to answer"
            )
        now.text, now.resting = rows_of(stays), rows_of(now.visual)
        frozen = frozen.grown(now.resting, past, now.total).grown(now.text, past, now.total)._replace(ordered=False)
        now.held = caches.Held(self.plan, now.total, text.grown(now.text, past, now.total), frozen)

    def before(self, cache: Any, past: int, batch: int, device: torch.device) -> tuple[Keys, Keys]:
        """The `Keys` that layers from K on, and frozen layers, hold of the `past` tokens before this pass."""
        held = cache.held if past else None
        if held is None or not held.lacks_tokens:
            return all_keys(batch, past, device), all_keys(batch, past, device)
        if held.plan != self.plan:
            raise InputError("this cache was made with other layers withdrawn or frozen; go on with it as it was made")
        held = held.cut(past)
        return held.text.spread(batch), held.frozen.spread(batch)

    def go_on(self, layer: Any, args: tuple, kwargs: dict) -> tuple | None:
        """Before a layer from K on: text alone."""
        now = self.thread.now
        if now is None:
            return None
        hidden = hidden_states(args, kwargs)
        if now.text is not None and layer is self.parts.layers[self.layer]:
            hidden = take(hidden, now.text)
        return now.narrowed(layer, hidden, args, kwargs, now.held.text)

    def rest(self, layer: Any, args: tuple, kwargs: dict) -> tuple | None:
        """Before a frozen layer: the visual tokens leave their keys and values in the cache, and text goes on."""
        now = self.thread.now
        if now is None:
            return None
        now.hidden = hidden = hidden_states(args, kwargs)
        span, index = caches.window(now.cache, layer.self_attn.layer_idx), layer.self_attn.layer_idx
        if span is not None and now.total > span:
            raise InputError(
                f"layer {index} of {self.parts.name} cannot be frozen: it sees only the last {span} tokens"
            )
        if now.text is not None:
            cache = kwargs.get(now.cache_name)
            cache = DynamicCache() if cache is None else cache  # without one, a cache for this layer's call
            kwargs = {**kwargs, now.cache_name: cache}
            now.writing = now.resting.index.shape[1]
            visual = now.changed(take(hidden, now.resting), args, {**kwargs, "attention_mask": None}, now.resting)
            keys, values = keys_and_values(layer, visual, now.cache_name, self.parts.name)
            now.writing = None
            cache.update(keys, values, index)
            hidden = take(hidden, now.text)
        return now.narrowed(layer, hidden, args, kwargs, now.held.frozen)

    def ask_little(self, query: Any, args: tuple, kwargs: dict) -> tuple | None:
        """Before the queries of a frozen layer: nobody needs those of visual rows, so one row will do."""
        now = self.thread.now
        return None if now is None or not now.writing else ((args[0][:, :1], *args[1:]), kwargs)

    def ask_as_much(self, query: Any, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        """After them: as many rows as there should be."""
        now = self.thread.now
        if now is None or not now.writing:
            return None
        return output.expand(-1, now.writing, -1).clone()  # some clamp it in place

    def wake(self, layer: Any, args: tuple, output: Any) -> Any:
        """After a frozen layer: text as the layer left it among the visual tokens as they came."""
        now = self.thread.now
        if now is None or now.text is None:
            return None
        return replaced(output, lambda states: put(now.hidden, now.text, states))

    def finish(self, layer: Any, args: tuple, output: Any) -> Any:
        """After the last layer: every row to its place, zeros where a token left; the cache remembers who did."""
        now, self.thread.now = self.thread.now, None
        if now is None:
            return None
        self.thread.passes += 1
        if now.cache is not None:
            caches.settle(now.cache, self.short, now.held)
        note(self.telling(now), self.sizes, now, self.layer, self.frozen)
        if now.text is None or self.layer == len(self.parts.layers):
            return None
        shape = now.visual.shape
        return replaced(output, lambda states: put(states.new_zeros(*shape, states.shape[-1]), now.text, states))

    def telling(self, now: Pass) -> Generation:
        """The figures that a pass belongs to: its generation's, or those of the calls that had its cache before."""
        told = self.thread.told
        if told is None or not (self.thread.generating or (now.past and told.cache() is now.cache)):
            self.told.append(told := Generation())
        told.cache = (lambda: None) if now.cache is None else weakref.ref(now.cache)
        self.thread.told = told
        return told
