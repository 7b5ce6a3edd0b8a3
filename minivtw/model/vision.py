"""The CLIP-like vision encoder: pixels to one feature vector per patch. CLIP and SigLIP differ only in their config."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..threads import threads_that_fit
from .attention import attention, attention_probabilities, split_heads
from .blocks import by_rows
from .layers import ACTIVATIONS, LayerNorm, Linear, Observe, check_finite, layer_norm, linear, mlp


class VisionConfig(NamedTuple):
    """The sizes and choices of a vision transformer."""

    image_size: int  # pixels per side
    patch_size: int  # pixels per side
    width: int
    layers: int
    heads: int
    mlp_width: int
    activation: str  # a key of layers.ACTIVATIONS
    layer_norm_eps: float
    class_token: bool  # CLIP puts one before the patches, SigLIP does not
    pre_norm: bool  # CLIP norms the embeddings before the first layer
    post_norm: bool  # are the features normed after the last layer?
    feature_layer: int  # which hidden state is the feature: -1 the last layer's, -2 the one before (LLaVA 1.5), …
    drop_first: bool  # LLaVA's `default` selection drops the first token, CLIP's class token; `full` keeps all

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def features(self) -> int:
        """Feature vectors that an image becomes."""
        return self.patches + self.class_token - self.drop_first

    @property
    def used_layers(self) -> int:
        """How many layers the selected feature needs. Hidden state 0 is the embedding, state i layer i's output."""
        return self.feature_layer if self.feature_layer >= 0 else self.layers + 1 + self.feature_layer


class VisionLayer(NamedTuple):
    """The weights of one layer; q, k and v are one matrix (width, 3 * width)."""

    attention_norm: LayerNorm
    qkv: Linear
    output: Linear
    mlp_norm: LayerNorm
    up: Linear
    down: Linear


@dataclass(frozen=True)
class Vision:
    """A vision encoder's config and weights."""

    config: VisionConfig
    patch_embedding: Linear  # (channels * patch_size * patch_size, width): a convolution whose stride is its kernel
    class_embedding: np.ndarray | None  # (width,)
    position_embedding: np.ndarray  # (class token and patches, width)
    pre_norm: LayerNorm | None
    layers: Sequence[VisionLayer]
    post_norm: LayerNorm


class Tower(NamedTuple):
    """What is kept of an encoder's work on a prompt's tiles, for methods that ask where it looked."""

    vision: Vision
    entering: list[np.ndarray]  # what entered the last layer that is used, (tokens, width) per tile


def patchify(pixels: np.ndarray, patch_size: int) -> np.ndarray:
    """Cut an image into patches, row by row. pixels: (channels, height, width).

    Returns (patches, channels * patch_size * patch_size), each patch laid out like a convolution kernel.
    """
    channels, height, width = pixels.shape
    rows, columns, side = height // patch_size, width // patch_size, patch_size
    whole = pixels[:, : rows * side, : columns * side]  # (channels, rows * side, columns * side)
    grid = whole.reshape(channels, rows, side, columns, side)  # (channels, rows, side, columns, side)
    return grid.transpose(1, 3, 0, 2, 4).reshape(rows * columns, channels * side * side)


@by_rows
def after_attention(hidden: np.ndarray, context: np.ndarray, /, layer: VisionLayer, config: VisionConfig) -> np.ndarray:
    """The second half of a layer: attention's context, then the feed-forward, each added to `hidden`.

    hidden, context: (tokens, width). Returns (tokens, width).
    """
    hidden = hidden + linear(context, layer.output)  # (tokens, width)
    normed = layer_norm(hidden, layer.mlp_norm, config.layer_norm_eps)  # (tokens, width)
    return hidden + mlp(normed, layer.up, layer.down, ACTIVATIONS[config.activation])


def vision_layer(hidden: np.ndarray, layer: VisionLayer, config: VisionConfig, observe: Observe = None) -> np.ndarray:
    """One pre-norm layer with bidirectional attention. hidden: (tokens, width). Returns the new hidden (tokens, width).

    `observe("attention", probabilities)` gets (heads, tokens, tokens), which are made for it alone.
    """
    normed = layer_norm(hidden, layer.attention_norm, config.layer_norm_eps)
    qkv = split_heads(linear(normed, layer.qkv), 3 * config.heads)  # (3 * heads, tokens, head_dim)
    queries, keys, values = qkv.reshape(3, config.heads, *qkv.shape[1:])  # (heads, tokens, head_dim)
    if observe:
        observe("attention", attention_probabilities(queries, keys))
    return after_attention(hidden, attention(queries, keys, values), layer, config)


@np.errstate(all="ignore")  # as in `decoder_layer`
def encode(vision: Vision, pixels: np.ndarray, observe: Observe = None, tower: Tower | None = None) -> np.ndarray:
    """Pixels to features (Radford et al. 2021; Dosovitskiy et al. 2021).

    pixels: (channels, image_size, image_size) float32, normalised. `observe(name, array)` sees every layer; `tower`
    remembers what enters the last one. Returns (features, width) float32.
    """
    config, show = vision.config, observe or (lambda name, array: None)
    with threads_that_fit(config.patches, config.width, config.mlp_width):
        hidden = linear(patchify(pixels, config.patch_size), vision.patch_embedding)  # (patches, width)
        if vision.class_embedding is not None:
            hidden = np.concatenate([vision.class_embedding[None], hidden])  # (1 + patches, width)
        hidden = hidden + vision.position_embedding
        if vision.pre_norm is not None:
            hidden = layer_norm(hidden, vision.pre_norm, config.layer_norm_eps)
        show("vision.embeddings", hidden)

        for index in range(config.used_layers):
            seen = observe and (lambda name, array: observe(f"vision.layers.{index}.{name}", array))
            if tower and index == config.used_layers - 1:
                tower.entering.append(hidden)
            hidden = vision_layer(hidden, vision.layers[index], config, seen)
            check_finite(hidden, f"layer {index} of the vision tower")
            show(f"vision.layers.{index}.hidden", hidden)

    if config.post_norm:
        hidden = layer_norm(hidden, vision.post_norm, config.layer_norm_eps)
    if config.drop_first:
        hidden = hidden[1:]  # (features, width)
    show("vision.features", hidden)
    return hidden
