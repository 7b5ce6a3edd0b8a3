"""Each piece against its definition, computed in float64 or by the C library."""

import contextlib
import math
import tracemalloc
import types
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from minivtw.model import attention as attention_module
from minivtw.model import blocks, layers
from minivtw.model.attention import attention, attention_probabilities, rotary, rotate
from minivtw.model.decoder import after_attention
from minivtw.model.layers import LayerNorm, Linear
from minivtw.model.vision import VisionLayer
from minivtw.model.vision import after_attention as after_tower_attention
from minivtw.model.weights import DecoderLayer
from tests.random_models import assert_close

reals = st.floats(-30, 30, width=32)
matrices = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9), elements=reals)


@contextlib.contextmanager
def small_blocks():
    """Blocks of a few rows, so that a few rows fill many."""
    with (
        mock.patch.object(blocks, "MOST_ROWS", 4),
        mock.patch.object(blocks, "LEAST_ROWS", 2),
        mock.patch.object(attention_module, "MOST_QUERIES", 4),
    ):
        yield


def test_erf_is_exact_to_float32():
    x = np.concatenate([np.linspace(-6, 6, 200_001), [0.0, -0.0, 1e-30, 50, -50]]).astype(np.float32)
    exact = np.array([math.erf(value) for value in x.tolist()])
    rounding = np.spacing(np.abs(exact).astype(np.float32)) / 2
    assert np.all(np.abs(layers.erf(x) - exact) <= 3e-8 + rounding)


@pytest.mark.parametrize(
    "name, exact",
    [
        ("quick_gelu", lambda x: x / (1 + math.exp(-1.702 * x))),
        ("gelu_pytorch_tanh", lambda x: x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
        ("gelu", lambda x: x / 2 * (1 + math.erf(x / math.sqrt(2)))),
        ("silu", lambda x: x / (1 + math.exp(-x))),
    ],
)
def test_activations_are_their_formulas(name, exact):
    x = np.linspace(-12, 12, 10_001).astype(np.float32)
    ours = layers.ACTIVATIONS[name](x)
    assert ours.dtype == np.float32
    error = np.abs(ours - [exact(value) for value in x.tolist()])
    assert np.all(error <= 1.5e-7 * (1 + np.abs(x)))  # a float32 rounding or two


@pytest.mark.parametrize("name", layers.ACTIVATIONS)
def test_activations_do_not_overflow(name):
    with np.errstate(over="raise", invalid="raise"):
        ends = layers.ACTIVATIONS[name](np.float32([-1e4, 1e4]))
    assert ends[0] == 0 and ends[1] == 1e4


@given(matrices)
def test_softmax_rows_are_distributions(scores):
    probabilities = layers.softmax(scores)
    assert np.all(probabilities >= 0)
    assert np.abs(probabilities.sum(axis=-1) - 1).max() < 1e-6
    exact = np.exp(scores.astype(np.float64))
    assert np.abs(probabilities - exact / exact.sum(axis=-1, keepdims=True)).max() < 2e-6


def test_softmax_gives_nothing_to_what_is_masked_and_stands_large_scores():
    assert np.array_equal(layers.softmax(np.float32([[1e4, -np.inf, 1e4]])), np.float32([[0.5, 0, 0.5]]))


@given(matrices, st.integers(0, 99))
def test_norms_are_their_formulas(x, seed):
    random = np.random.default_rng(seed)
    weight, bias = random.standard_normal((2, x.shape[1])).astype(np.float32)
    exact = x.astype(np.float64)
    rms = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-5) * weight
    assert np.abs(layers.rms_norm(x, weight, 1e-5) - rms).max() < 1e-5
    normed = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-2) * weight + bias
    assert np.abs(layers.layer_norm(x, LayerNorm(weight, bias), 1e-2) - normed).max() < 1e-3


@given(st.integers(0, 300), st.integers(0, 300), st.integers(0, 300))
def test_rotary_scores_depend_on_the_distance_alone(first, second, shift):
    random = np.random.default_rng(first)
    query, key = random.standard_normal((2, 1, 1, 16)).astype(np.float32)

    def score(i, j):
        rotated = rotate(query, *rotary(np.array([i]), 16, 1e4)), rotate(key, *rotary(np.array([j]), 16, 1e4))
        return float((rotated[0] @ rotated[1].swapaxes(-1, -2)).item())

    assert abs(score(first, second) - score(first + shift, second + shift)) < 2e-3


def test_rotary_pairs_channel_i_with_i_plus_half():
    x = np.zeros((1, 1, 8), np.float32)
    x[0, 0, 1] = 1
    rotated = rotate(x, *rotary(np.array([3]), 8, 1e4))[0, 0]
    angle = 3 * 1e4 ** (-2 / 8)
    expected = np.zeros(8)
    expected[1], expected[5] = math.cos(angle), math.sin(angle)
    assert np.abs(rotated - expected).max() < 1e-6


@st.composite
def sights(draw):
    """(kv_heads, heads a key head, keys, what each query sees): all keys, those up to itself, or any that ascend."""
    keys = draw(st.integers(1, 24))
    some = st.lists(st.integers(1, keys), min_size=1, max_size=24).map(sorted)
    last = st.integers(1, keys).map(lambda new: list(range(keys - new + 1, keys + 1)))
    return draw(st.integers(1, 3)), draw(st.integers(1, 3)), keys, draw(st.one_of(some, last))


@given(sights(), st.booleans(), st.integers(0, 99))
def test_attention_equals_repeating_the_keys(case, sees_all, seed):
    """The plain way: each query head on its own, over a copy of its group's keys and values, in float64."""
    kv_heads, group, tokens, sees = case
    random, sees, new = np.random.default_rng(seed), np.array(sees), len(sees)
    queries = random.standard_normal((kv_heads * group, new, 4)).astype(np.float32) * 2
    keys, values = random.standard_normal((2, kv_heads, tokens, 4)).astype(np.float32)
    given_sees, visible = (None, tokens) if sees_all else (sees, sees[:, None])
    probabilities = attention_probabilities(queries, keys, given_sees)
    with small_blocks():
        context = attention(queries, keys, values, given_sees)
    assert context.shape == (new, kv_heads * group * 4)
    for head, query in enumerate(queries.astype(np.float64)):
        scores = np.where(np.arange(tokens) < visible, np.exp(query @ keys[head // group].T / 2.0), 0)
        plain = scores / scores.sum(axis=1, keepdims=True)
        assert np.abs(probabilities[head] - plain).max() < 2e-6
        assert np.abs(context[:, head * 4 : head * 4 + 4] - plain @ values[head // group]).max() < 1e-5


def test_attention_of_no_tokens_is_empty():
    none = np.empty((2, 0, 4), np.float32)
    assert attention(none, none, none).shape == (0, 8)


def test_attention_holds_no_score_matrix_and_stands_large_scores():
    """Scores of 1e4 would overflow an exponential; a (heads, new, tokens) array of 4096 tokens would be 134 MB."""
    random = np.random.default_rng(0)
    queries, keys, values = random.standard_normal((3, 2, 4096, 8)).astype(np.float32)
    tracemalloc.start()
    context = attention(100 * queries, 100 * keys, values, np.arange(1, 4097))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.isfinite(context).all()
    assert peak < 40e6


@given(st.integers(1, 40), st.sampled_from(["linear", "mlp", "decoder", "vision"]), st.integers(0, 99))
def test_blocks_of_rows_compute_what_all_rows_together_do(rows, name, seed):
    random = np.random.default_rng(seed)
    array = lambda *shape: random.standard_normal(shape).astype(np.float32)
    up, down, norm = Linear(array(6, 10), array(10)), Linear(array(10, 6), array(6)), LayerNorm(array(6), array(6))
    vision = VisionLayer(norm, None, Linear(array(4, 6), array(6)), norm, up, down)
    decoder = DecoderLayer(array(6), None, array(4, 6), array(6), array(6, 20), array(10, 6))
    config = types.SimpleNamespace(layer_norm_eps=1e-5, activation="gelu_pytorch_tanh")
    function, arguments = {
        "linear": (layers.linear, (up,)),
        "mlp": (layers.mlp, (up, down, layers.gelu_tanh)),
        "decoder": (after_attention, (array(rows, 4), decoder, 1e-5)),
        "vision": (after_tower_attention, (array(rows, 4), vision, config)),
    }[name]
    x = array(rows, 6)
    together = function.__wrapped__(x, *arguments)
    with small_blocks():
        assert_close(function(x, *arguments), together, 2e-6)


@pytest.mark.parametrize("name", ["mlp", "swiglu"])
def test_the_feed_forwards_are_their_formulas(name):
    random = np.random.default_rng(0)
    x, up, gate, down = (random.standard_normal(shape) for shape in ((7, 6), (6, 10), (6, 10), (10, 5)))
    x32, up32, gate32, down32 = (array.astype(np.float32) for array in (x, up, gate, down))
    silu = lambda z: z / (1 + np.exp(-z))
    if name == "mlp":
        ours, plain = layers.mlp(x32, Linear(up32), Linear(down32), layers.silu), silu(x @ up) @ down
    else:
        ours = layers.swiglu(x32, np.concatenate([gate32, up32], axis=1), down32)
        plain = (silu(x @ gate) * (x @ up)) @ down
    assert np.abs(ours - plain).max() < 1e-5
