"""What a method may do to the tokens, and what that must mean: for any decoder, any prompt, any layers."""

import inspect
import weakref
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from minivtw import InputError
from minivtw.methods.before import divprune
from minivtw.methods.shelf import METHODS, dart, fastv, looked_at, method_of, pyramiddrop, random, sparsevlm, uniform
from minivtw.methods.text import read_layers, spec_of, written
from minivtw.methods.withdrawal import adaptive, freeze, own_positions, random_tokens, renumber, then, withdraw
from minivtw.model.attention import attention_probabilities, rotary, rotate, split_heads
from minivtw.model.cache import KVCache
from minivtw.model.decoder import DecoderConfig, forward
from minivtw.model.layers import linear, rms_norm, swiglu
from minivtw.model.tokens import EmbeddedPrompt, arriving
from tests.random_models import (
    as_stored,
    assert_close,
    cases,
    places_with_visual,
    prefill,
    random_decoder,
    random_prompt,
)

seeing = cases(places=places_with_visual)


@st.composite
def freezing(draw):
    """(decoder, prompt, layers in which visual tokens are frozen, K)"""
    decoder, prompt, layer = draw(seeing)
    return decoder, prompt, draw(st.frozensets(st.integers(0, decoder.config.layers - 1))), layer


@given(seeing)
def test_a_method_that_changes_nothing_is_the_model_bit_for_bit(case):
    decoder, prompt, _ = case
    left_alone = prefill(decoder, prompt)
    for method in (lambda index, tokens: tokens, freeze([]), withdraw(decoder.config.layers), then()):
        run = prefill(decoder, prompt, method)
        assert np.array_equal(run.hidden, left_alone.hidden) and run.ran == left_alone.ran
        for ours, theirs in zip(run.cache.layers, left_alone.cache.layers):
            assert np.array_equal(ours.keys, theirs.keys) and np.array_equal(ours.values, theirs.values)


def plain_layer(hidden, layer, config, positions=None):
    """A layer on a whole prompt, written apart from `minivtw.model.decoder`: every row asks and every row is worked on.

    positions: where the rows stand, if not one after the other.
    """
    normed = rms_norm(hidden, layer.input_norm, config.rms_norm_eps)
    turned = split_heads(linear(normed, layer.qkv), config.heads + 2 * config.kv_heads)
    queries, keys, values = np.split(turned, [config.heads, config.heads + config.kv_heads])
    angles = rotary(np.arange(len(hidden)) if positions is None else positions, config.head_dim, config.rope_theta)
    sees = 1 + np.arange(len(hidden))
    looks = attention_probabilities(
        rotate(queries, *angles), as_stored(rotate(keys, *angles)), sees
    )  # (heads, tokens, tokens)
    context = as_stored(looks @ as_stored(values).repeat(config.heads // config.kv_heads, 0))
    hidden = hidden + context.swapaxes(0, 1).reshape(len(hidden), -1) @ layer.output
    return hidden + swiglu(rms_norm(hidden, layer.mlp_norm, config.rms_norm_eps), layer.gate_up, layer.down)


@given(freezing())
def test_freezing_equals_the_plain_computation_with_the_visual_rows_put_back(case):
    """Layer by layer, each from what entered it."""
    decoder, prompt, layers, _ = case
    states = [prompt.hidden]
    prefill(decoder, prompt, freeze(layers), observe=lambda name, x: states.append(x) if name.endswith("hidden") else 0)
    for index, (layer, entered, left) in enumerate(zip(decoder.layers, states, states[1:])):
        after = plain_layer(entered, layer, decoder.config)
        assert_close(left, np.where((prompt.is_visual & (index in layers))[:, None], entered, after), 5e-6)
    assert len(states) == 1 + len(decoder.layers)


@given(freezing())
def test_freezing_where_the_image_has_left_changes_nothing(case):
    decoder, prompt, layers, leaves = case
    deep = {layer for layer in layers if layer >= leaves}
    both, alone = (
        prefill(decoder, prompt, then(withdraw(leaves), freeze(deep))),
        prefill(decoder, prompt, withdraw(leaves)),
    )
    assert_close(both.hidden, alone.hidden)
    assert both.ran == alone.ran


@given(freezing())
def test_freezing_saves_work_and_no_bytes(case):
    decoder, prompt, layers, _ = case
    run, tokens, text = prefill(decoder, prompt, freeze(layers)), len(prompt.hidden), int((~prompt.is_visual).sum())
    assert run.cache.tokens_per_layer == [tokens] * decoder.config.layers
    assert [ran.entered for ran in run.ran] == [tokens] * decoder.config.layers
    assert [ran.worked for ran in run.ran] == [text if index in layers else tokens for index in range(len(run.ran))]


@given(freezing(), st.integers(0, 99))
def test_whatever_state_a_frozen_token_has_it_keeps_and_text_keys_do_not_depend_on_it(case, seed):
    decoder, prompt, layers, _ = case
    assume(layers)
    index, noise = min(layers), np.random.default_rng(seed).standard_normal(prompt.hidden.shape)
    entered = forward(decoder, arriving(prompt, KVCache(decoder.config)), stop=index)
    text, after = ~prompt.is_visual, []
    for visual in (entered.hidden, noise):  # the states of the visual tokens as they enter the layer
        hidden = np.where(text[:, None], entered.hidden, visual)
        tokens = replace(entered, hidden=hidden, cache=KVCache(decoder.config))
        after.append(forward(decoder, freeze(layers)(index, tokens), start=index, stop=index + 1))
        assert np.array_equal(after[-1].hidden[~text], visual[~text])
    one, other = (ended.cache[index] for ended in after)
    assert np.array_equal(one.keys[:, text], other.keys[:, text])
    assert np.array_equal(one.values[:, text], other.values[:, text])


@given(freezing(), st.integers(1, 4))
def test_cached_decoding_equals_recomputing_from_scratch(case, steps):
    decoder, prompt, layers, leaves = case
    method, said = then(freeze(layers), withdraw(leaves)), []
    run = newest = prefill(decoder, prompt, method)
    for _ in range(steps):
        said.append(int(newest.logits[-1].argmax()))
        newest = prefill(decoder, EmbeddedPrompt(decoder.embedding[said[-1:]], np.zeros(1, bool)), method, run.cache)
        whole = EmbeddedPrompt(
            np.concatenate([prompt.hidden, decoder.embedding[said]]),
            np.concatenate([prompt.is_visual, np.zeros(len(said), bool)]),
        )
        fresh = prefill(decoder, whole, method)
        assert_close(newest.logits[-1], fresh.logits[-1], 5e-5)
        assert run.cache.tokens_per_layer == fresh.cache.tokens_per_layer


@given(freezing(), st.data())
def test_prefill_in_chunks_equals_prefill_at_once(case, data):
    decoder, prompt, layers, leaves = case
    method, cache = then(freeze(layers), withdraw(leaves)), KVCache(decoder.config)
    cuts = data.draw(st.lists(st.integers(0, len(prompt.hidden)), max_size=4).map(sorted))
    whole, parts = prefill(decoder, prompt, method), []
    for start, stop in zip([0, *cuts], [*cuts, len(prompt.hidden)]):
        chunk = EmbeddedPrompt(prompt.hidden[start:stop], prompt.is_visual[start:stop])
        parts.append(prefill(decoder, chunk, method, cache).hidden)
    assert_close(np.concatenate(parts), whole.hidden)
    assert cache.tokens_per_layer == whole.cache.tokens_per_layer


@given(seeing, st.data())
def test_a_row_of_attention_is_what_the_layer_computed(case, data):
    decoder, prompt, layer = case
    tokens = len(prompt.hidden)
    rows = data.draw(st.lists(st.integers(-tokens, tokens - 1), min_size=1, max_size=4))  # in any order, some twice
    seen, looked = {}, {}

    def look(index, tokens):
        if index and len(tokens) == len(prompt.hidden):
            looked[index - 1] = tokens.attention(rows)
        return tokens

    run = prefill(decoder, prompt, then(withdraw(layer), look), observe=lambda name, array: seen.update({name: array}))
    for index, probabilities in looked.items():
        np.testing.assert_allclose(probabilities, seen[f"decoder.layers.{index}.attention"][:, rows], atol=2e-6)
        config = decoder.config
        products = config.heads * config.head_dim * (config.width + run.ran[index].cached)  # queries, scores
        assert run.ran[index + 1].extra_flops == 2 * len(rows) * products
    assert run.ran[0].extra_flops == 0


@given(seeing)
def test_who_has_left_is_not_looked_at(case):
    """A method that asks after another one has let tokens go gets rows and columns of those that are left."""
    decoder, prompt, _ = case
    shapes = []

    def look(index, tokens):
        if index == 1:
            shapes.append((tokens.attention([-1]), tokens.keys, tokens.is_visual.any()))
        return tokens

    prefill(decoder, prompt, then(withdraw(1), look))
    text = int((~prompt.is_visual).sum())
    for probabilities, keys, sees in shapes:
        assert probabilities.shape == (decoder.config.heads, 1, text) and not sees
        assert keys.shape == (decoder.config.kv_heads, text, decoder.config.head_dim)


@given(seeing, st.integers(1, 6), st.integers(0, 4))
def test_in_a_later_turn_tokens_know_their_own_keys(case, before, index):
    """In a second turn a layer's cache begins with the tokens of the first."""
    decoder, prompt, _ = case
    index = min(index, decoder.config.layers - 1)
    cache = prefill(decoder, random_prompt(decoder, before * [False])).cache
    tokens = forward(decoder, arriving(prompt, cache), stop=index + 1)
    held = cache[index].keys
    assert held.shape[1] == before + len(prompt.hidden)
    assert np.array_equal(tokens.keys, held[:, before:])
    assert np.array_equal(tokens[tokens.is_visual].keys, held[:, before:][:, prompt.is_visual])


def fixed_decoder(layers=3):
    return random_decoder(DecoderConfig(20, 16, layers, 4, 2, 8, 24, 1e-5, 1e4, 64))


PICTURE = [False, True, True, True, False, True, False, False]


@pytest.fixture
def arrived():
    decoder = fixed_decoder()
    return arriving(random_prompt(decoder, PICTURE), KVCache(decoder.config))


@pytest.mark.parametrize("rows", [[0, 0, 1], [1, 0], [-1, 0], [0, 3, 2, 7], np.arange(8).repeat(2)])
def test_tokens_in_another_order_or_twice_are_refused(arrived, rows):
    with pytest.raises(InputError, match="their indices must ascend"):
        arrived[rows]


@pytest.mark.parametrize("rows", [[0, 3, 7], [0, -1], [], slice(2, 5), np.array(PICTURE), np.zeros(8, bool)])
def test_tokens_in_their_order_are_taken(arrived, rows):
    assert np.array_equal(arrived[rows].positions, np.arange(8)[rows])


def test_tokens_that_leave_leave_the_others_as_frozen_as_they_were(arrived):
    frozen = np.array([False, True, False, False, True, False, False, False])
    left = arrived.freeze(frozen)[arrived.positions % 2 == 0]
    assert np.array_equal(left.works, ~frozen[::2])


def test_freezing_twice_freezes_both_and_thaws_nobody(arrived):
    first, second = np.arange(8) == 1, np.arange(8) == 5
    assert np.array_equal(arrived.freeze(first).freeze(second).works, ~(first | second))
    assert arrived.freeze(~arrived.is_visual & False) is arrived  # nobody: the layer takes its shorter way
    assert arrived.freeze(first).freeze(first & False).works.tolist() == (~first).tolist()
    decoder = fixed_decoder()
    mask = np.array(PICTURE)
    half = mask & (np.arange(8) < 3)
    at_once, in_two = (
        (lambda i, t: t.freeze(mask)),
        then(lambda i, t: t.freeze(half), lambda i, t: t.freeze(mask & ~half)),
    )
    runs = [prefill(decoder, random_prompt(decoder, PICTURE), method) for method in (at_once, in_two)]
    assert np.array_equal(runs[0].hidden, runs[1].hidden) and runs[0].ran == runs[1].ran


def test_tokens_are_equal_to_themselves_alone(arrived):
    assert arrived == arrived and arrived != replace(arrived) and len({arrived, replace(arrived), arrived}) == 2


def test_two_adaptive_methods_count_apart():
    """The first is never quiet enough; it must not reset what the second counts."""
    decoder = fixed_decoder(6)
    prompt = random_prompt(decoder, PICTURE)
    both, alone = then(adaptive(0, 2), adaptive(1, 3)), adaptive(1, 3)
    for method in (both, alone):
        assert prefill(decoder, prompt, method).cache.tokens_per_layer == 3 * [8] + 3 * [4]


def test_states_of_earlier_layers_are_let_go():
    """The tokens that entered the layer before are kept for methods that look back; those of all others are gone."""
    decoder, states, alive = fixed_decoder(6), [], []

    def note(index, tokens):
        states.append(weakref.ref(tokens.hidden))
        alive.append([state() is not None for state in states])
        return tokens

    prefill(decoder, random_prompt(decoder, PICTURE), note)
    assert alive == [[index - one < 2 for one in range(index + 1)] for index in range(6)]


def test_before_layer_0_there_is_nothing_to_look_at():
    decoder = fixed_decoder(2)
    with pytest.raises(InputError, match="no layer before layer 0"):
        prefill(decoder, random_prompt(decoder, [True, False]), lambda index, tokens: tokens[tokens.attention([-1])])


@given(seeing)
def test_notes_do_not_outlive_a_prefill(case):
    decoder, prompt, _ = case
    counts = []

    def count(index, tokens):
        tokens.notes["asked"] = tokens.notes.get("asked", 0) + 1
        counts.append(tokens.notes["asked"])
        return tokens

    for _ in range(2):
        prefill(decoder, prompt, count)
    assert counts == 2 * list(range(1, decoder.config.layers + 1))


# --- methods as text

layers = st.frozensets(st.integers(0, 40), min_size=1)
made = st.one_of(
    st.integers(0, 40).map(withdraw),
    layers.map(freeze),
    st.builds(adaptive, st.sampled_from([0.1, 0.25]), st.integers(1, 3)),
    st.builds(random_tokens, st.integers(0, 40), st.integers(0, 9)),
    st.integers(0, 40).map(renumber),
    st.builds(own_positions),
    st.builds(divprune, st.sampled_from([0.0, 0.5, 1.0])),
    st.builds(pyramiddrop, layers, st.sampled_from([0.5, 0.625])),
    st.builds(sparsevlm, layers, st.sampled_from([0.5, 0.575])),
    st.builds(dart, st.integers(0, 40), st.sampled_from([0.5, 0.125]), st.integers(1, 9)),
    *(
        st.builds(make, st.integers(0, 40), st.sampled_from([0.0, 0.25, 0.5, 1.0]))
        for make in (fastv, looked_at, random, uniform)
    ),
)


@given(st.lists(made, min_size=1, max_size=3))
def test_a_method_and_its_text_are_the_same(methods):
    method = then(*methods) if len(methods) > 1 else methods[0]
    again = method_of(spec_of(method))
    assert spec_of(again) == spec_of(method)
    assert again.layers == method.layers


@given(layers)
def test_layers_are_written_as_runs(some):
    assert read_layers(written(some)) == some


def test_layers_by_hand():
    assert written(frozenset([4, 9, 10, 18, 19, 20])) == "4/9-10/18-20"
    assert spec_of(method_of("freeze:layers=18-20/4 + withdraw:layer=24")) == "freeze:layers=4/18-20+withdraw:layer=24"


def test_every_method_says_what_it_does_and_is_read_by_its_name():
    given = {"layer": 2, "layers": [1, 2], "share": 0.25}  # what a method may need to be told
    for name, make in METHODS.items():
        needed = {key: given[key] for key in inspect.signature(make).parameters if key in given}
        assert make.__doc__ and spec_of(method_of(spec_of(make(**needed)))).partition(":")[0] == name
