"""A method tried on a short prompt before it is trusted: by hooks, and by masks that mean the same.

By masks every token passes every layer and stays in every cache, but from layer K on no row of text may see a visual
column, and a frozen layer gives its visual rows back as they came. That needs none of what the hooks do. Embeddings of
random tokens stand for text and image; a prompt and one token after it pass the decoder, four times in all, which takes
as long as eighty tokens of a prompt, once for a model and a kind of method.
"""

import contextlib
import inspect
import weakref
from collections.abc import Iterator
from typing import Any

import torch

from ..errors import InputError
from . import caches
from .calls import hidden_states, replaced, sees_later_tokens
from .hooks import Hooks, on
from .passes import Pass

TOKENS = 20  # of the prompt, with the one token after it
PLACES = slice(5, 13)  # which of them stand for an image
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}  # of a row's norm
TRIED: Any = weakref.WeakKeyDictionary()  # decoder -> the kinds of methods that were tried on it


@torch.no_grad()
def try_out(hooks: Hooks) -> None:
    """Raise InputError unless hooks and masks agree. A decoder that wants more than embeddings cannot be tried."""
    decoder, name = hooks.parts.decoder, hooks.parts.name
    attention = str(decoder.config._attn_implementation)
    kind = (attention, next(decoder.parameters()).dtype, hooks.frozen)
    if kind in TRIED.setdefault(decoder, set()) or not hooks.short or "flash" in attention:
        return
    training = [module for module in decoder.modules() if module.training]
    for module in training:
        module.training = False  # dropout would differ from pass to pass
    try:
        try:
            embedded = embeddings(decoder)
            plain = states(hooks, embedded)
            with masked(hooks, attention, len(hooks.parts.layers), ()):
                same = states(hooks, embedded)
            with masked(hooks, attention, hooks.layer, hooks.frozen):
                expected = states(hooks, embedded)
        except (TypeError, ValueError, RuntimeError, AttributeError, LookupError):
            return
        try:
            with on(hooks):
                found = states(hooks, embedded, hooked=True)
        except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{name} is not understood, for its layers fail without some rows: {error}") from error
    finally:
        hooks.thread.now, hooks.called = None, False
        hooks.told.clear()
        for module in training:
            module.training = True
    allowed = TOLERANCE.get(torch.bfloat16 if torch.is_autocast_enabled(embedded.device.type) else embedded.dtype, 1e-1)
    for ours, theirs, what in ((same, plain, "masks"), (found, expected, "hooks")):
        if not (differs := distance(ours, theirs)) <= allowed:
            raise InputError(
                f"{name} is not understood: on a short prompt, what {what} make of its layers differs by {differs:.1e} of "
                f"a state's norm from what it should be, more than {allowed:.0e}; check=False skips this trial"
            )
    TRIED[decoder].add(kind)


def embeddings(decoder: Any) -> torch.Tensor:
    """Of random tokens, always the same: (1, tokens, width)."""
    weight = decoder.embed_tokens.weight
    ids = torch.randint(2, len(weight), (1, TOKENS), generator=torch.Generator().manual_seed(0))
    return decoder.embed_tokens(ids if weight.is_meta else ids.to(weight.device))  # meta: offloaded, and moved there


def states(hooks: Hooks, embedded: torch.Tensor, hooked: bool = False) -> torch.Tensor:
    """What the decoder makes of the text of a prompt and of one token after it: (text tokens, width)."""
    decoder = hooks.parts.decoder
    name = "cache" if "cache" in inspect.signature(decoder.forward).parameters else "past_key_values"
    visual = torch.zeros(1, TOKENS - 1, dtype=torch.bool, device=embedded.device)
    visual[:, PLACES] = True
    hooks.thread.now = Pass(visual, None) if hooked else None
    prompt = decoder(inputs_embeds=embedded[:, :-1], use_cache=True)
    hooks.thread.now = Pass(None, None) if hooked else None
    last = decoder(inputs_embeds=embedded[:, -1:], use_cache=True, **{name: prompt[name]})
    return torch.cat([prompt[0][~visual], last[0][0]]).float()


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The median over rows, for an expert's choice may tip; each relative to the row's norm."""
    return float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).median())


@contextlib.contextmanager
def masked(hooks: Hooks, attention: str, until: int, frozen: tuple) -> Iterator[None]:
    """From layer `until` on, text may not see the image; in `frozen` layers visual rows come out as they came."""

    indices = {layer: index for index, layer in enumerate(hooks.parts.layers)}

    def forbid(layer: Any, args: tuple, kwargs: dict) -> tuple:
        rows, mask = hidden_states(args, kwargs).shape[1], kwargs["attention_mask"]
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        total = rows if rows > 1 else TOKENS
        if mask is None:
            keys = caches.length(cache, layer.self_attn.layer_idx) + rows
            mask = torch.ones(1, 1, rows, keys, dtype=torch.bool, device=hidden_states(args, kwargs).device)
            mask = mask if sees_later_tokens(layer, attention) else mask.tril(keys - rows)
        if indices[layer] >= until:
            places = torch.arange(TOKENS, device=mask.device)
            image = (places >= PLACES.start) & (places < PLACES.stop)
            hidden = ~image[total - rows : total, None] & image[total - mask.shape[-1] : total]
            mask = mask.masked_fill(hidden, False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)
        return args, {**kwargs, "attention_mask": mask}

    def unchanged(layer: Any, args: tuple, kwargs: dict, output: Any) -> Any:
        came = hidden_states(args, kwargs)
        if came.shape[1] == 1:
            return None
        keep = lambda made: torch.cat([made[:, : PLACES.start], came[:, PLACES], made[:, PLACES.stop :]], 1)
        return replaced(output, keep)

    with contextlib.ExitStack() as handles:
        for index, layer in enumerate(hooks.parts.layers):
            handles.callback(layer.register_forward_pre_hook(forbid, with_kwargs=True).remove)
            if index in frozen:
                handles.callback(layer.register_forward_hook(unchanged, with_kwargs=True).remove)
        yield
