"""Greedy, temperature, top-k and top-p."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from minivtw import InputError
from minivtw.model.sampling import Sampler

some_logits = arrays(np.float32, st.integers(2, 30), elements=st.floats(-8, 8, width=32))


@given(some_logits)
def test_greedy_takes_the_largest(logits):
    assert logits[Sampler()(logits)] == logits.max()


@given(some_logits, st.floats(0.2, 3))
def test_temperature_divides_the_logits(logits, temperature):
    weights = np.exp(logits.astype(np.float64) / temperature)
    assert np.allclose(Sampler(temperature).probabilities(logits), weights / weights.sum())


@given(some_logits, st.integers(1, 40))
def test_top_k_keeps_the_k_largest(logits, k):
    kept = Sampler(1.0, top_k=k).probabilities(logits) > 0
    assert kept.sum() >= min(k, len(logits))  # ties at the edge stay together
    assert logits[kept].min() >= np.sort(logits)[-min(k, len(logits))]


@given(some_logits, st.floats(0.05, 0.95))
def test_top_p_keeps_the_smallest_set_that_reaches_p(logits, p):
    full, cut = Sampler(1.0).probabilities(logits), Sampler(1.0, top_p=p).probabilities(logits)
    kept = cut > 0
    assert full[kept].sum() >= p - 1e-9
    assert full[kept].sum() - full[kept].min() < p + 1e-9  # without its least probable token it would not
    assert np.allclose(cut[kept], full[kept] / full[kept].sum())


@given(st.lists(st.integers(-64, 64), min_size=2, max_size=30, unique=True), st.integers(1, 6), st.floats(0.05, 0.95))
def test_top_p_counts_what_top_k_has_left(logits, k, p):
    """Against a plain loop: the k most probable, whose probabilities then sum to 1, as far as they are needed for p."""
    logits = np.array(logits, np.float32) / 8  # no ties
    full = Sampler(1.0).probabilities(logits)
    best = sorted(range(len(logits)), key=lambda token: -logits[token])[:k]
    left, kept, reached = sum(full[best]), [], 0.0
    for token in best:
        if reached / left < p - 1e-9:
            kept.append(token)
        elif reached / left < p + 1e-9:
            return  # a sum that is p but for rounding
        reached += full[token]
    ours = Sampler(1.0, top_k=k, top_p=p).probabilities(logits)
    assert set(np.flatnonzero(ours)) == set(kept)
    assert np.allclose(ours[kept], full[kept] / full[kept].sum())


def test_the_seed_decides_and_every_token_gets_its_share():
    logits = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    first, again = Sampler(1.0, seed=3), Sampler(1.0, seed=3)
    drawn = [first(logits) for _ in range(4000)]
    assert drawn == [again(logits) for _ in range(4000)]
    assert np.abs(np.bincount(drawn) / 4000 - [0.5, 0.3, 0.2]).max() < 0.03


@pytest.mark.parametrize("kind", [Fraction, np.float64, np.float32])
def test_any_real_number_is_a_temperature(kind):
    logits, half = np.log(np.array([0.5, 0.3, 0.2], np.float32)), kind(0.5)
    assert np.array_equal(Sampler(half, 0, half).probabilities(logits), Sampler(0.5, 0, 0.5).probabilities(logits))


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=-1),
        dict(temperature=float("nan")),
        dict(top_k=-1),
        dict(top_p=0),
        dict(top_p=1.1),
        dict(seed=-1),
    ],
)
def test_settings_that_make_no_sense_are_input_errors(options):
    with pytest.raises(InputError):
        Sampler(**options)
