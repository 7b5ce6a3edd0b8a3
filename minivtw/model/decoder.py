"""The decoder: a stack of Llama layers, and in its loop the one place where a method says which tokens go on."""

from dataclasses import replace

import numpy as np

from ..threads import one_blas_thread, threads_that_fit
from .attention import attention, attention_probabilities, rotary, rotate, split_heads
from .blocks import by_rows
from .layers import Linear, Observe, check_finite, linear, rms_norm, swiglu
from .tokens import LayerCount, Method, PreviousLayer, Tokens
from .weights import Decoder, DecoderConfig, DecoderLayer


def project(tokens: Tokens, rows: np.ndarray | None, layer: DecoderLayer, config: DecoderConfig) -> list[np.ndarray]:
    """Queries of the rows that are worked on, (heads, rows, head_dim); keys, values of all, (kv_heads, tokens, head_dim)."""
    heads, kv_heads, query, qkv = config.heads, config.kv_heads, config.heads * config.head_dim, layer.qkv
    normed = rms_norm(tokens.hidden, layer.input_norm, config.rms_norm_eps)
    turns = rotary(tokens.rotary_positions, config.head_dim, config.rope_theta)
    if rows is None:
        together = split_heads(linear(normed, qkv), heads + 2 * kv_heads)  # (heads + 2 * kv_heads, tokens, head_dim)
        turned = rotate(together[:-kv_heads], *turns)  # (heads + kv_heads, tokens, head_dim)
        return [turned[:heads], turned[heads:], together[-kv_heads:]]
    queries = split_heads(linear(normed[rows], qkv.columns(0, query)), heads)  # (heads, rows, head_dim)
    together = split_heads(linear(normed, qkv.columns(query, None)), 2 * kv_heads)  # (2 * kv_heads, tokens, head_dim)
    return [rotate(queries, *turns[:, rows]), rotate(together[:kv_heads], *turns), together[kv_heads:]]


@by_rows
def after_attention(hidden: np.ndarray, context: np.ndarray, /, layer: DecoderLayer, eps: float) -> np.ndarray:
    """The second half of a layer: attention's context, then the feed-forward, each added to `hidden`.

    hidden: (tokens, width); context: (tokens, heads * head_dim). Returns (tokens, width).
    """
    hidden = hidden + linear(context, Linear(layer.output))  # (tokens, width)
    normed = rms_norm(hidden, layer.mlp_norm, eps)  # (tokens, width)
    return hidden + swiglu(normed, layer.gate_up, layer.down)


@np.errstate(all="ignore")  # some BLAS builds warn of nothing; what is not finite is found where a layer ends
def decoder_layer(decoder: Decoder, index: int, tokens: Tokens, observe: Observe = None) -> Tokens:
    """One pre-norm layer: attention over the cache and the tokens, then the feed-forward, each added to `hidden`.

    The layer's cache gains the keys and values of all `tokens`; those that are not worked on do nothing else here, and
    go on as they came, or changed as the tokens that they follow. `observe(name, array)` sees the attention
    probabilities (heads, worked, cached), made for it alone, and the hidden states. Returns `Tokens`.
    """
    config, layer, cache = decoder.config, decoder.layers[index], tokens.cache[index]
    rows = None if tokens.works is None else np.flatnonzero(tokens.works)  # (worked,)
    worked = slice(None) if rows is None else rows

    queries, keys, values = project(tokens, rows, layer, config)
    keys, values = cache.append(keys, values, tokens.positions)  # (kv_heads, cached, head_dim)
    sees = np.arange(len(cache) - len(tokens), len(cache))[worked] + 1  # (worked,) up to itself
    context = attention(queries, keys, values, sees)  # (worked, heads * head_dim)
    hidden = after_attention(tokens.hidden[worked], context, layer, config.rms_norm_eps)  # (worked, width)
    ran = (*tokens.ran, LayerCount(len(tokens), len(hidden), len(cache), sum(tokens.extra_flops)))
    if rows is not None:  # the others go on as they came, or changed as those that they follow
        everyone = tokens.hidden.copy()  # (tokens, width)
        everyone[rows], hidden = hidden, everyone
        changes = hidden - tokens.hidden if tokens.followed else hidden  # (tokens, width)
        for group in tokens.followed:
            followers = np.searchsorted(tokens.positions, group.followers)  # (followers,)
            leaders = np.searchsorted(tokens.positions, group.leaders)  # (leaders,)
            with one_blas_thread():
                hidden[followers] += group.shares @ changes[leaders]
    if observe:
        observe("attention", attention_probabilities(queries, keys, sees))
        observe("hidden", hidden)
    previous = PreviousLayer(decoder, index, tokens)
    return replace(tokens, hidden=hidden, works=None, followed=(), previous=previous, ran=ran, extra_flops=[])


def forward(
    decoder: Decoder,
    tokens: Tokens,
    method: Method | None = None,
    start: int = 0,
    stop: int | None = None,
    observe: Observe = None,
) -> Tokens:
    """Carry tokens through the layers. Prefill and decode are this one function, with many tokens or with one.

    tokens: `Tokens`, which every layer appends to its cache: a second call with the same ones appends them again.
    `method(index, tokens)` says before every layer which tokens go on from there, and which of them the layer works on
    (`methods/withdrawal.py`); None: all, everywhere. `start` and `stop` run a part of the stack. `observe(name, array)`
    sees each layer's attention probabilities and hidden states. Returns the `Tokens` that reached the end.
    """
    with threads_that_fit(len(tokens), decoder.config.width, decoder.config.mlp_width):
        for index in range(start, len(decoder.layers) if stop is None else stop):
            seen = observe and (lambda name, array: observe(f"decoder.layers.{index}.{name}", array))
            if method:  # such as Visual Tokens Withdrawal
                tokens = method(index, tokens)
            tokens = decoder_layer(decoder, index, tokens, seen)
            check_finite(tokens.hidden, f"layer {index} of the decoder")
    return tokens


@np.errstate(all="ignore")
def logits(decoder: Decoder, hidden: np.ndarray) -> np.ndarray:
    """Final norm and head. hidden: (tokens, width). Returns (tokens, vocabulary)."""
    head = decoder.embedding.T if decoder.head is None else decoder.head  # (width, vocabulary)
    with threads_that_fit(len(hidden), *head.shape):
        return check_finite(rms_norm(hidden, decoder.norm, decoder.config.rms_norm_eps) @ head, "the decoder's head")
