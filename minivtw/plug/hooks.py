"""Withdrawal in a transformers model, by hooks that the layers offer: nothing of the model is changed or replaced.

A forward pass meets, in this order: the parent's door, where `input_ids` say which tokens are visual; the door of layer 0,
where the cache says what went before; the doors of the frozen layers; from layer K on, every door. What a layer would
take for all tokens (states, angles of the positions, mask) it then gets for the tokens that go on. Behind the last layer
the rows return to their places, so that all outputs keep their shapes.
"""

import contextlib
import json
import pathlib
import threading
from collections.abc import Iterable

import torch
from transformers.cache_utils import DynamicCache

from ..errors import InputError
from . import caches
from .anatomy import anatomy, check_freezable, keys_and_values, window
from .rows import Rows, all_keys, causal_mask, choose, narrow_mask, padding_of, put, take

ANGLES = "position_embeddings"  # some models have several: position_embeddings_global, …
KNOWN = {"hidden_states", "attention_mask", "position_ids", "cache_position", "cache", "past_key_values", "past_key_value"}
UNUSED = ("token_type_ids", "mm_token_type_ids")  # that `generate` hands down, and no layer looks at


@contextlib.contextmanager
def withdraw(model, layer):
    """Visual Tokens Withdrawal (Lin et al. 2024, section 3.2) in a transformers model: before layer K they leave.

    model: a vision-language model; layer: K from 0 to the number of layers, or the path of a stored withdrawal.json (or
    its folder). Within the context `generate` and the model itself do without; outside, the model is as it was.
    Raises InputError for what is not understood.
    """
    with plugged(model, layer, ()):
        yield model


@contextlib.contextmanager
def freeze(model, layers, withdraw=None):
    """Let visual tokens rest in some layers (ShortV, arXiv 2504.00502), and leave before layer `withdraw`, if given.

    In a frozen layer they are read, by keys and values of the state they came with, but ask nothing, pass no output
    projection and no feed-forward. layers: indices below `withdraw`. Raises InputError for what is not understood.
    """
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise InputError(f"the frozen layers must be a list of whole numbers, not {layers!r}")
    with plugged(model, withdraw, tuple(layers)):
        yield model


@contextlib.contextmanager
def plugged(model, layer, frozen):
    """Hooks on, and off again whatever happens. layer: K or None; frozen: indices."""
    hooks = Hooks(anatomy(model), layer, frozen)
    with contextlib.ExitStack() as handles:
        for module, place, hook in hooks.doors():
            register = module.register_forward_hook if place == "behind" else module.register_forward_pre_hook
            handles.callback(register(hook, with_kwargs=place == "before").remove)
        yield


def stored(path):
    """K out of a withdrawal.json, or of a folder that holds one."""
    file = pathlib.Path(path)
    file = file / "withdrawal.json" if file.is_dir() else file
    try:
        return json.loads(file.read_text(encoding="utf-8"))["withdraw_layer"]
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} says no withdraw_layer") from error


def check_layer(layer, layers, name):
    """Raise InputError unless `layer` is one of 0 … layers."""
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise InputError(f"the {name} layer must be a whole number, not {layer!r}")
    if not 0 <= layer <= layers:
        raise InputError(f"the {name} layer must be from 0 to {layers}, not {layer}")


class Pass:
    """One forward pass through the decoder, between the parent's door and the last layer's end."""

    def __init__(self, visual, padding):
        self.visual = visual  # (batch, tokens) booleans; None if there is none among them
        self.padding = padding  # (batch, places) booleans or whole numbers, 0 for padding; None if not said
        self.text: Rows | None = None  # None: all rows go on
        self.resting: Rows | None = None  # the visual rows
        self.memo = {}  # masks and angles that the layers of one kind share


class Hooks:
    """The hooks of one context, and the forward pass that each thread is in."""

    def __init__(self, parts, layer, frozen):
        count = len(parts.layers)
        layer = stored(layer) if isinstance(layer, str | pathlib.PurePath) else layer
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
            raise InputError(f"{parts.name} has its visual tokens withdrawn or frozen already; leave that context first")
        self.plan = (self.layer, frozen)
        self.short = sorted({*frozen, *range(self.layer, count)})  # the layers that do not get every token
        self.thread = threading.local()  # .now: the `Pass`; a server may run several threads through one model

    def doors(self):
        """(module, "before" or "behind", hook) of every hook, in the order of a forward pass."""
        if not self.short:
            return
        layers = self.parts.layers
        yield self.parts.parent, "before", self.enter
        yield layers[0], "before", self.start
        for index in self.short:
            yield layers[index], "before", self.rest if index in self.frozen else self.go_on
            if index in self.frozen:
                yield layers[index], "behind", self.wake
        yield layers[-1], "behind", self.finish

    def enter(self, parent, args, kwargs):
        """The parent's door: which tokens are visual."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            raise InputError("visual tokens are recognised by their input_ids; inputs_embeds alone do not say which they are")
        visual, padding = None, kwargs.get("attention_mask")
        if ids.shape[1] > 1:
            visual = torch.isin(ids, torch.tensor(self.parts.visual_ids, device=ids.device))  # (batch, tokens)
            visual = visual if visual.any() else None
        self.thread.now = Pass(visual, padding if torch.is_tensor(padding) and padding.ndim == 2 else None)

    def start(self, layer, args, kwargs):
        """Layer 0's door: what the cache holds, and with it the rows and keys of every kind of layer."""
        now, hidden = self.thread.now, args[0] if args else kwargs["hidden_states"]
        batch, tokens = hidden.shape[:2]
        now.cache_name = "cache" if "cache" in kwargs else "past_key_values"
        now.cache = cache = kwargs.get(now.cache_name)
        self.check(layer, args, kwargs)
        now.past = past = 0
        if cache is not None:
            caches.check(cache)
            caches.prepare(cache, self.short, getattr(self.parts.decoder.config, "layer_types", None))
            now.past = past = int(cache.get_seq_length())
        now.total = past + tokens
        text, frozen = self.before(cache, past, batch, hidden.device)
        if now.visual is None:
            now.held = caches.Held(self.plan, now.total, text.grown(None, past, now.total), frozen.grown(None, past, now.total))
            return
        stays = ~now.visual
        if now.padding is not None:
            stays = stays & now.padding[:, -tokens:].to(stays.device, torch.bool)
        if bool(now.visual[:, -1].any()) or not bool(stays.any(1).all()):
            raise InputError("a prompt must end with text: its last visual token is withdrawn, and nothing is left to answer")
        now.text, now.resting = choose(stays), choose(now.visual)
        frozen = frozen.grown(now.resting, past, now.total).grown(now.text, past, now.total)._replace(ordered=False)
        now.held = caches.Held(self.plan, now.total, text.grown(now.text, past, now.total), frozen)

    def before(self, cache, past, batch, device):
        """The `Keys` that layers from K on, and frozen layers, hold of the `past` tokens before this pass."""
        held = getattr(cache, caches.NOTE, None) if past else None
        if held is None:  # nothing has left yet
            return all_keys(batch, past, device), all_keys(batch, past, device)
        if held.plan != self.plan:
            raise InputError("this cache was made with other layers withdrawn or frozen; go on with it as it was made")
        held = held.cut(past)
        return held.text.spread(batch), held.frozen.spread(batch)

    def check(self, layer, args, kwargs):
        """Raise InputError where a layer is called in a way that is not understood."""
        attention = getattr(self.parts.decoder.config, "_attn_implementation", None)
        flash = "flash" in str(attention)
        if attention not in ("eager", "sdpa") and not flash:
            raise InputError(f"attention of the kind {attention} is not understood; load the model with sdpa or eager")
        if flash and self.frozen:
            raise InputError("flash attention cannot let text before and behind the image read frozen rows; use sdpa or eager")
        if ANGLES not in " ".join(kwargs) or "attention_mask" not in kwargs:
            raise InputError(f"the layers of {self.parts.name} get no {ANGLES} or no attention_mask; they are not understood")
        plain = lambda value: value is None or isinstance(value, bool | int | float | str)
        given = {name: value for name, value in kwargs.items() if not name.startswith(ANGLES) and name not in (*KNOWN, *UNUSED)}
        if strange := [name for name, value in given.items() if not plain(value)] or list(map(str, map(type, args[1:]))):
            raise InputError(f"the layers of {self.parts.name} get {' and '.join(strange)}, which is not understood")
        if layer.training and getattr(layer, "gradient_checkpointing", False):
            raise InputError("gradient checkpointing runs a layer twice, the second time without what left; turn it off")
        self.thread.now.flash = flash

    def go_on(self, layer, args, kwargs):
        """The door of a layer from K on: text alone."""
        now = self.thread.now
        hidden = args[0] if args else kwargs["hidden_states"]
        if now.text is not None and layer is self.parts.layers[self.layer]:
            hidden = take(hidden, now.text)
        return self.narrowed(layer, hidden, args, kwargs, now.held.text)

    def rest(self, layer, args, kwargs):
        """A frozen layer's door: the visual tokens leave their keys and values in the cache, and text goes on."""
        now = self.thread.now
        now.hidden = hidden = args[0] if args else kwargs["hidden_states"]
        if now.text is not None:
            cache = kwargs.get(now.cache_name)
            cache = DynamicCache() if cache is None else cache  # without one, a cache for this layer's call
            kwargs = {**kwargs, now.cache_name: cache}
            angles = self.angles(kwargs[ANGLES], now.resting, "resting")
            keys, values = keys_and_values(layer, take(hidden, now.resting), angles)
            cache.update(keys, values, layer.self_attn.layer_idx)
            hidden = take(hidden, now.text)
        return self.narrowed(layer, hidden, args, kwargs, now.held.frozen)

    def wake(self, layer, args, output):
        """Behind a frozen layer: text as the layer left it among the visual tokens as they came."""
        now = self.thread.now
        if now.text is None:
            return None
        states = output[0] if isinstance(output, tuple) else output
        states = put(now.hidden, now.text, states)
        return (states, *output[1:]) if isinstance(output, tuple) else states

    def finish(self, layer, args, output):
        """Behind the last layer: every row to its place, zeros where a token left; the cache remembers who did."""
        now, self.thread.now = self.thread.now, None
        if now.cache is not None:
            caches.settle(now.cache, self.short, now.total)
            setattr(now.cache, caches.NOTE, now.held)
        states = output[0] if isinstance(output, tuple) else output
        if now.text is None or self.layer == len(self.parts.layers):
            return None
        states = put(states.new_zeros(*now.visual.shape, states.shape[-1]), now.text, states)
        return (states, *output[1:]) if isinstance(output, tuple) else states

    def narrowed(self, layer, hidden, args, kwargs, keys):
        """A layer's arguments for the rows `hidden` and the `Keys` it will read: (args, kwargs), or None to leave them."""
        now = self.thread.now
        cached = caches.length(kwargs.get(now.cache_name), layer.self_attn.layer_idx)
        keys = keys._replace(places=keys.places[:, -(cached + hidden.shape[1]) :])
        mask = self.mask(layer, kwargs["attention_mask"], keys)
        if mask is None and now.text is None:  # a token that is decoded, and nobody is hidden from it
            return None
        changed = {**kwargs, "attention_mask": mask}
        if now.text is not None:
            changed |= {name: self.angles(kwargs[name], now.text, name) for name in kwargs if name.startswith(ANGLES)}
            changed["position_ids"] = None  # flash attention takes a gap in them for the start of another prompt
        if args:
            return (hidden, *args[1:]), changed
        return args, {**changed, "hidden_states": hidden}

    def angles(self, pair, rows, name):
        """cos and sin, (…, batch or 1, tokens, head_dim) each, of some rows; a pass asks for few different ones."""
        memo, key = self.thread.now.memo, (name, id(pair[0]))
        if key not in memo:
            memo[key] = tuple(take(part, rows) for part in pair)
        return memo[key]

    def mask(self, layer, mask, keys):
        """The mask of a layer that is not asked by all tokens, or does not hold all."""
        now, span = self.thread.now, window(layer)
        slides = span is not None and now.total > span
        if now.flash and slides:
            raise InputError(f"flash attention counts the {span} tokens of a sliding window by those left; use sdpa or eager")
        in_order = keys.ordered or now.total - now.past == 1
        if mask is None and keys.whole and in_order and not slides:
            return None  # causal by counting
        key = (id(mask), span, keys.places.shape, keys.ordered)
        if key not in now.memo:
            now.memo[key] = self.made_mask(mask, keys, span)
        return now.memo[key]

    def made_mask(self, mask, keys, span):
        now = self.thread.now
        if mask is not None:
            return narrow_mask(mask, now.text, keys, now.total)
        if now.flash:
            return padding_of(keys)
        asking = torch.arange(now.past, now.total, device=keys.places.device).expand(len(keys.places), -1)
        return causal_mask(asking if now.text is None else asking.gather(1, now.text.index), keys, span)
