"""What withdrawal must mean, for any decoder, any prompt, any place of the visual tokens and any layer K."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from minivtw import InputError
from minivtw.counting import prefill_flops
from minivtw.model.attention import causal_mask, rotary, rotate, split_heads
from minivtw.model.cache import KVCache
from minivtw.model.decoder import forward, logits
from minivtw.model.layers import linear, rms_norm, softmax, swiglu
from minivtw.methods import Withdrawal, check, staying
from tests.random_models import Asked, assert_close, cases, places_with_visual, prefill, random_prompt


@given(cases())
def test_withdrawing_after_the_last_layer_is_the_model_itself_bit_for_bit(case):
    decoder, prompt, _ = case
    withdrawn = prefill(decoder, prompt, Withdrawal(decoder.config.layers))
    untouched = prefill(decoder, prompt, Withdrawal(None))
    assert np.array_equal(withdrawn.hidden, untouched.hidden)
    assert withdrawn.cache.tokens_per_layer == untouched.cache.tokens_per_layer


def masked_reference(decoder, prompt, layer):
    """Plain attention without a cache, where text queries cannot see visual keys from `layer` on. Nothing leaves.

    Written apart from `minivtw.model.decoder`: keys are repeated, heads are looped over, every step is on its own.
    """
    config, hidden, tokens = decoder.config, prompt.hidden, len(prompt.hidden)
    cosines, sines = rotary(np.arange(tokens), config.head_dim, config.rope_theta)
    for index, weights in enumerate(decoder.layers):
        sees = causal_mask(tokens, tokens).copy()
        if index >= layer:
            sees[np.ix_(~prompt.is_visual, prompt.is_visual)] = False
        qkv = split_heads(linear(rms_norm(hidden, weights.input_norm, config.rms_norm_eps), weights.qkv), config.heads + 2 * config.kv_heads)
        context = []
        for head in range(config.heads):
            shared = head * config.kv_heads // config.heads
            query, key = rotate(qkv[[head, config.heads + shared]], cosines, sines)
            value = qkv[config.heads + config.kv_heads + shared]
            scores = np.where(sees, query @ key.T / np.sqrt(config.head_dim), -np.inf).astype(np.float32)
            context.append(softmax(scores) @ value)
        hidden = hidden + np.concatenate(context, axis=1) @ weights.output
        hidden = hidden + swiglu(rms_norm(hidden, weights.mlp_norm, config.rms_norm_eps), weights.gate_up, weights.down)
    return hidden


@given(cases())
def test_removing_visual_tokens_equals_masking_them_as_keys(case):
    decoder, prompt, layer = case
    withdrawn = prefill(decoder, prompt, Withdrawal(layer))
    masked = masked_reference(decoder, prompt, layer)
    text = ~prompt.is_visual if layer < decoder.config.layers else slice(None)
    assert_close(withdrawn.hidden, masked[text])


@given(cases(), st.integers(1, 5))
def test_cached_decoding_equals_recomputing_from_scratch(case, steps):
    decoder, prompt, layer = case
    withdrawal = Withdrawal(layer)
    run = prefill(decoder, prompt, withdrawal)
    decoded = []  # token ids
    newest = run.logits[-1]
    for _ in range(steps):
        decoded.append(int(newest.argmax()))
        step = Asked(decoder.embedding[decoded[-1:]], np.zeros(1, bool))
        newest = prefill(decoder, step, withdrawal, run.cache).logits[-1]
        whole = Asked(
            np.concatenate([prompt.hidden, decoder.embedding[decoded]]),
            np.concatenate([prompt.is_visual, np.zeros(len(decoded), bool)]),
        )
        fresh = prefill(decoder, whole, withdrawal)
        assert_close(newest, fresh.logits[-1], 5e-5)
        assert run.cache.tokens_per_layer == fresh.cache.tokens_per_layer


@given(cases(), st.data())
def test_prefill_in_chunks_equals_prefill_at_once(case, data):
    decoder, prompt, layer = case
    cuts = data.draw(st.lists(st.integers(0, len(prompt.hidden)), max_size=4).map(sorted))
    whole = prefill(decoder, prompt, Withdrawal(layer))
    cache, parts = KVCache(decoder.config.layers), []
    for start, stop in zip([0, *cuts], [*cuts, len(prompt.hidden)]):
        chunk = Asked(prompt.hidden[start:stop], prompt.is_visual[start:stop])
        parts.append(prefill(decoder, chunk, Withdrawal(layer), cache).hidden)
    assert_close(np.concatenate(parts), whole.hidden)
    for part, full in zip(cache.layers, whole.cache.layers):
        assert_close(part.keys, full.keys)
        assert np.array_equal(part.positions, full.positions)


@given(cases())
def test_cache_lengths_are_what_k_says(case):
    decoder, prompt, layer = case
    tokens, text = len(prompt.hidden), int((~prompt.is_visual).sum())
    cache = prefill(decoder, prompt, Withdrawal(layer)).cache
    assert cache.tokens_per_layer == [tokens] * layer + [text] * (decoder.config.layers - layer)
    width = 2 * 4 * decoder.config.kv_heads * decoder.config.head_dim  # bytes of a token: key and value, float32
    assert [stored.nbytes for stored in cache.layers] == [width * length for length in cache.tokens_per_layer]


@given(cases())
def test_surviving_tokens_keep_their_positions(case):
    decoder, prompt, layer = case
    cache = prefill(decoder, prompt, Withdrawal(layer)).cache
    for index, stored in enumerate(cache.layers):
        expected = np.arange(len(prompt.hidden)) if index < layer else np.flatnonzero(~prompt.is_visual)
        assert np.array_equal(stored.positions, expected)
    assert cache.next_position == len(prompt.hidden)  # what is decoded next takes its place after all of them


@given(cases(layers=st.integers(2, 5), places=places_with_visual), st.data())
def test_text_cannot_tell_visual_tokens_changed_at_k_or_later(case, data):
    decoder, prompt, layer = case
    assume(layer < decoder.config.layers)
    door = data.draw(st.integers(layer, decoder.config.layers - 1))  # the visual states change as they enter this layer
    assert np.array_equal(changed_at(decoder, prompt, layer, door, 3.0), changed_at(decoder, prompt, layer, door, 0.0))


@given(cases(layers=st.integers(2, 5), places=places_with_visual), st.data())
def test_text_can_tell_visual_tokens_changed_before_k(case, data):
    decoder, prompt, layer = case
    assume(layer > 0)
    assume(prompt.is_visual.argmax() < np.flatnonzero(~prompt.is_visual)[-1])  # some text comes after an image
    door = data.draw(st.integers(0, layer - 1))
    assert not np.allclose(
        changed_at(decoder, prompt, layer, door, 3.0), changed_at(decoder, prompt, layer, door, 0.0), rtol=0, atol=1e-6
    )


def changed_at(decoder, prompt, layer, door, change):
    """Hidden states of the text at the end, (text tokens, width), when visual states gain `change` at one layer's door."""
    cache = KVCache(decoder.config.layers)
    hidden, positions, is_visual = prompt.hidden, cache.claim(len(prompt.hidden)), prompt.is_visual
    noise = np.random.default_rng(1).standard_normal(hidden.shape).astype(np.float32) * np.float32(change)
    for index in range(decoder.config.layers):
        if index == door:
            kept = noise if len(hidden) == len(noise) else noise[~prompt.is_visual]
            hidden = hidden + np.where(is_visual[:, None], kept, 0)
        hidden = forward(decoder, hidden, positions, cache, layer, ~is_visual, start=index, stop=index + 1)
        if index == layer:
            positions, is_visual = positions[~is_visual], is_visual[~is_visual]
    return hidden[~is_visual]


@given(cases(), st.data())
def test_withdrawing_again_later_changes_nothing(case, data):
    decoder, prompt, layer = case
    later = data.draw(st.integers(layer, decoder.config.layers))
    once = prefill(decoder, prompt, Withdrawal(layer)).hidden
    cache = KVCache(decoder.config.layers)
    positions, text = cache.claim(len(prompt.hidden)), ~prompt.is_visual
    hidden = forward(decoder, prompt.hidden, positions, cache, layer, text, stop=later)
    if later > layer:
        positions, text = positions[text], text[text]
    twice = forward(decoder, hidden, positions, cache, later, text, start=later)
    assert np.array_equal(once, twice)


@given(cases())
def test_without_visual_tokens_nothing_changes(case):
    decoder, prompt, layer = case
    text_only = Asked(prompt.hidden, np.zeros(len(prompt.hidden), bool))
    for withdrawal in (Withdrawal(layer), Withdrawal(layer, "reindex"), Withdrawal(layer, tokens="random")):
        run, untouched = prefill(decoder, text_only, withdrawal), prefill(decoder, text_only, Withdrawal(None))
        assert np.array_equal(run.hidden, untouched.hidden)


@given(cases(places=places_with_visual))
def test_a_smaller_k_costs_fewer_flops(case):
    decoder, prompt, _ = case
    tokens, text = len(prompt.hidden), int((~prompt.is_visual).sum())
    costs = [prefill_flops(decoder.config, tokens, text, layer) for layer in range(decoder.config.layers + 1)]
    assert all(cheaper < dearer for cheaper, dearer in zip(costs, costs[1:]))
    assert costs[-1] == prefill_flops(decoder.config, tokens)


@given(cases())
def test_reindexed_tokens_are_renumbered_in_the_deep_layers_only(case):
    decoder, prompt, layer = case
    run = prefill(decoder, prompt, Withdrawal(layer, "reindex"))
    text = int((~prompt.is_visual).sum())
    for index, stored in enumerate(run.cache.layers):
        assert np.array_equal(stored.positions, np.arange(len(prompt.hidden) if index < layer else text))
    step = Asked(decoder.embedding[[0]], np.zeros(1, bool))
    cache = prefill(decoder, step, Withdrawal(layer, "reindex"), run.cache).cache
    for index, stored in enumerate(cache.layers):
        assert stored.positions[-1] == (len(prompt.hidden) if index < layer else text)


def test_reindexing_matters():
    """Else the ablation would show nothing: the two kinds of positions give different answers."""
    from minivtw.model.decoder import DecoderConfig
    from tests.random_models import random_decoder

    decoder = random_decoder(DecoderConfig(20, 16, 4, 4, 2, 8, 24, 1e-5, 1e4, 64))
    prompt = random_prompt(decoder, [False, *[True] * 9, False, False, False])
    keep, reindex = (prefill(decoder, prompt, Withdrawal(2, positions)).hidden for positions in ("keep", "reindex"))
    assert np.abs(keep - reindex).max() > 1e-2


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.integers(0, 1000))
def test_the_random_ablation_withdraws_as_many_tokens_but_never_the_last(is_visual, seed):
    is_visual = np.array([*is_visual, False])
    stays = staying(is_visual, Withdrawal(1, tokens="random", seed=seed))
    assert (~stays).sum() == is_visual.sum()
    assert stays[-1]


@pytest.mark.parametrize(
    "withdrawal",
    [Withdrawal(-1), Withdrawal(7), Withdrawal(2.0), Withdrawal(True), Withdrawal("2"), Withdrawal(2, "shift"), Withdrawal(2, tokens="text")],
)
def test_a_withdrawal_that_makes_no_sense_is_an_input_error(withdrawal):
    with pytest.raises(InputError):
        check(withdrawal, layers=6)


def test_logits_of_the_withdrawn_differ_from_the_full_model():
    """Else every property above would hold for a method that does nothing."""
    from minivtw.model.decoder import DecoderConfig
    from tests.random_models import random_decoder

    decoder = random_decoder(DecoderConfig(20, 16, 4, 4, 2, 8, 24, 1e-5, 1e4, 64))
    prompt = random_prompt(decoder, [False, *[True] * 9, False, False])
    full, withdrawn = (prefill(decoder, prompt, Withdrawal(layer)) for layer in (None, 2))
    assert np.abs(logits(decoder, full.hidden)[-1] - withdrawn.logits[-1]).max() > 1e-2
