"""What withdrawal must mean, for any decoder, any prompt, any place of the visual tokens and any layer K."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from minivtw import InputError
from minivtw.counting import prompt_flops
from minivtw.methods.text import check
from minivtw.methods.withdrawal import random_tokens, then, withdraw
from minivtw.model.attention import rotary, rotate, split_heads
from minivtw.model.cache import KVCache
from minivtw.model.decoder import DecoderConfig, forward, logits
from minivtw.model.layers import linear, rms_norm, softmax, swiglu
from minivtw.model.tokens import EmbeddedPrompt, arriving, embedded_text
from tests.random_models import (
    as_stored,
    assert_close,
    cases,
    places_with_visual,
    prefill,
    random_decoder,
    random_prompt,
    renumbered,
)


@given(cases())
def test_withdrawing_after_the_last_layer_is_the_model_itself_bit_for_bit(case):
    decoder, prompt, _ = case
    withdrawn = prefill(decoder, prompt, withdraw(decoder.config.layers))
    untouched = prefill(decoder, prompt, None)
    assert np.array_equal(withdrawn.hidden, untouched.hidden)
    assert withdrawn.cache.tokens_per_layer == untouched.cache.tokens_per_layer


def masked_reference(decoder, prompt, layer):
    """Plain attention without a cache, where text queries cannot see visual keys from `layer` on. Nothing leaves.

    Written apart from `minivtw.model.decoder`: keys are repeated, heads are looped over, every step is on its own.
    """
    config, hidden, tokens = decoder.config, prompt.hidden, len(prompt.hidden)
    cosines, sines = rotary(np.arange(tokens), config.head_dim, config.rope_theta)
    for index, weights in enumerate(decoder.layers):
        sees = np.tri(tokens, dtype=bool)
        if index >= layer:
            sees[np.ix_(~prompt.is_visual, prompt.is_visual)] = False
        qkv = split_heads(
            linear(rms_norm(hidden, weights.input_norm, config.rms_norm_eps), weights.qkv),
            config.heads + 2 * config.kv_heads,
        )
        context = []
        for head in range(config.heads):
            shared = head * config.kv_heads // config.heads
            query, key = rotate(qkv[[head, config.heads + shared]], cosines, sines)
            value = as_stored(qkv[config.heads + config.kv_heads + shared])
            scores = np.where(sees, query @ as_stored(key).T * np.float32(config.head_dim**-0.5), -np.inf)
            context.append(as_stored(softmax(scores) @ value))
        hidden = hidden + np.concatenate(context, axis=1) @ weights.output
        hidden = hidden + swiglu(rms_norm(hidden, weights.mlp_norm, config.rms_norm_eps), weights.gate_up, weights.down)
    return hidden


@given(cases())
def test_removing_visual_tokens_equals_masking_them_as_keys(case):
    decoder, prompt, layer = case
    withdrawn = prefill(decoder, prompt, withdraw(layer))
    masked = masked_reference(decoder, prompt, layer)
    text = ~prompt.is_visual if layer < decoder.config.layers else slice(None)
    assert_close(withdrawn.hidden, masked[text])


@given(cases(), st.integers(1, 5))
def test_cached_decoding_equals_recomputing_from_scratch(case, steps):
    decoder, prompt, layer = case
    method = withdraw(layer)
    run = prefill(decoder, prompt, method)
    decoded = []  # token ids
    newest = run.logits[-1]
    for _ in range(steps):
        decoded.append(int(newest.argmax()))
        step = EmbeddedPrompt(decoder.embedding[decoded[-1:]], np.zeros(1, bool))
        newest = prefill(decoder, step, method, run.cache).logits[-1]
        whole = EmbeddedPrompt(
            np.concatenate([prompt.hidden, decoder.embedding[decoded]]),
            np.concatenate([prompt.is_visual, np.zeros(len(decoded), bool)]),
        )
        fresh = prefill(decoder, whole, method)
        assert_close(newest, fresh.logits[-1], 5e-5)
        assert run.cache.tokens_per_layer == fresh.cache.tokens_per_layer


@given(cases(), st.data())
def test_prefill_in_chunks_equals_prefill_at_once(case, data):
    decoder, prompt, layer = case
    cuts = data.draw(st.lists(st.integers(0, len(prompt.hidden)), max_size=4).map(sorted))
    whole = prefill(decoder, prompt, withdraw(layer))
    cache, parts = KVCache(decoder.config), []
    for start, stop in zip([0, *cuts], [*cuts, len(prompt.hidden)]):
        chunk = EmbeddedPrompt(prompt.hidden[start:stop], prompt.is_visual[start:stop])
        parts.append(prefill(decoder, chunk, withdraw(layer), cache).hidden)
    assert_close(np.concatenate(parts), whole.hidden)
    for part, full in zip(cache.layers, whole.cache.layers):
        assert_close(part.keys, full.keys)
        assert np.array_equal(part.positions, full.positions)


@given(cases())
def test_cache_lengths_are_what_k_says(case):
    decoder, prompt, layer = case
    tokens, text = len(prompt.hidden), int((~prompt.is_visual).sum())
    cache = prefill(decoder, prompt, withdraw(layer)).cache
    assert cache.tokens_per_layer == [tokens] * layer + [text] * (decoder.config.layers - layer)
    width = 2 * 4 * decoder.config.kv_heads * decoder.config.head_dim  # bytes of a token: key and value, float32
    assert [stored.keys.nbytes + stored.values.nbytes for stored in cache.layers] == [
        width * length for length in cache.tokens_per_layer
    ]


@given(cases())
def test_surviving_tokens_keep_their_positions(case):
    decoder, prompt, layer = case
    cache = prefill(decoder, prompt, withdraw(layer)).cache
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


def test_text_can_tell_visual_tokens_changed_before_k():
    """Else the property above would hold for text that never looks at the image.

    No theorem: a softmax may give the image nothing, so this counts who can tell in a fixed crowd of small models, of
    one head to nine. The changed states are 3 sigma off; who can tell has a hidden state that moved by 0.01 or more.
    """
    can_tell = 0
    for seed in range(50):
        random = np.random.default_rng(seed)
        kv_heads, layers = int(random.integers(1, 4)), int(random.integers(2, 6))
        heads = kv_heads * int(random.integers(1, 4))
        decoder = random_decoder(DecoderConfig(20, 16, layers, heads, kv_heads, 8, 24, 1e-5, 1e4, 64), seed)
        prompt = random_prompt(decoder, [False, *[True] * int(random.integers(1, 9)), False, False], seed)
        layer = int(random.integers(1, layers + 1))
        door = int(random.integers(0, layer))  # the layer that the visual states enter changed
        changed, plain = (changed_at(decoder, prompt, layer, door, change) for change in (3.0, 0.0))
        can_tell += bool(np.abs(changed - plain).max() > 1e-2)
    assert can_tell >= 48


def changed_at(decoder, prompt, layer, door, change):
    """Hidden states of the text at the end, (text tokens, width), when visual states gain `change` at one layer's door."""
    noise = np.random.default_rng(1).standard_normal(prompt.hidden.shape) * change

    def disturb(index, tokens):
        if index != door:
            return tokens
        return replace(tokens, hidden=tokens.hidden + np.where(tokens.is_visual[:, None], noise[tokens.positions], 0))

    tokens = arriving(prompt, KVCache(decoder.config))
    ended = forward(decoder, tokens, then(disturb, withdraw(layer)))
    return ended.hidden[~ended.is_visual]


@given(cases(), st.data())
def test_withdrawing_again_later_changes_nothing(case, data):
    decoder, prompt, layer = case
    later = data.draw(st.integers(layer, decoder.config.layers))
    once, twice = (
        prefill(decoder, prompt, method) for method in (withdraw(layer), then(withdraw(layer), withdraw(later)))
    )
    assert np.array_equal(once.hidden, twice.hidden)
    assert once.ran == twice.ran


@given(cases())
def test_without_visual_tokens_nothing_changes(case):
    decoder, prompt, layer = case
    text_only = EmbeddedPrompt(prompt.hidden, np.zeros(len(prompt.hidden), bool))
    for method in (withdraw(layer), renumbered(layer), random_tokens(layer)):
        run, untouched = prefill(decoder, text_only, method), prefill(decoder, text_only, None)
        assert np.array_equal(run.hidden, untouched.hidden)


@given(cases(places=places_with_visual))
def test_a_smaller_k_costs_fewer_flops(case):
    decoder, prompt, _ = case
    costs = [
        prompt_flops(decoder.config, prefill(decoder, prompt, withdraw(k)).ran)
        for k in range(decoder.config.layers + 1)
    ]
    assert all(cheaper < dearer for cheaper, dearer in zip(costs, costs[1:]))
    assert costs[-1] == prompt_flops(decoder.config, prefill(decoder, prompt).ran)


@given(cases())
def test_renumbered_tokens_turn_by_their_place_among_those_that_are_left(case):
    """Keys are stored rotated: each is the key of its token at the position that the ablation gives it."""
    decoder, prompt, layer = case
    text, turned = int((~prompt.is_visual).sum()), []

    def note(index, tokens):
        turned.append(tokens.rotary_positions)
        return tokens

    cache = KVCache(decoder.config)
    ended = forward(decoder, arriving(prompt, cache), then(renumbered(layer), note))
    assert np.array_equal(
        ended.positions,
        np.arange(len(prompt.hidden)) if layer == decoder.config.layers else np.flatnonzero(~prompt.is_visual),
    )
    for index in range(decoder.config.layers):
        assert np.array_equal(turned[index], np.arange(len(prompt.hidden) if index < layer else text))
    turned.clear()
    forward(decoder, arriving(embedded_text(decoder, [0]), cache), then(renumbered(layer), note))
    assert turned == [[len(prompt.hidden) if index < layer else text] for index in range(decoder.config.layers)]


def test_reindexing_matters():
    """Else the ablation would show nothing: the two kinds of positions give different answers."""
    decoder = random_decoder(DecoderConfig(20, 16, 4, 4, 2, 8, 24, 1e-5, 1e4, 64))
    prompt = random_prompt(decoder, [False, *[True] * 9, False, False, False])
    keep, reindex = (prefill(decoder, prompt, method).hidden for method in (withdraw(2), renumbered(2)))
    assert np.abs(keep - reindex).max() > 1e-2


@given(cases(layers=st.integers(1, 2)), st.integers(0, 1000))
def test_the_random_ablation_withdraws_as_many_tokens_but_never_the_last(case, seed):
    decoder, prompt, _ = case
    tokens = forward(decoder, arriving(prompt, KVCache(decoder.config)), random_tokens(0, seed))
    assert len(prompt.hidden) - len(tokens) == prompt.is_visual.sum()
    assert tokens.positions[-1] == len(prompt.hidden) - 1


@pytest.mark.parametrize("layer", [-1, 2.0, True, "2"])
def test_a_layer_that_makes_no_sense_is_an_input_error(layer):
    with pytest.raises(InputError, match="layer must be (0 or more|a whole number), not"):
        withdraw(layer)


def test_a_layer_that_the_decoder_lacks_is_an_input_error():
    assert check(withdraw(6), layers=6)
    with pytest.raises(InputError, match="from 0 to 6, the number of layers, not 7"):
        check(then(withdraw(2), random_tokens(7)), layers=6)


def test_logits_of_the_withdrawn_differ_from_the_full_model():
    """Else every property above would hold for a method that does nothing."""
    decoder = random_decoder(DecoderConfig(20, 16, 4, 4, 2, 8, 24, 1e-5, 1e4, 64))
    prompt = random_prompt(decoder, [False, *[True] * 9, False, False])
    full, withdrawn = (prefill(decoder, prompt, method) for method in (None, withdraw(2)))
    assert np.abs(logits(decoder, full.hidden)[-1] - withdrawn.logits[-1]).max() > 1e-2
