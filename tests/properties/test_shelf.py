"""What every method on the shelf promises, for any decoder, any prompt, any layers."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minivtw import InputError
from minivtw.methods.before import divprune, fastervlm, smaller, visionzip
from minivtw.methods.looking import coming_attention, last_look
from minivtw.methods.shelf import METHODS, dart, fastv, looked_at, method_of, pyramiddrop, random, sparsevlm, uniform
from minivtw.methods.text import first_layer
from minivtw.methods.withdrawal import own_positions, renumber, then, withdraw
from minivtw.model.decoder import DecoderConfig
from minivtw.model.tokens import EmbeddedPrompt
from minivtw.model.vision import encode
from minivtw.search.layer import logits_from_layer, run_in_full
from tests.random_models import (
    assert_close,
    cases,
    decoders,
    prefill,
    random_decoder,
    random_prompt,
    random_tower,
    with_tower,
)

SHARES = [0.0, 0.25, 0.5, 0.7, 1.0]
VISUAL = 16  # visual tokens where a tower has looked: 4 x 4 patches
AT_ONE_LAYER = [fastv, looked_at, dart, random, uniform]
IN_STAGES = [pyramiddrop, sparsevlm]
BEFORE = [divprune, fastervlm, visionzip]
GUIDED = [fastv, looked_at, dart, pyramiddrop, sparsevlm]  # what they keep depends on the question
TEXT = st.integers(1, 6).map(lambda tokens: tokens * [False])


@st.composite
def asked(draw, made):
    """(decoder, prompt, what makes a method, its layers, keep, the method); one picture of 16 visual tokens."""
    decoder = draw(decoders(layers=st.integers(2, 5)))
    is_visual = draw(TEXT) + VISUAL * [True] + draw(TEXT) + [False]
    prompt = random_prompt(decoder, is_visual, draw(st.integers(0, 2**32 - 1)))
    make, keep = draw(st.sampled_from(made)), draw(st.sampled_from(SHARES))
    layers = draw(st.frozensets(st.integers(1, decoder.config.layers - 1), min_size=1))
    return decoder, prompt, make, sorted(layers), keep, made_of(make, layers, keep, draw(st.booleans()))


def made_of(make, layers, keep, class_token=True):
    """A method of the shelf at these layers, or at the first of them, or before the decoder with a tower."""
    if make in IN_STAGES:
        return make(layers, keep)
    if make in AT_ONE_LAYER:
        return make(min(layers), keep)
    return with_tower(make(keep), random_tower(4, class_token, drop_first=class_token))


def seen(decoder, prompt, method, cache=None):
    """The run, and what `method` gives back at every layer's door, the prompt only."""
    doors = []
    run = prefill(decoder, prompt, then(method, lambda index, tokens: doors.append(tokens) or tokens), cache)
    return run, doors


def numbers_kept(make, layers, keep, depth):
    """How many visual tokens should enter each layer, by the papers' words."""
    if make in BEFORE:
        return [round(keep * VISUAL)] * depth
    if make is uniform:
        return [VISUAL if index < layers[0] else int(np.floor(VISUAL * keep)) for index in range(depth)]
    if make in AT_ONE_LAYER:
        return [VISUAL if index < layers[0] else round(keep * VISUAL) for index in range(depth)]
    whole = {pyramiddrop: int, sparsevlm: round}[make]
    return [whole(VISUAL * keep ** sum(layer <= index for layer in layers)) for index in range(depth)]


@given(asked([*AT_ONE_LAYER, *IN_STAGES, *BEFORE]))
def test_all_text_stays_and_as_many_visual_tokens_as_the_paper_says(case):
    decoder, prompt, make, layers, keep, method = case
    run, doors = seen(decoder, prompt, method)
    for tokens in doors:
        assert np.array_equal(tokens.positions[~tokens.is_visual], np.flatnonzero(~prompt.is_visual))
        assert np.all(np.diff(tokens.positions) > 0) and tokens.works is None
    expected = numbers_kept(make, layers, keep, decoder.config.layers)
    assert [int(tokens.is_visual.sum()) for tokens in doors] == expected
    assert run.cache.tokens_per_layer == [count + int((~prompt.is_visual).sum()) for count in expected]


@given(asked([*AT_ONE_LAYER, *IN_STAGES, *BEFORE]))
def test_keeping_all_is_the_model_bit_for_bit(case):
    decoder, prompt, make, layers, _, _ = case
    run, plain = prefill(decoder, prompt, made_of(make, layers, 1.0)), prefill(decoder, prompt)
    assert np.array_equal(run.hidden, plain.hidden)
    for ours, theirs in zip(run.cache.layers, plain.cache.layers):
        assert np.array_equal(ours.keys, theirs.keys) and np.array_equal(ours.values, theirs.values)


@given(asked([*AT_ONE_LAYER, *IN_STAGES, *BEFORE]))
def test_positions_are_kept_or_counted_anew_as_the_method_says(case):
    decoder, prompt, make, layers, _, method = case
    _, doors = seen(decoder, prompt, method)
    for index, tokens in enumerate(doors):
        is_new = make in BEFORE or (make is pyramiddrop and index >= layers[0])
        expected = np.arange(len(tokens)) if is_new else tokens.positions
        assert np.array_equal(tokens.rotary_positions, expected)
    for tokens in seen(decoder, prompt, then(method, own_positions()))[1]:
        assert np.array_equal(tokens.rotary_positions, tokens.positions)
    for tokens in seen(decoder, prompt, then(method, renumber(layers[0])))[1][layers[0] :]:
        assert np.array_equal(tokens.rotary_positions, np.arange(len(tokens)))


@given(asked([*AT_ONE_LAYER, *IN_STAGES, *BEFORE]))
def test_a_prompt_without_an_image_is_the_model_bit_for_bit(case):
    decoder, prompt, _, _, _, method = case
    said = EmbeddedPrompt(prompt.hidden, np.zeros(len(prompt.hidden), bool))
    run, plain = prefill(decoder, said, method), prefill(decoder, said)
    assert np.array_equal(run.hidden, plain.hidden) and run.ran == plain.ran


@given(asked([random, uniform, *BEFORE]), st.integers(1, 3))
def test_cached_decoding_equals_recomputing_where_the_question_has_no_say(case, steps):
    decoder, prompt, _, _, _, method = case
    run, said = prefill(decoder, prompt, method), []
    last = run.logits[-1]
    for _ in range(steps):
        said.append(int(last.argmax()))
        word = EmbeddedPrompt(decoder.embedding[said[-1:]], np.zeros(1, bool))
        last = prefill(decoder, word, method, run.cache).logits[-1]
        hidden = np.concatenate([prompt.hidden, decoder.embedding[said]])
        fresh = prefill(decoder, EmbeddedPrompt(hidden, np.r_[prompt.is_visual, np.zeros(len(said), bool)]), method)
        assert_close(last, fresh.logits[-1], 5e-5)
        assert run.cache.tokens_per_layer == fresh.cache.tokens_per_layer


@given(asked([*AT_ONE_LAYER, *IN_STAGES]), st.integers(0, 4), st.sampled_from(SHARES))
def test_what_runs_before_a_method_does_not_confuse_it(case, seed, share):
    """After another method each sees the tokens that are left, even after one of its own kind, and keeps of them."""
    decoder, prompt, make, layers, keep, method = case
    whole = int if make in (pyramiddrop, uniform) else round
    stages = np.array([sum(layer <= index for layer in layers) for index in range(decoder.config.layers)])
    times = stages if make in IN_STAGES else np.minimum(stages, 1)  # how often the share is kept before each layer
    left = round(share * VISUAL)
    _, doors = seen(decoder, prompt, then(random(0, share, seed), method))
    assert [tokens.is_visual.sum() for tokens in doors] == [whole(left * keep**time) for time in times]
    # SparseVLM counts before layer 0, where the other has dropped nothing yet.
    left = VISUAL if make is sparsevlm else whole(VISUAL * keep)
    _, doors = seen(decoder, prompt, then(method, made_of(make, layers, keep)))
    assert [tokens.is_visual.sum() for tokens in doors] == [
        whole(left * keep**time) if time else VISUAL for time in times
    ]


@given(asked(GUIDED + BEFORE))
def test_after_the_image_has_left_a_method_asks_for_nothing(case):
    decoder, prompt, _, layers, _, method = case
    both, alone = prefill(decoder, prompt, then(withdraw(0), method)), prefill(decoder, prompt, withdraw(0))
    assert sum(ran.extra_flops for ran in both.ran) == 0 and [ran[:3] for ran in both.ran] == [
        ran[:3] for ran in alone.ran
    ]


@given(asked([fastv]), st.data())
def test_the_attention_to_come_is_what_the_layer_then_computes(case, data):
    decoder, prompt, _, layers, keep, method = case
    rows, looked, arrays = data.draw(st.sampled_from([[-1], [0, -1], [0, 1, 2]])), {}, {}

    def look(index, tokens):
        if index:
            looked[index] = coming_attention(tokens, rows)
        return tokens

    run = then(method, renumber(layers[-1]), look)
    prefill(decoder, prompt, run, observe=lambda name, array: arrays.update({name: array}))
    for index, probabilities in looked.items():
        expected = arrays[f"decoder.layers.{index}.attention"][:, rows]
        np.testing.assert_allclose(probabilities, expected, atol=2e-6)


@given(cases(layers=st.integers(2, 5)), st.integers(1, 6))
def test_the_attention_to_come_behind_an_earlier_turn_leaves_that_turn_out(case, new):
    decoder, prompt, _ = case
    cache, arrays, looked = prefill(decoder, prompt).cache, {}, {}

    def look(index, tokens):
        if index:
            looked[index] = coming_attention(tokens, [-1])
        return tokens

    turn = random_prompt(decoder, new * [True] + [False])
    prefill(decoder, turn, look, cache, observe=lambda name, array: arrays.update({name: array}))
    for index, probabilities in looked.items():
        expected = arrays[f"decoder.layers.{index}.attention"][:, -1:, len(prompt.hidden) :]
        np.testing.assert_allclose(probabilities, expected, atol=2e-6)


@given(st.integers(2, 5), st.booleans(), st.booleans(), st.integers(0, 99))
def test_where_the_tower_looked_is_what_its_last_layer_computed(side, class_token, drop_first, seed):
    tower, arrays = random_tower(side, class_token, drop_first, seed=seed), {}
    pixels = np.random.default_rng(seed).standard_normal((3, 2 * side, 2 * side)).astype(np.float32)
    tower.entering.clear()
    features = encode(tower.vision, pixels, lambda name, array: arrays.update({name: array}), tower)
    looks, keys, _ = last_look(tower, len(features))
    attention = arrays["vision.layers.1.attention"].mean(0)  # (asking, asked)
    expected = attention[0] if class_token else attention.mean(0)
    np.testing.assert_allclose(looks, expected[int(drop_first) :], atol=2e-6)
    assert keys.shape == (len(features), 4)


def test_where_the_connector_joins_patches_their_looks_are_averaged():
    tower = random_tower(4, class_token=False, drop_first=False)
    patches, joined = last_look(tower, 16)[0].reshape(4, 4), last_look(tower, 4)[0].reshape(2, 2)
    np.testing.assert_allclose(joined, patches.reshape(2, 2, 2, 2).mean((1, 3)), atol=1e-7)
    assert last_look(tower, 4)[1].shape == (4, 16)


def test_who_is_kept_by_hand():
    """Five visual tokens: two pairs that point the same way, and one that stands alone."""
    decoder = asked_decoder()
    angles = np.array([0.0, 0.05, 1.5, 1.6, 3.2])
    hidden = np.zeros((6, decoder.config.width), np.float32)
    hidden[:5, 0], hidden[:5, 1], hidden[5, 2] = np.cos(angles), np.sin(angles), 1
    _, doors = seen(decoder, EmbeddedPrompt(hidden, np.arange(6) < 5), divprune(0.6))
    kept = doors[0].positions[doors[0].is_visual].tolist()
    assert 4 in kept and len({0, 1} & set(kept)) == 1 and len({2, 3} & set(kept)) == 1


def asked_decoder():
    return random_decoder(DecoderConfig(20, 16, 3, 4, 2, 8, 24, 1e-5, 1e4, 64))


def test_merging_adds_the_mean_of_what_is_like_a_target_and_loses_nobody():
    """VisionZip with one target that takes in everything: target + mean of the others."""
    decoder, tower = asked_decoder(), random_tower(4)
    prompt = random_prompt(decoder, VISUAL * [True] + [False])
    _, doors = seen(decoder, prompt, with_tower(visionzip(1 / VISUAL, merged=1.0), tower))
    assert doors[0].positions.tolist() == [0, VISUAL]
    assert_close(doors[0].hidden[0], prompt.hidden[0] + prompt.hidden[1:VISUAL].mean(0))


def test_raters_are_the_text_that_is_most_like_the_image():
    """One text row that points where the image points is the only rater: SparseVLM keeps what that row looked at."""
    decoder = asked_decoder()
    prompt = random_prompt(decoder, VISUAL * [True] + 4 * [False])
    prompt.hidden[:VISUAL] += 3
    prompt.hidden[VISUAL:] *= 0.1
    prompt.hidden[VISUAL + 1] += 3
    looks = []

    def look(index, tokens):
        if index == 2:
            looks.append(tokens.attention([VISUAL + 1]).mean((0, 1))[:VISUAL])
        return tokens

    _, doors = seen(decoder, prompt, then(look, sparsevlm([2], 0.25)))
    assert sorted(np.argsort(-looks[0])[:4]) == doors[2].positions[doors[2].is_visual].tolist()


def test_where_all_raters_have_left_the_last_token_judges():
    decoder = asked_decoder()
    prompt = random_prompt(decoder, VISUAL * [True] + 4 * [False])
    only_last = lambda index, tokens: (
        tokens[tokens.is_visual | (tokens.positions == VISUAL + 3)] if index == 1 else tokens
    )
    runs = [seen(decoder, prompt, then(only_last, made))[1][2] for made in (sparsevlm([2], 0.25), fastv(2, 0.25))]
    assert runs[0].positions.tolist() == runs[1].positions.tolist() and len(runs[0]) == 5


@pytest.mark.parametrize(
    "text, words",
    [
        ("fastv:keep=0.5", "needs layer"),
        ("fastv:layer=2,keep=1.5", "from 0 to 1"),
        ("dart:layer=2,pivots=0", "pivots must be 1"),
        ("visionzip:merged=2", "merged is a share"),
        ("sparsevlm:layers=2/4,raters=3", "raters must be chosen before"),
        ("pyramiddrop:layers=", "layers of the method pyramiddrop cannot be"),
    ],
)
def test_parameters_that_make_no_sense(text, words):
    with pytest.raises(InputError, match=words):
        method_of(text)


@pytest.mark.parametrize("make", [fastv(0), pyramiddrop([0]), fastervlm(), visionzip(), smaller()])
def test_what_cannot_be_looked_at_is_said(make):
    decoder = asked_decoder()
    with pytest.raises(InputError, match="no layer before layer 0|not known here"):
        prefill(decoder, random_prompt(decoder, [True, True, False]), make)


BY_PATCHES = ["visionzip", "fastervlm", "smaller"]
KEEPING = ["visionzip:", "fastervlm:", "divprune:", "uniform:layer=0,", "random:layer=0,"]
CHOOSERS = [f"{name}keep={keep}" for name in KEEPING for keep in ("0.25", "0.5")]  # a quarter is an integer of squares
CHOOSERS += ["random_tokens:layer=0", "smaller:side=2"]


@pytest.mark.parametrize("second", BY_PATCHES)
@pytest.mark.parametrize("first", CHOOSERS)
def test_where_the_tower_looked_is_not_asked_after_another_choice(first, second):
    """The tower knows all visual tokens, in their order: which of those that are left is which, it cannot tell."""
    prompt = random_prompt(asked_decoder(), [False, *VISUAL * [True], *VISUAL * [False]])
    with pytest.raises(InputError, match="no other method has chosen among them"):
        prefill(asked_decoder(), prompt, with_tower(method_of(f"{first}+{second}"), random_tower(4)))
    alone = prefill(asked_decoder(), prompt, with_tower(method_of(second), random_tower(4)))
    both = prefill(asked_decoder(), prompt, with_tower(method_of(f"withdraw:layer=3+{second}"), random_tower(4)))
    assert np.array_equal(alone.hidden, both.hidden)  # the other way round, or before anybody has left, it is


EXAMPLES = {
    "withdraw": "withdraw:layer=3", "freeze": "freeze:layers=2/4", "share": "share:layers=2/4", "fastv": "fastv:layer=2",
    "looked_at": "looked_at:layer=4", "pyramiddrop": "pyramiddrop:layers=2/4", "sparsevlm": "sparsevlm:layers=3/4",
    "dart": "dart:layer=3", "random": "random:layer=2", "uniform": "uniform:layer=1", "adaptive": "adaptive:share=0.6",
    "visionzip": "visionzip", "fastervlm": "fastervlm", "divprune": "divprune", "random_tokens": "random_tokens:layer=4",
    "renumber": "renumber:layer=3", "own_positions": "own_positions", "smaller": "smaller:side=2",
    "late": "late:layer=4",
}  # fmt: skip


@pytest.mark.parametrize("first", EXAMPLES)
def test_a_run_from_the_first_layer_that_a_method_names_is_a_run_from_the_bottom(first):
    """For every method of the shelf, alone and before every other: what `search.logits_from_layer` and those who use it rely on."""
    decoder, tower = random_decoder(asked_decoder().config._replace(layers=5)), random_tower(4)
    prompt = random_prompt(decoder, [False, *VISUAL * [True], *5 * [False]])
    full_run = run_in_full(decoder, prompt, 3)
    for text in [EXAMPLES[first], *(f"{EXAMPLES[first]}+{second}" for second in EXAMPLES.values())]:
        method = method_of(text)
        if any(name in text for name in BY_PATCHES):
            method = with_tower(method, tower)
        try:
            whole, answer = prefill(decoder, prompt, method), decoder.embedding[full_run.answer[:-1]]
        except InputError as error:
            with pytest.raises(InputError, match=re.escape(str(error))):
                logits_from_layer(decoder, full_run, method)
            continue
        following = prefill(decoder, EmbeddedPrompt(answer, np.zeros(len(answer), bool)), method, whole.cache)
        said, ran = logits_from_layer(decoder, full_run, method)
        assert ran == whole.ran, text
        assert_close(said, np.concatenate([whole.logits[-1:], following.logits]))
    assert first_layer(method_of(f"divprune+{EXAMPLES['withdraw']}")) == 0
    assert first_layer(method_of("freeze:layers=2/4+withdraw:layer=3")) == 2


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("make", [*GUIDED, *BEFORE, uniform])
def test_an_earlier_turn_is_to_a_method_as_the_text_before_the_image(make, seed):
    """Who is kept in a second turn is who is kept in one prompt that holds the first turn's text before the image."""
    decoder, before = random_decoder(asked_decoder().config, seed), 6 * [False]
    whole = random_prompt(decoder, [*before, *VISUAL * [True], *4 * [False]], seed)
    first, second = (EmbeddedPrompt(whole.hidden[part], whole.is_visual[part]) for part in (slice(6), slice(6, None)))
    method = made_of(make, [1, 2], 0.5)
    at_once, in_turns = seen(decoder, whole, method)[1], seen(decoder, second, method, prefill(decoder, first).cache)[1]
    for one, other in zip(at_once, in_turns, strict=True):
        assert one.positions[one.is_visual].tolist() == other.positions[other.is_visual].tolist()
        assert np.array_equal(one.rotary_positions[-len(other) :], other.rotary_positions)
    assert 0 < at_once[-1].is_visual.sum() < VISUAL


def test_every_method_of_the_shelf_is_tried_here():
    tried = {make.__name__ for make in (*AT_ONE_LAYER, *IN_STAGES, *BEFORE)}
    elsewhere = {"withdraw", "freeze", "share", "adaptive", "random_tokens", "renumber", "own_positions"}
    assert tried | elsewhere | {"smaller", "late"} == set(METHODS) == set(EXAMPLES)
