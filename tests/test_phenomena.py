"""The instruments that make the paper's observations visible, each against a plainer way to get the same number."""

import hashlib
import pathlib
import re

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from minivtw import search
from minivtw.analysis import migration, redundancy, settling
from minivtw.methods import freeze, random_tokens, withdraw
from minivtw.model import decoder as decoder_module
from minivtw.model.decoder import logits
from minivtw.model.layers import softmax
from minivtw.model.tokens import EmbeddedPrompt

from .random_models import assert_close, cases, places_with_visual, prefill, renumbered

ROOT = pathlib.Path(__file__).parent.parent
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
    maps = settling.image_maps(decoder, asked, withdraw(layer))  # (1, layers, visual tokens)
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


def masked_prefill(decoder, asked, first, stop, monkeypatch):
    """The plain way to knock out: in these layers, text queries get -inf where the visual keys are."""
    index = -1

    def masked_attention(queries, keys, values, sees):
        nonlocal index
        index += 1
        visible = np.arange(keys.shape[1]) < sees[:, None]
        if first <= index < stop:
            visible[np.ix_(~asked.is_visual, asked.is_visual)] = False
        shared = len(queries) // len(keys)
        scores = queries @ keys.repeat(shared, 0).swapaxes(1, 2) / np.float32(queries.shape[-1] ** 0.5)
        context = softmax(np.where(visible, scores, np.float32(-np.inf))) @ values.repeat(shared, 0)
        return context.swapaxes(0, 1).reshape(len(visible), -1)

    monkeypatch.setattr(decoder_module, "attention", masked_attention)
    return prefill(decoder, asked).hidden


@given(seeing, st.data())
def test_knock_out_is_a_mask(case, data):
    decoder, asked, first = case
    stop = data.draw(st.integers(first, len(decoder.layers)))
    with pytest.MonkeyPatch.context() as patch:
        masked = masked_prefill(decoder, asked, first, stop, patch)
    assert_close(migration.knocked_out(decoder, asked, first, stop), masked)


@given(seeing)
def test_knocking_out_all_deep_layers_is_withdrawal(case):
    """What the text computes from layer K on is the same, whether the image has left or is merely out of sight."""
    decoder, asked, layer = case
    assume(layer < len(decoder.layers))
    out_of_sight = migration.knocked_out(decoder, asked, layer, len(decoder.layers))[~asked.is_visual]
    assert_close(out_of_sight, prefill(decoder, asked, withdraw(layer)).hidden)


@settings(max_examples=40)
@given(seeing)
def test_answer_probability_is_that_of_decoding_it(case):
    decoder, asked, _ = case
    answer = search.walk(decoder, asked, most_tokens=3).answer
    run = prefill(decoder, asked)
    expected, scores = 1.0, run.logits[-1]
    for token in answer:
        expected *= softmax(scores)[token]
        said = EmbeddedPrompt(decoder.embedding[[token]], np.zeros(1, bool))
        scores = prefill(decoder, said, None, run.cache).logits[0]
    nothing_cut, cut = migration.knock_outs(decoder, asked, answer, [(0, 0), (0, len(decoder.layers))])
    assert nothing_cut == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert cut[0] == nothing_cut


@given(seeing)
def test_lens_ends_with_what_the_model_says(case):
    decoder, asked, _ = case
    seen = migration.lens(decoder, asked)  # (layers + 1, vocabulary)
    assert seen.shape == (len(decoder.layers) + 1, decoder.config.vocabulary)
    np.testing.assert_allclose(seen[-1], softmax(prefill(decoder, asked, None).logits[-1]), atol=1e-4)
    np.testing.assert_allclose(seen[0], softmax(logits(decoder, asked.hidden[-1:])[0]), atol=1e-5)
    np.testing.assert_allclose(seen.sum(1), 1, atol=1e-6)


# --- redundancy


def greedy(decoder, asked, method, most_tokens):
    """The plain way: a prefill of its own, then token after token. Returns token ids and the first token's logits."""
    run = prefill(decoder, asked, method)
    first = scores = run.logits[-1]  # (vocabulary,)
    answer = [int(scores.argmax())]
    while len(answer) < most_tokens:
        said = EmbeddedPrompt(decoder.embedding[answer[-1:]], np.zeros(1, bool))
        answer.append(int(prefill(decoder, said, method, run.cache).logits[0].argmax()))
    return answer, first


@settings(max_examples=60)
@given(seeing, st.sampled_from([withdraw, renumbered, random_tokens, lambda layer: freeze([layer])]), st.integers(1, 4))
def test_what_is_shared_between_methods_changes_no_answer(case, make, most_tokens):
    decoder, asked, _ = case
    methods = [make(layer) for layer in range(len(decoder.layers) + 1)]
    full, full_first = greedy(decoder, asked, None, most_tokens)
    for method, outcome in zip(methods, redundancy.redundancy(decoder, asked, methods, (), most_tokens)):
        answer, first = greedy(decoder, asked, method, most_tokens)
        assert outcome.answer == answer and outcome.agrees == (answer == full)
        assert outcome.kl == pytest.approx(search.divergence(first, full_first), rel=1e-3, abs=1e-5)


@settings(max_examples=40)
@given(seeing)
def test_redundancy_counts_what_a_withdrawal_changes(case):
    decoder, asked, layer = case
    layers = len(decoder.layers)
    methods = [withdraw(layers), withdraw(layer), renumbered(layer), random_tokens(layer)]
    nothing, method, *ablations = redundancy.redundancy(decoder, asked, methods, most_tokens=3)
    assert nothing.agrees and nothing.kl == 0
    if layer < layers:
        assert method.kl == pytest.approx(search.kl_curve(decoder, asked)[layer], rel=1e-5, abs=1e-6)
    assert method.agrees == (method.answer == nothing.answer)
    assert nothing.answer == search.walk(decoder, asked, 3).answer
    if layer == layers:
        assert all(outcome == nothing for outcome in ablations)


# --- the chapters about it


WEIGHTS = {
    "05-attention-leaves.md": "minivtw-tiny/model.safetensors",
    "09-a-language-model-that-sees.md": "minivtw-smol/graft.safetensors",
}
MARKS = {
    "04-which-layer.md": {"criteria", "curves"},
    "05-attention-leaves.md": {
        *("weights", "settling", "settling says", "migration says", "knock-outs", "lens", "reading"),
        *("redundancy", "redundancy says"),
    },
    "09-a-language-model-that-sees.md": {
        *("weights", "settling", "settling says", "migration says", "knock-outs", "lens", "reading", "criteria", "curves"),
        *("redundancy-smol", "redundancy-smol says", "families-smol", "perplexity", "chats"),
        *("redundancy-smol-ablations", "redundancy-smol-ablations says"),
    },
}


@pytest.mark.parametrize("chapter", WEIGHTS)
def test_the_numbers_are_those_of_the_weights_in_the_folder(chapter):
    """If this fails, the weights have changed: run `docs/pictures/phenomena.py` again."""
    page = (ROOT / "docs" / chapter).read_text(encoding="utf-8")
    assert hashlib.sha256((ROOT / "weights" / WEIGHTS[chapter]).read_bytes()).hexdigest() in page


@pytest.mark.parametrize("chapter", MARKS)
def test_tables_are_filled_in_and_stay_between_their_marks(chapter):
    """What `docs/pictures/phenomena.py` and `still_talks.py` fill in can be filled in again."""
    page = (ROOT / "docs" / chapter).read_text(encoding="utf-8")
    filled = re.findall(r"<!-- (.+?) -->\n((?:.+\n)+)<!-- end -->", page)
    assert sorted(name for name, _ in filled if name in MARKS[chapter]) == sorted(MARKS[chapter])
    scripts = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "pictures").glob("*.py"))
    names = re.findall(r'fill\(\s*[^,]+,\s*f?"([^"]+)"', scripts)
    assert {re.sub("-smol(-ablations)?", "", name) for name in MARKS[chapter]} <= {re.sub("{suffix}", "", name) for name in names}
