"""How many operations and bytes a decoder takes, counted from what its layers did.

Every layer notes what it did (`model.tokens.LayerCount`): how many tokens entered, how many of them it worked on, how many its
cache held afterwards. So one formula serves every method. A matrix product (n, i) @ (i, o) is n * i * o multiplications
and as many additions, 2 n i o FLOPs. With n tokens entering, t of them worked on and m in the cache, a layer computes

    queries       (t, width) @ (width, heads head_dim)
    keys, values  (n, width) @ (width, 2 kv_heads head_dim)
    scores        per head (t, head_dim) @ (head_dim, m)
    context       per head (t, m) @ (m, head_dim)
    output        (t, heads head_dim) @ (heads head_dim, width)
    gate, up      (t, width) @ (width, 2 mlp_width)
    down          (t, mlp_width) @ (mlp_width, width)

and the head turns the last token alone into logits. What a method asks for before a layer, such as where tokens look,
is counted where it is computed (`model.tokens.Tokens`). Norms, rotations and softmax are left out: they grow with n width,
not with n width^2. Scores are counted in full, masked or not, as the papers do: where a prompt is longer than a block of
queries, `attention` skips what a whole block cannot see. A test compares this with the matrix products that really happen,
on prompts of one block.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from .checkpoints.hub import model_name
from .methods.text import spec_of, withdrawal_layer
from .model.decoder import DecoderConfig
from .model.tokens import LayerCount
from .model.vision import VisionConfig


def layer_flops(config: DecoderConfig, ran: LayerCount) -> int:
    """What one layer computed, with what a method asked for before it."""
    width, query, key_value = config.width, config.heads * config.head_dim, config.kv_heads * config.head_dim
    per_token = 2 * query * width + 3 * width * config.mlp_width + 2 * ran.cached * query  # multiplications
    return 2 * ran.worked * per_token + 2 * ran.entered * width * 2 * key_value + ran.extra_flops


def together(first: LayerCount, second: LayerCount) -> LayerCount:
    """A layer's work on tokens that came in two passes, counted as if they had come in one."""
    return LayerCount(
        first.entered + second.entered,
        first.worked + second.worked,
        second.cached,
        first.extra_flops + second.extra_flops,
    )


def prompt_flops(config: DecoderConfig, ran: Sequence[LayerCount]) -> int:
    """The layers that `ran`, and the logits of the last token."""
    return sum(layer_flops(config, one) for one in ran) + 2 * config.width * config.vocabulary


def vision_flops(config: VisionConfig) -> int:
    """The vision tower on one tile, up to the features; a vision layer is a decoder layer without a gate."""
    tokens = config.patches + config.class_token
    layer = 4 * config.width**2 + 2 * config.width * config.mlp_width + 2 * tokens * config.width
    embedding = config.patches * 3 * config.patch_size**2 * config.width
    return 2 * (embedding + config.used_layers * tokens * layer)


def plain_run(config: DecoderConfig, tokens: int, before: int = 0) -> list[LayerCount]:
    """What the layers do without a method, for `tokens` after the `before` that every cache holds."""
    return [LayerCount(tokens, tokens, before + tokens, 0)] * config.layers


def cache_bytes(config: DecoderConfig, tokens_per_layer: Iterable[int]) -> int:
    """Keys and values in float32."""
    return sum(2 * 4 * config.kv_heads * config.head_dim * tokens for tokens in tokens_per_layer)


def turn_stats(
    chat: Any,
    is_visual: np.ndarray,
    start: int,
    prefilled: Sequence[LayerCount],
    decoded: list[Sequence[LayerCount]],
    generated: int,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """What a turn of a `Chat` took after the `start` tokens that came before: `Answer.stats`.

    is_visual: (tokens,) booleans, of the prompt; prefilled: what each layer did with it; decoded: the same for each token
    that was fed back; generated: tokens of the answer; seconds: of each phase. Where the turn began with an image that
    had been seen, that is counted as if this turn had done it, and told once more as what was reused.
    """
    config, cache, reused = chat.vlm.config, chat.cache, {}
    if chat.seen and start == len(chat.seen.token_ids):
        reused = {"reused": {"tokens": start, "flops": sum(layer_flops(config, one) for one in chat.seen.ran)}}
        prefilled = [together(*pair) for pair in zip(chat.seen.ran, prefilled)]
        is_visual, start = np.concatenate([chat.seen.is_visual, is_visual]), 0
    tokens, visual = len(is_visual), int(is_visual.sum())
    has_seen = visual or cache.next_position > min(cache.tokens_per_layer)  # in this turn or before
    return {
        "model": model_name(chat.vlm.folder),
        "layers": config.layers,
        "method": spec_of(chat.method),
        "withdraw_layer": withdrawal_layer(chat.method) if has_seen else None,
        "tokens": {"visual": visual, "text": tokens - visual, "generated": generated},
        **reused,
        "prefill": {"entered": [ran.entered for ran in prefilled], "worked": [ran.worked for ran in prefilled]},
        "cache": {
            "tokens_per_layer": cache.tokens_per_layer,
            "bytes": cache.nbytes,
            "bytes_without_withdrawal": cache_bytes(config, [cache.next_position] * config.layers),
        },
        "flops": {
            "prefill": prompt_flops(config, prefilled),
            "prefill_without_withdrawal": prompt_flops(config, plain_run(config, tokens, start)),
            "decode": sum(prompt_flops(config, ran) for ran in decoded),
        },
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
    }
