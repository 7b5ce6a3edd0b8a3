"""Each piece against its definition, computed in float64 or by the C library."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from minivtw.model import layers
from minivtw.model.attention import attention, attention_probabilities, rotary, rotate
from minivtw.model.layers import LayerNorm

reals = st.floats(-30, 30, width=32)
matrices = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9), elements=reals)


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


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 6), st.integers(0, 6), st.data(), st.integers(0, 99))
def test_grouped_attention_equals_repeating_the_keys(kv_heads, group, new, old, data, seed):
    """The plain way: each query head on its own, over a copy of its group's keys and values, in float64."""
    random = np.random.default_rng(seed)
    queries = random.standard_normal((kv_heads * group, new, 4)).astype(np.float32) * 2
    keys, values = random.standard_normal((2, kv_heads, old + new, 4)).astype(np.float32)
    last = st.integers(1, old + new)  # how many keys a query sees: any number, ascending; all, without `sees`
    sees = data.draw(st.none() | st.lists(last, min_size=new, max_size=new).map(lambda some: np.array(sorted(some[:-1]) + [old + new])))
    context, probabilities = attention(queries, keys, values, sees), attention_probabilities(queries, keys, sees)
    for head, query in enumerate(queries.astype(np.float64)):
        scores = np.exp(query @ keys[head // group].T / 2.0)
        if sees is not None:
            scores = np.where(np.arange(old + new) < sees[:, None], scores, 0)
        plain = scores / scores.sum(axis=1, keepdims=True)
        assert np.abs(probabilities[head] - plain).max() < 2e-6
        assert np.abs(context[:, head * 4 : head * 4 + 4] - plain @ values[head // group]).max() < 1e-5
