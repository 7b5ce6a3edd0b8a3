"""What withdrawal must mean, by masks: every token passes every layer, and from K on text may not see visual ones."""

import contextlib

import torch

from .models import IMAGE, UNSPOKEN, layers_of


@contextlib.contextmanager
def forbidden(model, layer, frozen=()):
    """From `layer` on, no row of text attends to a visual token; in `frozen` layers, visual rows come out as they came.

    For passes over whole prompts, without a cache.
    """
    visual = None  # (batch, tokens)

    def mark(module, args, kwargs):
        nonlocal visual
        visual = kwargs["input_ids"] == IMAGE

    def forbid(module, args, kwargs):
        mask, tokens = kwargs["attention_mask"], visual.shape[1]
        if mask is None:
            mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool)
            mask = mask.tril() if getattr(module.self_attn, "is_causal", True) else mask
        hidden = visual[:, None, None, :] & ~visual[:, None, :, None]
        lowest = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return args, {**kwargs, "attention_mask": mask.expand(len(visual), -1, -1, -1).masked_fill(hidden, lowest)}

    def unchanged(module, args, kwargs, output):
        came = args[0] if args else kwargs["hidden_states"]
        made = output[0] if isinstance(output, tuple) else output
        made = torch.where(visual[..., None], came, made)
        return (made, *output[1:]) if isinstance(output, tuple) else made

    handles = [model.register_forward_pre_hook(mark, with_kwargs=True)]
    for index, module in enumerate(layers_of(model)):
        if index >= layer:
            handles.append(module.register_forward_pre_hook(forbid, with_kwargs=True))
        if index in frozen:
            handles.append(module.register_forward_hook(unchanged, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def logits(model, inputs, layer, frozen=()):
    """(batch, tokens, vocabulary) of a whole prompt, no cache."""
    with forbidden(model, layer, frozen):
        return model(**inputs, use_cache=False).logits


def grown(inputs, said):
    """The prompt with the tokens said so far behind it."""
    tail = torch.ones_like(said)
    longer = {
        "input_ids": torch.cat([inputs["input_ids"], said], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], tail], 1),
    }
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            is_prefix = (
                name == "token_type_ids" and not (inputs[name] == 1).any()
            )  # PaliGemma: 0 is the prompt, 1 the answer
            longer[name] = torch.cat([inputs[name], tail if is_prefix else 0 * tail], 1)
    return {**inputs, **longer}


def greedy(model, inputs, layer, frozen=(), tokens=6):
    """The likeliest tokens one after the other, each from a whole pass without a cache. (batch, tokens)"""
    said = inputs["input_ids"][:, :0]
    for _ in range(tokens):
        last = logits(model, grown(inputs, said), layer, frozen)[:, -1]
        last[:, UNSPOKEN] = -torch.inf
        said = torch.cat([said, last.argmax(-1, keepdim=True)], 1)
    return said
