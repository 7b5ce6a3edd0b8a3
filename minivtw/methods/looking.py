"""What a method may ask of the tokens it is given, beyond where they looked; the FLOPs are counted."""

import math

import numpy as np

from ..errors import InputError
from ..model.attention import attention_probabilities, rotary, rotate, split_heads
from ..model.connector import pixel_shuffle
from ..model.layers import layer_norm, linear, rms_norm
from ..model.tokens import Tokens
from ..model.vision import Tower


def keep_best(tokens: Tokens, scores: np.ndarray, count: int) -> Tokens:
    """The `count` visual tokens with the highest scores stay, and all text.

    scores: (tokens,), those of text do not matter. At a tie the earlier token stays.
    """
    visual = np.flatnonzero(tokens.is_visual)  # (visual,)
    ranked = visual[np.argsort(-scores[visual], kind="stable")]  # (visual,)
    stays = np.ones(len(tokens), bool)
    stays[ranked[max(count, 0) :]] = False
    return tokens[stays]


def text_after_image(tokens: Tokens) -> np.ndarray:
    """The indices of the text tokens after the first visual one."""
    return np.flatnonzero(~tokens.is_visual & (np.cumsum(tokens.is_visual) > 0))


def coming_attention(tokens: Tokens, rows: np.ndarray | list[int]) -> np.ndarray:
    """Where tokens would look in the layer to come, if all of them went on; rows: their indices, in any order.

    Returns probabilities (heads, rows, tokens). Raises InputError before layer 0.
    """
    previous = tokens.previous_layer("attention")
    index, config, before = previous.index + 1, previous.decoder.config, tokens.cache[previous.index + 1]
    weights = previous.decoder.layers[index]
    query, key_value = config.heads * config.head_dim, config.kv_heads * config.head_dim
    normed = rms_norm(tokens.hidden, weights.input_norm, config.rms_norm_eps)
    keys = split_heads(linear(normed, weights.qkv.columns(query, query + key_value)), config.kv_heads)
    keys = rotate(keys, *rotary(tokens.rotary_positions, config.head_dim, config.rope_theta))
    tokens.extra_flops.append(2 * len(tokens) * config.width * key_value)
    if len(before):
        keys = np.concatenate([before.keys, keys], axis=1)
    looks = tokens.attention_to(tokens, rows, index, keys, len(before) + 1 + np.arange(len(tokens))[rows])
    return looks[:, :, len(before) :]


def normed(tokens: Tokens) -> np.ndarray:
    """The tokens' states as the head would get them, after the decoder's last norm: (tokens, width)."""
    decoder = tokens.previous_layer("states").decoder
    return rms_norm(tokens.hidden, decoder.norm, decoder.config.rms_norm_eps)


def product(tokens: Tokens, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """left @ right, counted as what a method asked for."""
    result = left @ right  # (rows, columns)
    tokens.extra_flops.append(2 * result.size * left.shape[-1])
    return result


def known_tower(tokens: Tokens) -> Tower:
    """The vision tower that has looked at each of the visual tokens. Raises InputError where there is none."""
    has_gaps = len(tokens) <= tokens.positions[-1] - tokens.positions[0]
    if tokens.tower is None or has_gaps:
        raise InputError(
            "this method asks what the vision tower knows of each visual token; that is not known here, but only "
            "where they are its patches, without line ends, and no other method has chosen among them"
        )
    return tokens.tower


def tower_looks(tokens: Tokens) -> tuple[np.ndarray, np.ndarray]:
    """How much the vision tower's last layer looked at each visual token, (visual tokens,), and their keys there,
    (visual tokens, channels). Raises InputError where there is no tower that has looked at each of them.
    """
    looks, keys, flops = last_look(known_tower(tokens), int(tokens.is_visual.sum()))
    tokens.extra_flops.append(flops)
    return looks, keys


def last_look(tower: Tower, visual: int) -> tuple[np.ndarray, np.ndarray, int]:
    """How much each of a prompt's `visual` tokens was looked at in the last layer that is used, and its key there.

    By the class token or, without one, by all patches: (visual,), mean over heads. Keys: (visual, channels), mean
    over heads; where the connector joins patches, theirs side by side. Returns both, and the FLOPs that they took.
    """
    config, layer = tower.vision.config, tower.vision.layers[tower.vision.config.used_layers - 1]
    factor = math.isqrt(config.features * len(tower.entering) // visual)  # a visual token is factor x factor patches
    looks, keys, flops = [], [], 0
    for hidden in tower.entering:
        normed = layer_norm(hidden, layer.attention_norm, config.layer_norm_eps)
        asking = normed[: 1 if config.class_token else None]  # (asking, width)
        queries = split_heads(linear(asking, layer.qkv.columns(0, config.width)), config.heads)
        tile_keys = split_heads(linear(normed, layer.qkv.columns(config.width, 2 * config.width)), config.heads)
        probabilities = attention_probabilities(queries, tile_keys)  # (heads, asking, tokens)
        flops += 2 * config.width * (config.width * (len(asking) + len(normed)) + len(asking) * len(normed))
        looks.append(joined(probabilities.mean((0, 1))[int(config.drop_first) :, None], factor).mean(1))
        keys.append(joined(tile_keys.mean(0)[int(config.drop_first) :], factor))
    return np.concatenate(looks), np.concatenate(keys), flops


def joined(features: np.ndarray, factor: int) -> np.ndarray:
    """Features as the connector joins them to visual tokens, side by side."""
    return features if factor == 1 else pixel_shuffle(features, factor)
