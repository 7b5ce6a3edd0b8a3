"""The KV cache as a thing of its own: what goes in comes out, growing is amortised, trimming goes back in time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minivtw import InputError
from minivtw.methods.withdrawal import withdraw
from minivtw.model.cache import KVCache, LayerCache
from minivtw.model.decoder import DecoderConfig
from minivtw.model.tokens import EmbeddedPrompt as Asked
from tests.random_models import assert_close, cases, prefill


@given(st.lists(st.integers(0, 9), max_size=12), st.integers(1, 3), st.integers(1, 4))
def test_what_goes_in_comes_out(chunks, kv_heads, head_dim):
    cache = LayerCache()
    everything = np.random.default_rng(0).standard_normal((2, kv_heads, sum(chunks), head_dim)).astype(np.float32)
    start = 0
    for new in chunks:
        positions = 3 * np.arange(start, start + new)  # withdrawal leaves gaps
        keys, values = cache.append(*everything[:, :, start : start + new], positions)
        start += new
        assert np.array_equal(keys, everything[0, :, :start])
        assert np.array_equal(values, everything[1, :, :start])
    assert len(cache) == start
    assert np.array_equal(cache.positions, 3 * np.arange(start))
    assert cache.keys.nbytes + cache.values.nbytes == 8 * kv_heads * head_dim * start


def test_growing_copies_each_token_a_bounded_number_of_times():
    cache, token, copied = LayerCache(), np.ones((1, 1, 4), np.float32), 0
    store = None
    for position in range(2000):
        cache.append(token, token, np.array([position]))
        if cache.keys.base is not store:  # a new store: all that was held has been copied
            store, copied = cache.keys.base, copied + position
    assert copied <= 2 * 2000


def test_reading_the_cache_copies_nothing():
    cache, token = LayerCache(), np.ones((1, 1, 4), np.float32)
    keys, values = cache.append(token, token, np.array([0]))
    assert keys.base is values.base is cache.keys.base


@given(cases(), st.data())
def test_a_trimmed_cache_continues_as_if_nothing_had_followed(case, data):
    decoder, prompt, layer = case
    cut = data.draw(st.integers(0, len(prompt.hidden)))
    cache = prefill(decoder, prompt, withdraw(layer)).cache
    cache.trim(cut)
    start = Asked(prompt.hidden[:cut], prompt.is_visual[:cut])
    fresh = prefill(decoder, start, withdraw(layer)).cache
    assert cache.tokens_per_layer == fresh.tokens_per_layer
    assert cache.next_position == fresh.next_position == cut
    rest = Asked(prompt.hidden[cut:], prompt.is_visual[cut:])
    assert_close(
        prefill(decoder, rest, withdraw(layer), cache).hidden, prefill(decoder, rest, withdraw(layer), fresh).hidden
    )


def test_trimming_beyond_the_end_changes_nothing():
    cache = KVCache(DecoderConfig(5, 4, 2, 1, 1, 4, 4, 1e-5, 1e4, max_positions=9))
    cache[0].append(np.ones((1, 2, 4), np.float32), np.ones((1, 2, 4), np.float32), cache.claim(2))
    cache.trim(99)
    assert cache.tokens_per_layer == [2, 0] and cache.next_position == 2


def test_positions_that_the_model_does_not_have_are_refused():
    cache = KVCache(DecoderConfig(5, 4, 2, 1, 1, 4, 4, 1e-5, 1e4, max_positions=9))
    assert list(cache.claim(9)) == list(range(9))
    with pytest.raises(InputError, match="ends at token 10; the model has 9 positions"):
        cache.claim(1)
    assert cache.next_position == 9
