"""Visual tokens that follow others: what a layer does with them, and whom they follow."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minivtw import InputError
from minivtw.counting import prompt_flops
from minivtw.methods import sharing
from minivtw.methods.sharing import BLOCK, most_alike, share
from minivtw.methods.shelf import method_of
from minivtw.methods.withdrawal import freeze, then, withdraw
from minivtw.model.cache import KVCache
from minivtw.model.decoder import forward
from minivtw.model.tokens import EmbeddedPrompt, arriving
from tests.properties.test_methods import plain_layer, seeing
from tests.random_models import assert_close, decoders, prefill, random_decoder, random_prompt


def drawn_leaders(count, seed):
    """Some lead themselves, the last among them, and the others follow one of these: (count,) indices."""
    random = np.random.default_rng(seed)
    leads = random.random(count) < random.random()
    leads[-1] = True
    return np.where(leads, np.arange(count), random.choice(np.flatnonzero(leads), count))


def states(decoder, prompt, method):
    """What entered layer 0, and what left every layer."""
    left = [prompt.hidden]
    prefill(decoder, prompt, method, observe=lambda name, x: left.append(x) if name.endswith("hidden") else 0)
    return left


@given(seeing, st.integers(0, 2**32 - 1))
def test_who_follows_changes_by_what_the_plain_computation_changes_in_the_leader(case, seed):
    """Layer by layer, each from what entered it; text may follow as well."""
    decoder, prompt, _ = case
    leaders = [drawn_leaders(len(prompt.hidden), seed + index) for index in range(decoder.config.layers)]
    left = states(decoder, prompt, lambda index, tokens: tokens.follow(leaders[index]))
    for layer, whom, entered, leaves in zip(decoder.layers, leaders, left, left[1:]):
        after = plain_layer(entered, layer, decoder.config)
        follows = (whom != np.arange(len(whom)))[:, None]
        assert_close(leaves, np.where(follows, entered + (after - entered)[whom], after), 5e-6)


@given(seeing)
def test_following_oneself_is_the_model_bit_for_bit(case):
    decoder, prompt, _ = case
    alone, self_led = prefill(decoder, prompt), lambda index, tokens: tokens.follow(np.arange(len(tokens)))
    run = prefill(decoder, prompt, self_led)
    assert np.array_equal(run.hidden, alone.hidden) and run.ran == alone.ran
    for one, other in zip(run.cache.layers, alone.cache.layers):
        assert np.array_equal(one.keys, other.keys) and np.array_equal(one.values, other.values)


@given(seeing, st.integers(0, 2**32 - 1))
def test_following_whoever_is_frozen_or_has_left_is_freezing(case, seed):
    decoder, prompt, _ = case
    visual, leaders = np.flatnonzero(prompt.is_visual), np.arange(len(prompt.hidden))
    leaders[visual] = np.random.default_rng(seed).choice(visual)
    all_follow = then(
        lambda index, tokens: tokens.freeze(tokens.is_visual), lambda index, tokens: tokens.follow(leaders)
    )
    frozen, followed = prefill(decoder, prompt, freeze(range(9))), prefill(decoder, prompt, all_follow)
    assert np.array_equal(followed.hidden, frozen.hidden) and followed.ran == frozen.ran

    arrived, stays = arriving(prompt, KVCache(decoder.config)), np.arange(len(leaders)) != leaders[visual[0]]
    left = forward(decoder, arrived.follow(leaders)[stays], stop=1)
    assert np.array_equal(left.hidden[left.is_visual], arrived.hidden[stays & arrived.is_visual])


@st.composite
def sharing_cases(draw):
    """(decoder, prompt with text around its visual tokens, `share` in all layers after the first, keep)"""
    decoder = draw(decoders(layers=st.integers(2, 4)))
    is_visual = [False, *draw(st.integers(1, 90)) * [True], *draw(st.integers(1, 4)) * [False]]
    prompt = random_prompt(decoder, is_visual, draw(st.integers(0, 2**32 - 1)))
    keep = draw(st.sampled_from([0.0, 0.25, 0.35, 1.0]))
    return decoder, prompt, share(range(1, decoder.config.layers), keep), keep


@given(sharing_cases())
def test_as_many_are_worked_on_as_said_and_all_are_read(case):
    decoder, prompt, method, keep = case
    run, visual, text = prefill(decoder, prompt, method), int(prompt.is_visual.sum()), int((~prompt.is_visual).sum())
    blocks = -(-visual // BLOCK)
    count = blocks * max(1, round(keep * -(-visual // blocks)))
    assert run.cache.tokens_per_layer == [visual + text] * decoder.config.layers
    for index, ran in enumerate(run.ran):
        assert ran.entered == visual + text
        if index:  # where blocks are not full the last token stands in for those that are missing
            assert text + count - blocks + 1 <= ran.worked <= text + count
    assert run.ran[0].worked == visual + text


@given(sharing_cases())
def test_keeping_all_is_the_model(case):
    decoder, prompt, _, _ = case
    whole = prefill(decoder, prompt, share(range(1, 4), 1.0))
    assert np.array_equal(whole.hidden, prefill(decoder, prompt).hidden)


@given(seeing, st.integers(0, 2**32 - 1), st.integers(1, 3))
def test_decoding_from_the_cache_is_recomputing(case, seed, steps):
    """Where the leaders do not depend on what follows."""
    decoder, prompt, leaves = case
    leaders, said = drawn_leaders(len(prompt.hidden), seed), []

    def led(index, tokens):
        here = tokens.positions < len(leaders)
        whom = np.arange(len(tokens))
        whom[here] = leaders[tokens.positions[here]]
        return tokens.follow(whom)

    method = then(lambda index, tokens: led(index, tokens) if index < leaves else tokens, withdraw(leaves))
    run = newest = prefill(decoder, prompt, method)
    for _ in range(steps):
        said.append(int(newest.logits[-1].argmax()))
        newest = prefill(decoder, EmbeddedPrompt(decoder.embedding[said[-1:]], np.zeros(1, bool)), method, run.cache)
        hidden = np.concatenate([prompt.hidden, decoder.embedding[said]])
        fresh = prefill(decoder, EmbeddedPrompt(hidden, np.pad(prompt.is_visual, (0, len(said)))), method)
        assert_close(newest.logits[-1], fresh.logits[-1], 5e-5)


class Asked:
    """What `most_alike` asks of tokens."""

    def __init__(self):
        self.extra_flops = []


def plainly(unit, weights, keep):
    """Greedy facility location in one block, as it is written down: the chosen, and the distances of all to the nearest."""
    chosen, nearest = [], [2.0] * len(unit)
    distance = [[1 - float(one @ other) for other in unit] for one in unit]
    for _ in range(max(1, round(keep * len(unit)))):
        gains = [
            -1 if one in chosen else sum(w * max(n - d, 0) for w, n, d in zip(weights, nearest, distance[one]))
            for one in range(len(unit))
        ]
        chosen.append(int(np.argmax(gains)))
        nearest = [min(n, d) for n, d in zip(nearest, distance[chosen[-1]])]
    return chosen, nearest


@pytest.mark.parametrize("seed", range(20))
def test_the_chosen_are_those_of_a_plain_greedy_search_in_every_block(seed):
    random = np.random.default_rng(seed)
    count, keep = int(random.integers(2, 200)), [0.1, 0.35, 0.6][seed % 3]
    unit = random.standard_normal((count, 7))
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    weights, asked = random.random(count), Asked()
    leaders = most_alike(asked, unit, weights, keep)
    blocks = -(-count // BLOCK)
    size = -(-count // blocks)
    assert asked.extra_flops == [2 * blocks * size * size * 7]
    for start in range(0, count - size + 1, size):  # the full ones
        block = slice(start, start + size)
        chosen, nearest = plainly(unit[block], weights[block], keep)
        assert set(leaders[block]) == {start + one for one in chosen}
        assert np.allclose(1 - (unit[block] * unit[leaders[block]]).sum(1), nearest)
    assert np.array_equal(leaders[leaders], leaders)


@settings(max_examples=50)
@given(st.integers(1, 150), st.integers(0, 2**32 - 1), st.floats(0, 1), st.integers(1, 4))
def test_whoever_leads_leads_itself_within_its_block_also_where_all_are_the_same(count, seed, keep, kinds):
    random = np.random.default_rng(seed)
    unit = np.eye(kinds)[random.integers(kinds, size=count)]  # many are equal
    leaders = most_alike(Asked(), unit, np.ones(count), keep)
    size = -(-count // -(-count // BLOCK))
    assert np.array_equal(leaders[leaders], leaders) and np.array_equal(leaders // size, np.arange(count) // size)
    if round(keep * size) >= kinds:  # one of each kind is chosen wherever it stands
        assert np.array_equal(unit[leaders], unit)


@pytest.mark.parametrize("seed", range(5))
def test_what_it_asks_for_is_counted_and_what_it_spares(seed):
    decoder = random_decoder(next_config(), seed)
    prompt = random_prompt(decoder, [False, *16 * [True], *3 * [False]], seed)
    looks = prefill(decoder, prompt, share([2], 0.25))
    query, width = decoder.config.heads * decoder.config.head_dim, decoder.config.width
    asks = 2 * 3 * query * (width + 20) + 2 * 16 * 16 * width  # where the text looked, and who is alike
    assert looks.ran[2].extra_flops == asks
    saved = prompt_flops(decoder.config, prefill(decoder, prompt).ran) - prompt_flops(decoder.config, looks.ran)
    per_token = 2 * query * width + 3 * width * decoder.config.mlp_width + 2 * 20 * query
    assert saved == 2 * 12 * per_token - asks


def next_config():
    from tests.properties.test_shelf import asked_decoder

    return asked_decoder().config


def test_what_it_cannot_be_is_one_line():
    for text, words in (
        ("share:layers=1,by=size", "the method share takes layers, keep, not 'by'"),
        ("share:layers=1,keep=2", "keep is a share, from 0 to 1"),
        ("share", "the method share needs layers"),
    ):
        with pytest.raises(InputError, match=words):
            method_of(text)
    decoder = random_decoder(next_config())
    with pytest.raises(InputError, match="no layer before layer 0 whose states"):
        prefill(decoder, random_prompt(decoder, [True, False]), share([0]))
    assert share([1, 2]).spec == "share:layers=1-2,keep=0.35" == method_of(share([1, 2]).spec).spec
    assert sharing.BLOCK == 64
