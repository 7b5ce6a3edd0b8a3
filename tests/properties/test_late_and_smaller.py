"""Visual tokens that enter late, and an image at a lower resolution: for any decoder, any prompt, any layer."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minivtw import InputError
from minivtw.methods.before import smaller
from minivtw.methods.shelf import late
from minivtw.methods.withdrawal import freeze, then, withdraw
from minivtw.model.tokens import EmbeddedPrompt
from minivtw.model.weights import DecoderConfig
from tests.properties.test_methods import plain_layer, seeing
from tests.random_models import (
    assert_close,
    decoders,
    prefill,
    random_decoder,
    random_prompt,
    random_tower,
    with_tower,
)


def entering(decoder, prompt, method):
    """The tokens that entered each layer, and the hidden states that left it."""
    tokens, left = [], []
    watched = then(method, lambda index, came: tokens.append(came) or came)
    prefill(decoder, prompt, watched, observe=lambda name, x: left.append(x) if name.endswith("hidden") else None)
    return tokens, left


@given(seeing)
def test_entering_late_is_text_alone_and_then_the_embedded_image(case):
    """Layer by layer, each from what left the one before; text keeps its distance to where the image will stand."""
    decoder, prompt, layer = case
    states, everywhere = prompt.hidden.copy(), np.arange(len(prompt.hidden))
    for index, (tokens, left) in enumerate(zip(*entering(decoder, prompt, late(layer)), strict=True)):
        there = everywhere[~prompt.is_visual] if index < layer else everywhere
        assert np.array_equal(tokens.positions, there) and np.array_equal(tokens.rotary_positions, there)
        assert np.array_equal(tokens.hidden, states[there])
        assert np.array_equal(tokens.is_visual, prompt.is_visual[there])
        assert_close(left, plain_layer(states[there], decoder.layers[index], decoder.config, there), 5e-6)
        states[there] = left


@given(seeing)
def test_what_enters_late_is_counted_and_cached_from_there_on(case):
    decoder, prompt, layer = case
    run, tokens, text = prefill(decoder, prompt, late(layer)), len(prompt.hidden), int((~prompt.is_visual).sum())
    counts = layer * [text] + (decoder.config.layers - layer) * [tokens]
    assert run.cache.tokens_per_layer == [one.entered for one in run.ran] == [one.worked for one in run.ran] == counts
    assert not any(one.extra_flops for one in run.ran)
    if layer == 0:
        assert np.array_equal(run.hidden, prefill(decoder, prompt).hidden)


@given(seeing, st.data())
def test_late_in_turns_and_word_by_word_is_late_at_once(case, data):
    """What comes in a later turn, or is fed back, finds in each layer's cache what it would have found in one prompt."""
    decoder, prompt, layer = case
    method = then(late(layer), withdraw(data.draw(st.integers(layer, decoder.config.layers))))
    cuts = data.draw(st.lists(st.integers(0, len(prompt.hidden)), max_size=5).map(sorted))
    whole, cache, parts = prefill(decoder, prompt, method), None, []
    for start, stop in zip([0, *cuts], [*cuts, len(prompt.hidden)]):
        run = prefill(decoder, EmbeddedPrompt(prompt.hidden[start:stop], prompt.is_visual[start:stop]), method, cache)
        cache, parts = run.cache, [*parts, run.hidden]
    assert_close(np.concatenate(parts), whole.hidden, 5e-5)
    assert cache.tokens_per_layer == whole.cache.tokens_per_layer


def asked():
    """A decoder of three layers, and a prompt of one text token, 4 x 4 visual ones and five of a question."""
    decoder = random_decoder(DecoderConfig(20, 16, 3, 4, 2, 8, 24, 1e-5, 1e4, 64))
    return decoder, random_prompt(decoder, [False, *16 * [True], *5 * [False]])


def test_who_rests_or_follows_where_the_image_enters_still_does_and_the_image_is_worked_on():
    """Of the question's words the first follows the second, and the third rests."""
    decoder, prompt = asked()
    follow = lambda index, tokens: tokens.follow([1], [2], np.ones((1, 1), np.float32)) if index == 1 else tokens
    rest = lambda index, tokens: tokens.freeze(tokens.positions == 19) if index == 1 else tokens
    _, left = entering(decoder, prompt, then(freeze([0, 1]), follow, rest, late(1)))
    states = prompt.hidden.copy()
    states[~prompt.is_visual] = left[0]
    expected = plain_layer(states, decoder.layers[1], decoder.config)
    expected[17] = states[17] + expected[18] - states[18]
    expected[19] = states[19]
    assert_close(left[1], expected, 5e-6)


@pytest.mark.parametrize("look", [lambda tokens: tokens.attention([-1]), lambda tokens: tokens.keys])
def test_where_the_image_enters_no_method_can_look_at_the_layer_before(look):
    with pytest.raises(InputError, match="nor where an image enters late"):
        prefill(*asked(), then(late(2), lambda index, tokens: look(tokens) if index == 2 else tokens))


@st.composite
def shrinking(draw):
    """(decoder, prompt, tower, side, across, tiles): `tiles` images of across x across visual tokens, to be side x side."""
    decoder, across, tiles = draw(decoders()), draw(st.integers(1, 6)), draw(st.integers(1, 2))
    between = st.integers(0, 3).map(lambda tokens: tokens * [False])
    is_visual = [visual for _ in range(tiles) for visual in [*draw(between), *across**2 * [True]]]
    prompt = random_prompt(decoder, [*is_visual, *draw(between), False], draw(st.integers(0, 2**32 - 1)))
    tower = random_tower(across)
    return decoder, prompt, tower._replace(entering=tiles * tower.entering), draw(st.integers(1, 7)), across, tiles


@given(shrinking())
def test_each_token_of_a_smaller_image_is_the_mean_of_the_area_that_it_covers(case):
    """The plain way: every token as side x side equal ones, of which then across x across are averaged."""
    decoder, prompt, tower, side, across, tiles = case
    tokens = entering(decoder, prompt, with_tower(smaller(side), tower))[0][0]
    if side >= across:
        assert np.array_equal(tokens.hidden, prompt.hidden)
        return
    visual = np.flatnonzero(prompt.is_visual)
    fine = prompt.hidden[visual].reshape(tiles, across, across, -1).repeat(side, 1).repeat(side, 2)
    expected = fine.reshape(tiles, side, across, side, across, -1).mean((2, 4)).reshape(tiles * side**2, -1)
    assert_close(tokens.hidden[tokens.is_visual], expected, 1e-6)
    assert np.array_equal(tokens.hidden[~tokens.is_visual], prompt.hidden[~prompt.is_visual])
    middles = [int((index + 0.5) * across / side + 1e-9) for index in range(side)]
    grid = visual.reshape(tiles, across, across)[:, middles][:, :, middles]
    assert np.array_equal(tokens.positions[tokens.is_visual], grid.ravel())
    assert np.array_equal(tokens.rotary_positions, tokens.positions)
    ran = prefill(decoder, prompt, with_tower(smaller(side), tower)).ran
    products = 2 * tiles * side**2 * across**2 * decoder.config.width
    assert [one.extra_flops for one in ran] == [products] + (decoder.config.layers - 1) * [0]
    assert [one.entered for one in ran] == decoder.config.layers * [len(tokens)]
