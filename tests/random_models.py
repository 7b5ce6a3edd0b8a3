"""Random decoders, encoders and prompts for tests that hold for any weights."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from minivtw.methods.withdrawal import renumber, then, withdraw
from minivtw.model.cache import KVCache
from minivtw.model.decoder import forward, logits
from minivtw.model.layers import LayerNorm, Linear
from minivtw.model.tokens import EmbeddedPrompt, arriving
from minivtw.model.vision import Tower, Vision, VisionConfig, VisionLayer, encode
from minivtw.model.weights import Decoder, DecoderConfig, DecoderLayer


def random_decoder(config, seed=0):
    """Weights large enough that attention is far from uniform and every layer changes what it gets.

    In float64, so that two ways to the same numbers agree to its rounding, in every draw: such layers may let a rounding
    grow a thousandfold, and float32's would then be seen. What the cache stores is float32 either way.
    """
    random = np.random.default_rng(seed)

    def matrix(rows, columns):
        return random.standard_normal((rows, columns)) * 1.5 / np.sqrt(rows)

    def norm():
        return random.uniform(0.5, 1.5, config.width)

    query, qkv = config.heads * config.head_dim, (config.heads + 2 * config.kv_heads) * config.head_dim
    layers = [
        DecoderLayer(
            input_norm=norm(),
            qkv=Linear(matrix(config.width, qkv), matrix(1, qkv)[0] if config.qkv_bias else None),
            output=matrix(query, config.width),
            mlp_norm=norm(),
            gate_up=matrix(config.width, 2 * config.mlp_width),
            down=matrix(config.mlp_width, config.width),
        )
        for _ in range(config.layers)
    ]
    embedding = random.standard_normal((config.vocabulary, config.width))
    head = None if config.tied_head else matrix(config.width, config.vocabulary)
    return Decoder(config, embedding, layers, norm(), head)


@st.composite
def decoders(draw, layers=st.integers(1, 5)):
    """Any small decoder: grouped or plain attention, biases or none, tied or untied head."""
    kv_heads = draw(st.integers(1, 3))
    config = DecoderConfig(
        vocabulary=draw(st.integers(5, 40)),
        width=draw(st.integers(4, 24)),
        layers=draw(layers),
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 6)),
        mlp_width=draw(st.integers(3, 32)),
        rms_norm_eps=1e-5,
        rope_theta=draw(st.sampled_from([1e2, 1e4, 1e6])),
        max_positions=512,
        qkv_bias=draw(st.booleans()),
        tied_head=draw(st.booleans()),
    )
    return random_decoder(config, draw(st.integers(0, 2**32 - 1)))


def random_tower(side, class_token=True, drop_first=True, width=8, seed=0):
    """A `Tower` after a look at one picture of side x side patches: two layers of two heads."""
    random = np.random.default_rng(seed)
    config = VisionConfig(
        image_size=2 * side, patch_size=2, width=width, layers=2, heads=2, mlp_width=12, activation="gelu",
        layer_norm_eps=1e-5, class_token=class_token, pre_norm=False, post_norm=False, feature_layer=-1,
        drop_first=drop_first,
    )  # fmt: skip

    def linear(rows, columns):
        weight = (random.standard_normal((rows, columns)) * 1.5 / np.sqrt(rows)).astype(np.float32)
        return Linear(weight, random.standard_normal(columns).astype(np.float32))

    def layer():
        norm = LayerNorm(np.ones(width, np.float32), np.zeros(width, np.float32))
        parts = linear(width, 3 * width), linear(width, width), norm, linear(width, 12), linear(12, width)
        return VisionLayer(norm, *parts)

    positions = random.standard_normal((config.patches + class_token, width)).astype(np.float32)
    start = positions[0] if class_token else None
    vision = Vision(config, linear(12, width), start, positions, None, [layer(), layer()], None)
    tower = Tower(vision, [])
    encode(vision, random.standard_normal((3, 2 * side, 2 * side)).astype(np.float32), tower=tower)
    return tower


def with_tower(method, tower):
    """The same method, on tokens that know what a vision tower knows."""
    return then(lambda index, tokens: replace(tokens, tower=tower) if index == 0 else tokens, method)


def renumbered(layer):
    """The paper's ablation: the visual tokens leave before a layer, and the others are renumbered from there on."""
    return then(withdraw(layer), renumber(layer))


def random_prompt(decoder, is_visual, seed=0):
    is_visual = np.asarray(is_visual, bool)
    shape = (len(is_visual), decoder.config.width)
    return EmbeddedPrompt(np.random.default_rng(seed).standard_normal(shape), is_visual)


def in_runs(lengths):
    """Runs of text and of visual tokens in turn, and the last token."""
    return [index % 2 == 1 for index, length in enumerate(lengths) for _ in range(length)] + [False]


# Visual tokens in any number of runs, anywhere; the last token is text, as in every prompt that asks something. They are
# the bits of one number or a few lengths: hypothesis takes as long for each element of a list as for the number.
bits = st.integers(2, 2**25 - 1).map(lambda number: [bit == "1" for bit in f"{number:b}"[1:]] + [False])
places = bits | st.lists(st.integers(0, 8), min_size=1, max_size=4).map(in_runs)
one_image = st.tuples(st.integers(0, 6), st.integers(1, 12), st.integers(0, 6)).map(in_runs)
places_with_visual = places.filter(any)


@st.composite
def cases(draw, layers=st.integers(1, 5), places=places):
    """(decoder, prompt, K) with K from 0 to the number of layers."""
    decoder = draw(decoders(layers=layers))
    prompt = random_prompt(decoder, draw(places), draw(st.integers(0, 2**32 - 1)))
    return decoder, prompt, draw(st.integers(0, decoder.config.layers))


class Run(NamedTuple):
    """A prefill: the hidden states that reached the end, their logits, the cache, what every layer did."""

    hidden: np.ndarray  # (remaining tokens, width)
    logits: np.ndarray  # (remaining tokens, vocabulary)
    cache: KVCache
    ran: tuple


def prefill(decoder, prompt, method=None, cache=None, observe=None):
    cache = cache or KVCache(decoder.config)
    tokens = forward(decoder, arriving(prompt, cache), method, observe=observe)
    return Run(tokens.hidden, logits(decoder, tokens.hidden), cache, tokens.ran)


def has_clear_winner(scores):
    """Whether rounding cannot change which logit is the largest; scores: (vocabulary,).

    Two ways to sum differ by what `assert_close` allows, 5e-5 of the largest logit in either. Nearer ties may fall either way.
    """
    second, first = np.sort(scores)[-2:]
    return first - second > 1e-4 * np.abs(scores).max()


def as_stored(array):
    """As the model keeps keys, values and what attention gives: in float32."""
    return array.astype(np.float32)


def assert_close(ours, reference, tolerance=2e-5):
    """Equal to `tolerance` of the largest reference value: float32 sums in another order, nothing more."""
    assert ours.shape == reference.shape
    scale = max(np.abs(reference).max(initial=0), 1e-3)
    error = np.abs(ours - reference).max(initial=0) / scale
    assert error < tolerance, f"relative error {error:.2e}"
