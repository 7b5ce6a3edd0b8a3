"""Visual tokens that follow others: what a layer does with them, and whom they follow."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minivtw import InputError
from minivtw.counting import prompt_flops
from minivtw.methods import sharing
from minivtw.methods.sharing import BLOCK, RIDGE, mixtures, share
from minivtw.methods.shelf import method_of
from minivtw.methods.withdrawal import freeze, then, withdraw
from minivtw.model.cache import KVCache
from minivtw.model.decoder import forward
from minivtw.model.tokens import EmbeddedPrompt, arriving
from tests.properties.test_methods import plain_layer, seeing
from tests.random_models import assert_close, decoders, prefill, random_decoder, random_prompt


def drawn_groups(count, seed):
    """Groups of followers and leaders among `count` tokens, none in both, the last follows nobody: `Tokens.follow`'s
    arguments for each, and of all together the shares, (count, count)."""
    random = np.random.default_rng(seed)
    kinds = random.integers(0, 6, count)  # 0 and 1 follow in two groups, 2 and 3 lead there, the others do neither
    kinds[-1] = 4
    groups, whole = [], np.zeros((count, count), np.float32)
    for group in range(2):
        followers, leaders = np.flatnonzero(kinds == group), np.flatnonzero(kinds == group + 2)
        shares = random.standard_normal((len(followers), len(leaders))).astype(np.float32) / 4
        groups.append((followers, leaders, shares))
        whole[np.ix_(followers, leaders)] = shares
    return groups, whole


def led(tokens, groups):
    for group in groups:
        tokens = tokens.follow(*group)
    return tokens


def states(decoder, prompt, method):
    """What entered layer 0, and what left every layer."""
    left = [prompt.hidden]
    prefill(decoder, prompt, method, observe=lambda name, x: left.append(x) if name.endswith("hidden") else 0)
    return left


@given(seeing, st.integers(0, 2**32 - 1))
def test_who_follows_changes_by_a_mixture_of_what_the_plain_computation_changes_in_the_leaders(case, seed):
    """Layer by layer, each from what entered it; text may follow as well."""
    decoder, prompt, _ = case
    drawn = [drawn_groups(len(prompt.hidden), seed + index) for index in range(decoder.config.layers)]
    left = states(decoder, prompt, lambda index, tokens: led(tokens, drawn[index][0]))
    for layer, (groups, shares), entered, leaves in zip(decoder.layers, drawn, left, left[1:]):
        after = plain_layer(entered, layer, decoder.config)
        follows = np.isin(np.arange(len(entered)), np.concatenate([followers for followers, *_ in groups]))[:, None]
        assert_close(leaves, np.where(follows, entered + shares @ (after - entered), after), 5e-6)


@given(seeing, st.integers(0, 2**32 - 1))
def test_following_nobody_or_whoever_is_frozen_or_has_left_is_freezing(case, seed):
    decoder, prompt, _ = case
    visual = np.flatnonzero(prompt.is_visual)
    lead = np.random.default_rng(seed).random(len(visual)) < 0.5
    followers, leaders = visual[~lead], visual[lead]
    shares = np.ones((len(followers), len(leaders)), np.float32)
    frozen = prefill(decoder, prompt, freeze(range(9)))
    for method in (
        then(freeze(range(9)), lambda index, tokens: tokens.follow(followers, leaders, shares)),
        lambda index, tokens: tokens.follow(visual, leaders[:0], np.empty((len(visual), 0), np.float32)),
    ):
        followed = prefill(decoder, prompt, method)
        assert np.array_equal(followed.hidden, frozen.hidden) and followed.ran == frozen.ran

    arrived = arriving(prompt, KVCache(decoder.config))
    stays = ~np.isin(np.arange(len(arrived)), leaders)
    left = forward(decoder, arrived.follow(followers, leaders, shares)[stays], stop=1)
    assert np.array_equal(left.hidden[left.is_visual], arrived.hidden[followers])


@given(seeing)
def test_where_nobody_follows_it_is_the_model_bit_for_bit(case):
    decoder, prompt, _ = case
    nobody, none = np.arange(0), np.empty((0, len(prompt.hidden)), np.float32)
    alone = prefill(decoder, prompt)
    run = prefill(decoder, prompt, lambda index, tokens: tokens.follow(nobody, np.arange(len(tokens)), none))
    assert np.array_equal(run.hidden, alone.hidden) and run.ran == alone.ran
    for one, other in zip(run.cache.layers, alone.cache.layers):
        assert np.array_equal(one.keys, other.keys) and np.array_equal(one.values, other.values)


@given(seeing)
def test_following_a_token_of_ones_own_state_is_being_worked_on(case):
    """Where all states are one, all values are, so a layer changes every token alike wherever it stands."""
    decoder, prompt, _ = case
    count = len(prompt.hidden)
    same = prompt._replace(hidden=np.repeat(prompt.hidden[:1], count, 0))
    followers, last, whole = np.arange(count - 1), np.array([count - 1]), np.ones((count - 1, 1), np.float32)
    run = prefill(decoder, same, lambda index, tokens: tokens.follow(followers, last, whole))
    assert_close(run.hidden, prefill(decoder, same).hidden, 5e-6)


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
    sizes = [visual // blocks + (block < visual % blocks) for block in range(blocks)]
    worked = text + sum(max(1, round(keep * size)) for size in sizes)
    assert run.cache.tokens_per_layer == [visual + text] * decoder.config.layers
    assert [ran.entered for ran in run.ran] == [visual + text] * decoder.config.layers
    assert [ran.worked for ran in run.ran] == [visual + text] + [worked] * (decoder.config.layers - 1)


@given(sharing_cases())
def test_keeping_all_is_the_model(case):
    decoder, prompt, _, _ = case
    whole = prefill(decoder, prompt, share(range(1, 4), 1.0))
    assert np.array_equal(whole.hidden, prefill(decoder, prompt).hidden)


@given(seeing, st.integers(0, 2**32 - 1), st.integers(1, 3))
def test_decoding_from_the_cache_is_recomputing(case, seed, steps):
    """Where who follows whom does not depend on what comes after."""
    decoder, prompt, leaves = case
    (groups, _), said = drawn_groups(len(prompt.hidden), seed), []

    def method(index, tokens):
        is_prompt = not tokens.positions[0]
        return led(tokens, groups) if index < leaves and is_prompt else tokens

    method = then(method, withdraw(leaves))
    run = newest = prefill(decoder, prompt, method)
    for _ in range(steps):
        said.append(int(newest.logits[-1].argmax()))
        newest = prefill(decoder, EmbeddedPrompt(decoder.embedding[said[-1:]], np.zeros(1, bool)), method, run.cache)
        hidden = np.concatenate([prompt.hidden, decoder.embedding[said]])
        fresh = prefill(decoder, EmbeddedPrompt(hidden, np.pad(prompt.is_visual, (0, len(said)))), method)
        assert_close(newest.logits[-1], fresh.logits[-1], 5e-5)


def plainly(states, weights, count):
    """Who leads, and each of the others as a mixture of them: ridge regressions in float64, one after the other."""
    states = (states - states.mean(0)).astype(np.float64)
    scale = (states**2).sum(1).mean()
    rows = np.concatenate([states, np.full((len(states), 1), scale**0.5)], 1)  # a constant joins them
    leads: list[int] = []
    for turn in range(count + 1):
        penalised = np.concatenate([rows[leads].T, (RIDGE * scale) ** 0.5 * np.eye(turn)])  # (width + 1 + turn, turn)
        targets = np.concatenate([rows.T, np.zeros((turn, len(rows)))])  # (width + 1 + turn, tokens)
        shares = np.linalg.lstsq(penalised, targets, rcond=None)[0] if turn else np.zeros((0, len(rows)))
        missed = ((targets - penalised @ shares) ** 2).sum(0) * weights  # with what the shares themselves cost
        missed[leads] = -np.inf
        if turn < count:
            leads.append(int(missed.argmax()))
    return leads, shares.T


@pytest.mark.parametrize("seed", range(20))
def test_who_leads_and_the_shares_are_those_of_plain_regressions(seed):
    random = np.random.default_rng(seed)
    count, keep = int(random.integers(2, 65)), [0.1, 0.35, 0.6][seed % 3]
    states = 10.0 ** random.integers(-2, 3) * random.standard_normal((count, [7, 40][seed % 2]))
    states = states.astype(np.float32)
    weights = random.random(count)
    leads, follow, shares = (
        one[1]
        for one in mixtures(np.stack([states[::-1], states]), np.stack([weights] * 2), max(1, round(keep * count)))
    )
    chosen, plain = plainly(states, weights, len(leads))
    assert leads.tolist() == sorted(chosen)
    assert np.array_equal(np.sort(np.concatenate([leads, follow])), np.arange(count))
    assert shares.dtype == np.float32
    assert np.allclose(shares, plain[np.ix_(follow, np.argsort(chosen))], atol=1e-3)


@settings(max_examples=50)
@given(st.integers(2, 64), st.integers(0, 2**32 - 1), st.integers(1, 4), st.sampled_from([0.0, 1e-3, 1.0, 1e3]))
def test_what_is_missed_is_within_the_ridge_where_each_kind_of_state_can_lead(count, seed, kinds, size):
    """Who follows one of its own state would miss nothing at the cost of one share, and ridge regression does no worse."""
    random = np.random.default_rng(seed)
    states = (
        np.float32(size) * random.standard_normal((kinds, 6)).astype(np.float32)[random.integers(kinds, size=count)]
    )
    leads, follow, shares = (one[0] for one in mixtures(states[None], np.ones((1, count)), min(kinds, count - 1)))
    assert len(set(leads)) == len(leads) and np.isfinite(shares).all()
    centred = states - states.mean(0)
    scale = max((centred**2).sum(1).mean(), 1e-9)
    missed = ((centred[follow] - shares @ centred[leads]) ** 2).sum(1) + scale * (1 - shares.sum(1)) ** 2
    if len(leads) == kinds:
        assert (missed <= 1.01 * RIDGE * scale).all()


@pytest.mark.parametrize("seed", range(5))
def test_what_it_asks_for_is_counted_and_what_it_spares(seed):
    decoder = random_decoder(next_config(), seed)
    prompt = random_prompt(decoder, [False, *16 * [True], *3 * [False]], seed)
    looks = prefill(decoder, prompt, share([2], 0.25))
    query, width = decoder.config.heads * decoder.config.head_dim, decoder.config.width
    # where the text looked, who is alike, and what is taken over
    asks = 2 * 3 * query * (width + 20) + 2 * 16 * 16 * width + 2 * 12 * 4 * width
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
