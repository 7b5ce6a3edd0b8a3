"""The instruments that make the paper's observations visible, each against a plainer way to get the same number."""

import hashlib
import json
import pathlib
import re
import sys

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from minivtw.analysis import migration, settling
from minivtw.errors import InputError
from minivtw.methods.withdrawal import freeze, random_tokens, withdraw
from minivtw.model.attention import rotary, rotate, split_heads
from minivtw.model.decoder import DecoderConfig, logits
from minivtw.model.layers import linear, rms_norm, softmax, swiglu
from minivtw.model.tokens import EmbeddedPrompt
from minivtw.search import layer as search

from .random_models import (
    as_stored,
    assert_close,
    cases,
    has_clear_winner,
    one_image,
    places_with_visual,
    prefill,
    random_decoder,
    random_prompt,
    renumbered,
)

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs" / "pictures"))

import instruments  # noqa: E402
import knock_outs  # noqa: E402

seeing = cases(places=places_with_visual)


# --- attention settling


@given(seeing)
def test_shares_are_a_partition_of_the_attention(case):
    decoder, asked, _ = case
    shares = settling.settling(decoder, asked)  # (layers, groups)
    assert shares.shape == (len(decoder.layers), len(settling.GROUPS))
    assert (shares >= 0).all()
    np.testing.assert_allclose(shares.sum(1), 1, atol=1e-5)


@given(seeing)
def test_visual_share_is_the_one_that_the_search_goes_by(case):
    decoder, asked, _ = case
    assume(not asked.is_visual[0])  # a visual first token counts as the sink here
    shares = settling.settling(decoder, asked)[:, settling.GROUPS.index("visual")]
    np.testing.assert_allclose(shares, search.attention_curve(decoder, asked), atol=1e-5)


def test_groups_of_a_prompt_by_hand():
    is_visual = np.array([False, True, True, False, False, False, False, False])
    names = {"s": "sink", "v": "visual", "n": "nearest", "o": "other"}
    last = "svvonnnn"  # what the last token sees
    groups = settling.key_groups(is_visual)
    assert [settling.GROUPS[group] for group in groups[-1]] == [names[letter] for letter in last]
    assert list(groups[3]) == [0, 1, 1, settling.GROUPS.index("nearest"), -1, -1, -1, -1]
    # Queries 3 … 7 see 4 … 8 keys; with even attention, one of them is the sink and two are visual.
    even = dict(zip(settling.GROUPS, settling.even_shares(is_visual)))
    assert even["sink"] == pytest.approx(np.mean([1 / keys for keys in range(4, 9)]))
    assert even["visual"] == pytest.approx(np.mean([2 / keys for keys in range(4, 9)]))
    assert even["other"] == pytest.approx(1 / 8 / 5)


@given(seeing)
def test_maps_are_the_last_tokens_rows(case):
    decoder, asked, layer = case
    rows = []
    prefill(
        decoder, asked, withdraw(layer), observe=lambda name, array: name.endswith("attention") and rows.append(array)
    )
    maps = instruments.image_maps(decoder, asked, withdraw(layer))  # (1, layers, visual tokens)
    for index, row in enumerate(rows):
        seen = row.mean(0)[-1, asked.is_visual] if index < layer else 0
        np.testing.assert_allclose(maps[0, index], seen, atol=1e-6)


@given(seeing)
def test_where_the_image_has_left_its_share_is_nought(case):
    decoder, asked, layer = case
    shares, full = settling.settling(decoder, asked, withdraw(layer)), settling.settling(decoder, asked)
    np.testing.assert_allclose(shares[:layer], full[:layer], atol=1e-6)
    np.testing.assert_allclose(shares.sum(1), 1, atol=1e-5)
    if not asked.is_visual[0]:
        assert not shares[layer:, settling.GROUPS.index("visual")].any()


# --- information migration


def plain_prefill(decoder, prompt, allowed=None, text_reads=None):
    """The decoder as one would write it down, all heads and all tokens of a layer at once, and nothing cached.

    allowed(layer): (tokens, tokens) booleans, which query may see which key, besides the causal mask; text_reads(layer,
    keys, values): what the queries of text get in place of the keys and values. Returns the hidden states after the
    last layer, and each layer's (keys, values), (heads, tokens, head_dim).
    """
    config, hidden, made = decoder.config, prompt.hidden, []
    shared, causal = config.heads // config.kv_heads, np.tri(len(prompt.hidden), dtype=bool)
    turns = rotary(np.arange(len(hidden)), config.head_dim, config.rope_theta)

    def context(queries, keys, values, visible):
        scores = queries @ keys.swapaxes(1, 2) * np.float32(config.head_dim**-0.5)
        return as_stored(softmax(np.where(visible, scores, -np.inf)) @ values)

    for index, layer in enumerate(decoder.layers):
        mixed = linear(rms_norm(hidden, layer.input_norm, config.rms_norm_eps), layer.qkv)
        queries, keys, values = np.split(
            split_heads(mixed, config.heads + 2 * config.kv_heads), [config.heads, -config.kv_heads]
        )
        queries, keys, values = (
            rotate(queries, *turns),
            as_stored(rotate(keys, *turns)).repeat(shared, 0),
            as_stored(values).repeat(shared, 0),
        )
        made.append((keys, values))
        visible = causal if allowed is None else causal & allowed(index)
        seen = context(queries, keys, values, visible)
        if text_reads:
            seen = np.where(
                prompt.is_visual[:, None], seen, context(queries, *text_reads(index, keys, values), visible)
            )
        hidden = hidden + seen.swapaxes(0, 1).reshape(len(hidden), -1) @ layer.output
        hidden = hidden + swiglu(rms_norm(hidden, layer.mlp_norm, config.rms_norm_eps), layer.gate_up, layer.down)
    return hidden, made


@st.composite
def cuts(draw, decoder, prompt):
    """Some tokens that may not look at some others, in some layers."""
    tokens = len(prompt.hidden)
    part = np.array(draw(st.lists(st.integers(0, 2), min_size=tokens, max_size=tokens)))
    return knock_outs.Cut(part == 1, part == 2, draw(st.frozensets(st.integers(0, len(decoder.layers) - 1))))


@given(cases(), st.data())
def test_a_knock_out_is_a_mask(case, data):
    decoder, prompt, _ = case
    cut = data.draw(cuts(decoder, prompt))
    forbidden, everything = np.outer(cut.queries, cut.keys), np.zeros((len(prompt.hidden),) * 2, bool)
    masked, _ = plain_prefill(decoder, prompt, lambda index: ~(forbidden if index in cut.layers else everything))
    assert_close(knock_outs.knocked_out(decoder, migration.layer_inputs(decoder, prompt), *cut), masked)


@given(seeing)
def test_a_knock_out_of_nothing_is_the_model(case):
    decoder, prompt, _ = case
    entering = migration.layer_inputs(decoder, prompt)
    image, question, last = knock_outs.roles(prompt.is_visual)
    plain = prefill(decoder, prompt).hidden
    for nothing in ((last, image, ()), (np.zeros_like(last), image, [0]), (last, np.zeros_like(last), [0])):
        assert_close(knock_outs.knocked_out(decoder, entering, *nothing), plain)


@given(seeing)
def test_knocking_out_all_deep_layers_is_withdrawal(case):
    """What the text computes from layer K on is the same, whether the image has left or is merely out of sight."""
    decoder, prompt, layer = case
    image, deep = prompt.is_visual, range(layer, len(decoder.layers))
    out_of_sight = knock_outs.knocked_out(decoder, migration.layer_inputs(decoder, prompt), ~image, image, deep)
    assume(layer < len(decoder.layers))
    assert_close(out_of_sight[~image], prefill(decoder, prompt, withdraw(layer)).hidden)


@given(seeing)
def test_who_cannot_look_cannot_tell(case):
    """Cut off everywhere, the last token cannot tell another image and question, nor all the text another image."""
    decoder, prompt, _ = case
    image, question, last = knock_outs.roles(prompt.is_visual)
    everywhere = range(len(decoder.layers))
    for who, unseen in ((last, image | question), (question | last, image)):
        changed = EmbeddedPrompt(np.where(unseen[:, None], 3 * prompt.hidden + 1, prompt.hidden), image)
        states = [
            knock_outs.knocked_out(decoder, migration.layer_inputs(decoder, each), who, unseen, everywhere)[who]
            for each in (prompt, changed)
        ]
        assert np.array_equal(*states)


def test_roles_of_a_prompt_by_hand():
    is_visual = np.array([False, True, True, False, False, True, False, False, False])
    image, question, last = (list(np.flatnonzero(role)) for role in knock_outs.roles(is_visual, predictions=2))
    assert (image, question, last) == ([1, 2, 5], [3, 4, 6], [7, 8])


def test_a_token_cannot_be_forbidden_to_see_itself():
    decoder = random_decoder(DecoderConfig(9, 8, 2, 2, 2, 4, 8, 1e-5, 1e4, 64))
    entering = migration.layer_inputs(decoder, random_prompt(decoder, [True, False]))
    with pytest.raises(InputError, match="always sees itself"):
        knock_outs.knocked_out(decoder, entering, np.array([True, True]), np.array([True, False]), [0])


@settings(max_examples=40)
@given(seeing)
def test_answer_probability_is_that_of_decoding_it(case):
    decoder, asked, _ = case
    answer = search.run_in_full(decoder, asked, most_tokens=3).answer
    run = prefill(decoder, asked)
    expected, scores = 1.0, run.logits[-1]
    for token in answer:
        expected *= softmax(scores)[token]
        said = EmbeddedPrompt(decoder.embedding[[token]], np.zeros(1, bool))
        scores = prefill(decoder, said, None, run.cache).logits[0]
    text = ~knock_outs.with_answer(decoder, asked, answer).is_visual
    whole, (left,) = knock_outs.knock_outs(decoder, asked, answer, [knock_outs.Cut(text, ~text, ())])
    assert whole == left == pytest.approx(expected, rel=1e-3, abs=1e-6)


@settings(max_examples=40)
@given(seeing, st.integers(1, 3))
def test_if_only_the_last_token_may_look_the_others_are_cut_off(case, most_tokens):
    decoder, prompt, layer = case
    answer, deep = search.run_in_full(decoder, prompt, most_tokens).answer, range(layer, len(decoder.layers))
    whole, left = instruments.only_one_attends(decoder, prompt, answer, deep)
    image, question, last = knock_outs.roles(knock_outs.with_answer(decoder, prompt, answer).is_visual, len(answer))
    assert len(left) == question.sum() + 1
    expected = knock_outs.knock_outs(decoder, prompt, answer, [knock_outs.Cut(question, image, deep)])
    assert (whole, left[-1]) == (expected[0], expected[1][0])


# --- the swap


@st.composite
def pairs(draw, places=places_with_visual):
    """(decoder, two prompts that differ in their visual tokens alone, some layers)."""
    decoder, prompt, _ = draw(cases(places=places))
    other = random_prompt(decoder, prompt.is_visual, draw(st.integers(0, 2**32 - 1))).hidden
    other = EmbeddedPrompt(np.where(prompt.is_visual[:, None], other, prompt.hidden), prompt.is_visual)
    return decoder, prompt, other, draw(st.frozensets(st.integers(0, len(decoder.layers) - 1)))


def swap(decoder, prompt, other, layers):
    """The text of a prefill in which the visual tokens are swapped; (text tokens, width)."""
    method = migration.swapped(*(migration.layer_inputs(decoder, each) for each in (prompt, other)), layers)
    return prefill(decoder, prompt, method).hidden[~prompt.is_visual]


@given(pairs())
def test_a_picture_swapped_with_itself_changes_nothing(pair):
    decoder, prompt, _, layers = pair
    assert_close(swap(decoder, prompt, prompt, layers), prefill(decoder, prompt).hidden[~prompt.is_visual])


@given(pairs())
def test_swapped_in_all_layers_it_is_the_other_picture_and_in_none_its_own(pair):
    decoder, prompt, other, _ = pair
    text, everywhere = ~prompt.is_visual, range(len(decoder.layers))
    assert_close(swap(decoder, prompt, other, everywhere), prefill(decoder, other).hidden[text])
    assert_close(swap(decoder, prompt, other, ()), prefill(decoder, prompt).hidden[text])


@given(pairs(places=one_image))  # in which visual tokens see no text of the question
def test_a_swap_gives_the_text_other_keys_and_values(pair):
    decoder, prompt, other, layers = pair
    image, (_, made) = prompt.is_visual, plain_prefill(decoder, other)

    def text_reads(index, *own):
        return [np.where(image[:, None] & (index in layers), theirs, ours) for ours, theirs in zip(own, made[index])]

    expected, _ = plain_prefill(decoder, prompt, text_reads=text_reads)
    assert_close(swap(decoder, prompt, other, layers), expected[~image])


@settings(max_examples=60)
@given(pairs(), st.integers(1, 3))
def test_what_is_said_after_a_swap_is_what_decoding_says(pair, most_tokens):
    decoder, prompt, other, layers = pair
    own, others = (search.run_in_full(decoder, each, most_tokens) for each in (prompt, other))
    said, _, is_clear = greedy(decoder, prompt, migration.swapped(own.entering, others.entering, layers), most_tokens)
    assume(is_clear)
    for answer in (own.answer, others.answer, said):
        longer = migration.layer_inputs(decoder, knock_outs.with_answer(decoder, prompt, answer))
        says = instruments.says_after_swap(decoder, longer, others.entering, answer, layers)
        assert says == (answer == said[: len(answer)])


def test_pictures_of_unlike_sizes_are_not_swapped():
    decoder = random_decoder(DecoderConfig(9, 8, 2, 2, 2, 4, 8, 1e-5, 1e4, 64))
    own, other = (
        migration.layer_inputs(decoder, random_prompt(decoder, is_visual))
        for is_visual in ([True, False, False], [True, True, False])
    )
    with pytest.raises(InputError, match="same places"):
        migration.swapped(own, other, [0])


# --- the lens


@given(seeing)
def test_lens_ends_with_what_the_model_says(case):
    decoder, asked, _ = case
    seen = instruments.lens(decoder, asked)  # (layers + 1, vocabulary)
    assert seen.shape == (len(decoder.layers) + 1, decoder.config.vocabulary)
    np.testing.assert_allclose(seen[-1], softmax(prefill(decoder, asked, None).logits[-1]), atol=1e-4)
    np.testing.assert_allclose(seen[0], softmax(logits(decoder, asked.hidden[-1:])[0]), atol=1e-5)
    np.testing.assert_allclose(seen.sum(1), 1, atol=1e-6)


@settings(max_examples=40)
@given(seeing)
def test_the_lens_on_the_image_reads_every_visual_token(case):
    decoder, prompt, _ = case
    words = instruments.visual_lens(decoder, migration.layer_inputs(decoder, prompt))
    states = [prompt.hidden]
    prefill(decoder, prompt, observe=lambda name, array: name.endswith("hidden") and states.append(array))
    for layer, hidden in enumerate(states):
        read = softmax(logits(decoder, hidden[prompt.is_visual]))
        np.testing.assert_allclose(words.probabilities[layer], read.max(-1), rtol=1e-4)
        np.testing.assert_allclose(read[np.arange(len(read)), words.token_ids[layer]], read.max(-1), rtol=1e-4)


# --- redundancy


def greedy(decoder, asked, method, most_tokens):
    """The plain way: a prefill of its own, then token after token.

    Returns token ids, the first token's logits, and whether no token was chosen by a hair (`has_clear_winner`).
    """
    run = prefill(decoder, asked, method)
    scores = [run.logits[-1]]  # (vocabulary,) of each token
    answer = [int(scores[0].argmax())]
    while len(answer) < most_tokens:
        said = EmbeddedPrompt(decoder.embedding[answer[-1:]], np.zeros(1, bool))
        scores.append(prefill(decoder, said, method, run.cache).logits[0])
        answer.append(int(scores[-1].argmax()))
    return answer, scores[0], all(map(has_clear_winner, scores))


@settings(max_examples=60)
@given(seeing, st.sampled_from([withdraw, renumbered, random_tokens, lambda layer: freeze([layer])]), st.integers(1, 4))
def test_what_is_shared_between_methods_changes_no_answer(case, make, most_tokens):
    decoder, asked, _ = case
    methods = [make(layer) for layer in range(len(decoder.layers) + 1)]
    full, full_first, is_full_clear = greedy(decoder, asked, None, most_tokens)
    for method, outcome in zip(methods, instruments.redundancy(decoder, asked, methods, (), most_tokens)):
        answer, first, is_clear = greedy(decoder, asked, method, most_tokens)
        if is_clear and is_full_clear:
            assert outcome.answer == answer and outcome.agrees == (answer == full)
        assert outcome.kl == pytest.approx(search.divergence(first, full_first), rel=1e-3, abs=1e-5)


@settings(max_examples=40)
@given(seeing)
def test_redundancy_counts_what_a_withdrawal_changes(case):
    decoder, asked, layer = case
    layers = len(decoder.layers)
    methods = [withdraw(layers), withdraw(layer), renumbered(layer), random_tokens(layer)]
    nothing, method, *ablations = instruments.redundancy(decoder, asked, methods, most_tokens=3)
    assert nothing.agrees and nothing.kl == 0
    if layer < layers:
        assert method.kl == pytest.approx(search.kl_curve(decoder, asked)[layer], rel=1e-5, abs=1e-6)
    assert method.agrees == (method.answer == nothing.answer)
    assert nothing.answer == search.run_in_full(decoder, asked, 3).answer
    if layer == layers:
        assert all(outcome == nothing for outcome in ablations)


# --- the chapters about it


TINY, SMOL = "05-attention-leaves.md", "07-a-language-model-that-sees.md"
WEIGHTS = {TINY: "minivtw-tiny/model.safetensors", SMOL: "minivtw-smol/graft.safetensors"}
SHORT = {"settling says", "routes", "alone", "alone says", "swaps", "wrong", "redundancy says"}
LONG = {"weights", "curves", "settling", "knock-outs", "reading", "routes", "words", "wrong", "redundancy"}
MARKS = {
    "04-which-layer.md": {"criteria"},
    TINY: SHORT | {"migration says"},
    SMOL: SHORT,
    f"data/{TINY}": LONG,
    f"data/{SMOL}": LONG | {"criteria", "redundancy-ablations", "perplexity", "chats"},
}


@pytest.mark.parametrize("chapter", WEIGHTS)
def test_the_numbers_are_those_of_the_weights_in_the_folder(chapter):
    """If this fails, the weights have changed: run `docs/pictures/phenomena.py` again."""
    page = (ROOT / "docs" / "data" / chapter).read_text(encoding="utf-8")
    assert hashlib.sha256((ROOT / "weights" / WEIGHTS[chapter]).read_bytes()).hexdigest() in page


@pytest.mark.parametrize("page", MARKS)
def test_tables_are_filled_in_and_stay_between_their_marks(page):
    """What the scripts of docs/pictures fill in can be filled in again."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    filled = dict(re.findall(r"<!-- (.+?) -->\n((?:.+\n)+)<!-- end -->", text))
    assert MARKS[page] <= set(filled)
    assert not [name for name in MARKS[page] if "to be measured" in filled[name].lower()]
    scripts = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "pictures").glob("*.py"))
    assert not [name for name in MARKS[page] if f'"{name.removesuffix(" says")}' not in scripts]


@pytest.mark.parametrize("name", ["tiny", "smol"])
def test_the_swaps_shown_are_those_that_were_measured(name):
    """Every pair is kept: the table of the chapter can be had from them again."""
    measured = json.loads((ROOT / "docs" / "data" / f"swaps-{name}.json").read_text(encoding="utf-8"))
    chapter = {"tiny": TINY, "smol": SMOL}[name]
    assert measured["weights"] == hashlib.sha256((ROOT / "weights" / WEIGHTS[chapter]).read_bytes()).hexdigest()
    page = (ROOT / "docs" / chapter).read_text(encoding="utf-8")
    table = re.search(r"<!-- swaps -->\n(.*?)<!-- end -->", page, re.S).group(1)
    shown = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert [row[0] for row in shown] == list(measured["rows"])
    for kind, _, share, _, pairs in shown:
        rows = np.array([row for row in measured["rows"][kind] if row])[: int(pairs)]
        assert len(rows) == int(pairs) and f"{rows.mean(0).max():.0%}" == share.split()[0]
