"""The search for K: against the naive search, against recordings of the published one, and its rules and costs."""

import json
import os
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file

import minivtw
from minivtw import InputError
from minivtw.checkpoints import llama
from minivtw.checkpoints.checkpoint import Checkpoint
from minivtw.checkpoints.fields import Fields
from minivtw.counting import layer_flops, prompt_flops
from minivtw.methods.withdrawal import adaptive, withdraw
from minivtw.model import decoder as decoder_module
from minivtw.model.cache import KVCache
from minivtw.model.decoder import DecoderConfig, logits
from minivtw.model.tokens import EmbeddedPrompt
from minivtw.search import layer as search

from .bench_search import naive_flops, naive_kl_curve, search_flops
from .random_models import cases, places_with_visual, prefill, random_decoder, random_prompt

GOLDEN = pathlib.Path(os.environ.get("MINIVTW_GOLDEN", pathlib.Path(__file__).parent / "golden" / "vtw"))
CONFIG = DecoderConfig(
    vocabulary=31, width=16, layers=6, heads=4, kv_heads=2, head_dim=8, mlp_width=24,
    rms_norm_eps=1e-5, rope_theta=1e4, max_positions=512,
)  # fmt: skip
PICTURE = [False, False, *[True] * 7, False, True, True, False, False, False]


@pytest.fixture
def decoder():
    return random_decoder(CONFIG)


@pytest.fixture
def asked(decoder):
    return random_prompt(decoder, PICTURE)


def test_published_search_is_matched():
    folder = GOLDEN / "search10"
    meta, expected = (
        json.loads((folder / "meta.json").read_text(encoding="utf-8")),
        load_file(folder / "expected.safetensors"),
    )
    config = llama.decoder_config(Fields(meta["config"], str(folder)))
    decoder = Checkpoint(folder).fill(lambda take: llama.decoder(config, take))
    samples = []
    while f"findk.inputs_embeds.{len(samples)}" in expected:
        hidden = expected[f"findk.inputs_embeds.{len(samples)}"]  # (tokens, width)
        is_visual = np.zeros(len(hidden), bool)
        is_visual[meta["system_tokens"] : meta["system_tokens"] + meta["image_tokens"]] = True
        samples.append(EmbeddedPrompt(hidden, is_visual))
    first = meta["findk"]["first_layer"]
    curves = np.array([search.kl_curve(decoder, asked) for asked in samples])[:, first:]
    assert curves.shape == expected["findk.kl"].shape
    assert np.abs(curves - expected["findk.kl"]).max() < 1e-5
    assert np.abs(search.mean_curve(decoder, samples, "kl")[first:] - meta["findk"]["kl_mean"]).max() < 1e-5


@given(cases())
def test_shared_prefix_changes_nothing(case):
    decoder, asked, _ = case
    assert np.abs(search.kl_curve(decoder, asked) - naive_kl_curve(decoder, asked)).max() < 1e-6


@settings(max_examples=50)
@given(cases(places=places_with_visual), st.integers(2, 5))
def test_answer_criterion_is_the_worst_token_of_the_teacher_forced_answer(case, most_tokens):
    """Recomputed the plain way: the answer's tokens appended to the prompt, and the whole run once more for each K."""
    decoder, asked, layer = case
    if layer == len(decoder.layers):
        return
    answer = search.run_in_full(decoder, asked, most_tokens).answer
    assert len(answer) == most_tokens
    hidden = np.concatenate([asked.hidden, decoder.embedding[answer[:-1]]])
    forced = EmbeddedPrompt(hidden, np.concatenate([asked.is_visual, np.zeros(most_tokens - 1, bool)]))
    full = prefill(decoder, forced, None).logits[-most_tokens:]
    withdrawn = prefill(decoder, forced, withdraw(layer)).logits[-most_tokens:]
    # Token by token or all at once, float32 sums run in another order: what `assert_close` allows, in either logits.
    tolerance = 2 * 2e-5 * max(1, np.abs(full).max())
    said = full[np.arange(most_tokens), answer]
    assert np.all(said >= full.max(-1) - tolerance)  # greedy, token by token, but for ties that rounding decides
    worst = search.divergence(withdrawn, full).max()
    assert abs(search.kl_curve(decoder, asked, most_tokens)[layer] - worst) < tolerance


def test_answer_ends_with_an_end_token(decoder, asked):
    answer = search.run_in_full(decoder, asked, 5).answer
    cut = search.run_in_full(decoder, asked, 5, stop_ids={answer[2]})
    assert cut.answer == answer[: answer.index(answer[2]) + 1]
    assert len(cut.full) == len(cut.answer) and len(cut.answer_states[0]) == len(cut.answer) - 1


def test_first_token_can_hide_a_loss(decoder, asked):
    first, worst = search.kl_curve(decoder, asked), search.kl_curve(decoder, asked, 6)
    assert (worst >= first - 1e-6).all() and worst.max() > first.max()


def test_divergence_is_kl_in_nats():
    withdrawn, full = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.25, 0.5])
    expected = 0.5 * np.log(2) - 0.25 * np.log(2)
    assert search.divergence(np.log(withdrawn), np.log(full)) == pytest.approx(expected, abs=1e-12)
    assert search.divergence(np.log(withdrawn) + 900, np.log(withdrawn)) == pytest.approx(0, abs=1e-12)


@given(cases())
def test_visual_share_is_where_the_attention_goes(case):
    """Summed by hand, key by key, over the queries that can see the image."""
    decoder, asked, _ = case
    attended = []
    prefill(
        decoder,
        asked,
        None,
        observe=lambda name, array: name.endswith("attention") and attended.append(array),
    )
    first = int(asked.is_visual.argmax()) if asked.is_visual.any() else len(asked.is_visual)
    queries = [query for query in range(first, len(asked.is_visual)) if not asked.is_visual[query]]
    for index, share in enumerate(search.attention_curve(decoder, asked)):
        by_hand = [
            attended[index][:, query, key].mean() for query in queries for key in np.flatnonzero(asked.is_visual)
        ]
        assert share == pytest.approx(np.sum(by_hand) / max(len(queries), 1), abs=1e-5)
        assert 0 <= share <= 1 + 1e-6


@pytest.mark.parametrize(
    "curve, threshold, paper, settled",
    [
        ([9, 4, 1, 3, 0.5, 0.2], 1, 2, 4),  # the paper's rule takes the first dip, ours waits for calm
        ([9, 8, 7], 5, None, None),
        ([0, 0, 9], 5, 0, None),
        ([0, 0, 0], 1, 0, 0),
    ],
)
def test_rules(curve, threshold, paper, settled):
    assert search.first_at_most(curve, threshold) == paper
    assert search.first_settled(curve, threshold) == settled


def test_threshold_itself_meets_the_papers_rule():
    assert search.first_at_most([0.5, 0.003], 0.003) == 1


def test_no_layer_meets_it():
    with pytest.raises(InputError, match=r"kl criterion's threshold of 0.001: the lowest value is 0.25, at layer 1$"):
        search.choose_layer(np.array([0.5, 0.25, 0.75]), "kl", 0.001)


def test_flops_are_those_of_the_layers_that_run(decoder, asked, monkeypatch):
    counted = 0

    def counting_layer(*arguments):
        nonlocal counted
        result = decoder_layer(*arguments)
        counted += layer_flops(CONFIG, result.ran[-1])
        return result

    decoder_layer = decoder_module.decoder_layer
    monkeypatch.setattr(decoder_module, "decoder_layer", counting_layer)
    heads, text = (CONFIG.layers + 1) * prompt_flops(CONFIG, []), int((~asked.is_visual).sum())
    search.kl_curve(decoder, asked)
    assert counted + heads == search_flops(CONFIG, len(asked.hidden), text)
    counted = 0
    naive_kl_curve(decoder, asked)
    assert counted + heads == naive_flops(CONFIG, len(asked.hidden), text)


@given(case=cases(layers=st.integers(2, 5)), share=st.sampled_from([0.0, 0.3, 0.6, 1.0]), quiet=st.integers(1, 2))
def test_adaptive_prefill_is_a_withdrawal_at_the_layer_it_decides(case, share, quiet):
    decoder, asked, _ = case
    run, shares = prefill(decoder, asked, adaptive(share, quiet)), search.attention_curve(decoder, asked)
    calm = [k for k in range(quiet, len(shares)) if (shares[k - quiet : k] < share).all()]
    fixed = prefill(decoder, asked, withdraw(calm[0]) if calm else None)
    assert np.array_equal(run.hidden, fixed.hidden)
    assert run.cache.tokens_per_layer == fixed.cache.tokens_per_layer


def test_adaptive_prefill_decides_anew_for_the_next_image_of_a_conversation(decoder):
    method, cache = adaptive(share=1, quiet=2), KVCache(CONFIG)  # every layer is quiet
    prefill(decoder, random_prompt(decoder, [False] * 4, seed=1), method, cache)
    prefill(decoder, random_prompt(decoder, PICTURE), method, cache)
    text = PICTURE.count(False)
    assert cache.tokens_per_layer == [4 + len(PICTURE)] * 2 + [4 + text] * (CONFIG.layers - 2)
    prefill(decoder, random_prompt(decoder, PICTURE), adaptive(share=0.0), cache)
    assert cache.tokens_per_layer == [4 + 2 * len(PICTURE)] * 2 + [4 + text + len(PICTURE)] * (CONFIG.layers - 2)


def test_logits_of_a_tail_belong_to_the_predictions(decoder, asked):
    full_run = search.run_in_full(decoder, asked, 3)
    fixed = prefill(decoder, asked, withdraw(4))
    np.testing.assert_allclose(
        search.logits_from_layer(decoder, full_run, withdraw(4))[0][0],
        logits(decoder, fixed.hidden[-1:])[0],
        atol=1e-5,
    )


def test_adaptive_answer_is_that_of_the_layer_it_decides():
    vlm, image = minivtw.load(), Image.new("RGB", (40, 40), "red")
    decided = vlm.answer(image, "What color is the star?", method="adaptive:share=1,quiet=3", max_new_tokens=6)
    fixed = vlm.answer(image, "What color is the star?", withdraw=3, max_new_tokens=6)
    assert decided.token_ids == fixed.token_ids
    assert decided.stats["cache"] == fixed.stats["cache"] and decided.stats["prefill"] == fixed.stats["prefill"]
    assert (decided.stats["withdraw_layer"], fixed.stats["withdraw_layer"]) == (None, 3)
    never = vlm.answer(image, "What color is the star?", method="adaptive:share=0", max_new_tokens=6)
    assert never.token_ids == vlm.answer(image, "What color is the star?", withdraw=None, max_new_tokens=6).token_ids
