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
from minivtw import InputError, generate, search
from minivtw.model import decoder as decoder_module
from minivtw.counting import head_flops, layer_flops
from minivtw.model.cache import KVCache
from minivtw.checkpoints.checkpoint import Checkpoint
from minivtw.model.decoder import DecoderConfig, logits
from minivtw.checkpoints import llama
from minivtw.checkpoints.fields import Fields
from minivtw.search import Asked
from minivtw.methods import Withdrawal

from .bench_search import naive_kl_curve
from .doors import run
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
    meta, expected = json.loads((folder / "meta.json").read_text()), load_file(folder / "expected.safetensors")
    config = llama.decoder_config(Fields(meta["config"], str(folder)))
    decoder = Checkpoint(folder).fill(lambda take: llama.decoder(config, take))
    samples = []
    while f"findk.inputs_embeds.{len(samples)}" in expected:
        hidden = expected[f"findk.inputs_embeds.{len(samples)}"]  # (tokens, width)
        is_visual = np.zeros(len(hidden), bool)
        is_visual[meta["system_tokens"] : meta["system_tokens"] + meta["image_tokens"]] = True
        samples.append(Asked(hidden, is_visual))
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
    answer = search.walk(decoder, asked, most_tokens).answer
    assert len(answer) == most_tokens
    hidden = np.concatenate([asked.hidden, decoder.embedding[answer[:-1]]])
    forced = Asked(hidden, np.concatenate([asked.is_visual, np.zeros(most_tokens - 1, bool)]))
    full = prefill(decoder, forced, Withdrawal(None)).logits[-most_tokens:]
    withdrawn = prefill(decoder, forced, Withdrawal(layer)).logits[-most_tokens:]
    assert list(full.argmax(-1)) == answer  # greedy, token by token
    worst = search.divergence(withdrawn, full).max()
    # Token by token or all at once, float32 sums run in another order: what `assert_close` allows, in either logits.
    tolerance = 2 * 2e-5 * max(1, np.abs(full).max())
    assert abs(search.kl_curve(decoder, asked, most_tokens)[layer] - worst) < tolerance


def test_answer_ends_with_an_end_token(decoder, asked):
    answer = search.walk(decoder, asked, 5).answer
    cut = search.walk(decoder, asked, 5, stop_ids={answer[2]})
    assert cut.answer == answer[: answer.index(answer[2]) + 1]
    assert cut.predictions == len(cut.answer)


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
        Withdrawal(None),
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
        search.choose(np.array([0.5, 0.25, 0.75]), "kl", 0.001)


def test_flops_are_those_of_the_layers_that_run(decoder, asked, monkeypatch):
    counted = 0

    def counting_layer(hidden, positions, layer, cache, config):
        nonlocal counted
        result = decoder_layer(hidden, positions, layer, cache, config)
        counted += layer_flops(config, len(hidden), len(cache))
        return result

    decoder_layer = decoder_module.decoder_layer
    monkeypatch.setattr(decoder_module, "decoder_layer", counting_layer)
    heads, text = (CONFIG.layers + 1) * head_flops(CONFIG), int((~asked.is_visual).sum())
    search.kl_curve(decoder, asked)
    assert counted + heads == search.search_flops(CONFIG, len(asked.hidden), text)
    counted = 0
    naive_kl_curve(decoder, asked)
    assert counted + heads == search.naive_flops(CONFIG, len(asked.hidden), text)


def adaptive(decoder, asked, cache=None):
    """(hidden states at the end, K, cache)"""
    cache = cache or KVCache(decoder.config.layers)
    positions = cache.claim(len(asked.hidden))
    return *search.forward_adaptive(decoder, asked.hidden, positions, cache, asked.is_visual), cache


@given(case=cases(layers=st.integers(2, 5)), quiet=st.sampled_from([0.0, 0.3, 0.6, 1.1]))
def test_adaptive_prefill_is_a_withdrawal_at_the_layer_it_decides(case, quiet):
    decoder, asked, _ = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "QUIET_SHARE", quiet)
        hidden, layer, cache = adaptive(decoder, asked)
        shares = search.attention_curve(decoder, asked)
    fixed = prefill(decoder, asked, Withdrawal(layer))
    np.testing.assert_allclose(hidden, fixed.hidden, rtol=1e-6, atol=1e-6)
    assert cache.tokens_per_layer == fixed.cache.tokens_per_layer
    if layer is None:
        assert not any((shares[i : i + 2] < quiet).all() for i in range(len(shares) - 2))
    else:
        assert (shares[layer - 2 : layer] < quiet).all()
        assert not any((shares[i : i + 2] < quiet).all() for i in range(layer - 2))


def test_adaptive_prefill_goes_on_behind_a_conversation(decoder, monkeypatch):
    monkeypatch.setattr(search, "QUIET_SHARE", 1.1)  # every layer is quiet
    cache = KVCache(CONFIG.layers)
    before = random_prompt(decoder, [False] * 4, seed=1)
    prefill(decoder, before, Withdrawal(None), cache)
    _, layer, _ = adaptive(decoder, random_prompt(decoder, PICTURE), cache)
    assert layer == search.QUIET_LAYERS
    text = PICTURE.count(False)
    assert cache.tokens_per_layer == [4 + len(PICTURE)] * layer + [4 + text] * (CONFIG.layers - layer)


def test_logits_of_a_tail_belong_to_the_predictions(decoder, asked):
    walked = search.walk(decoder, asked, 3)
    fixed = prefill(decoder, asked, Withdrawal(4))
    np.testing.assert_allclose(search.tail(decoder, walked, 4)[0], logits(decoder, fixed.hidden[-1:])[0], atol=1e-5)


def embedded_vlm(monkeypatch, quiet_share):
    monkeypatch.setattr(search, "QUIET_SHARE", quiet_share)
    return minivtw.load(), Image.new("RGB", (40, 40), "red")


def test_adaptive_answer_is_that_of_the_layer_it_reports(monkeypatch):
    vlm, image = embedded_vlm(monkeypatch, quiet_share=1.1)
    adaptive = vlm.answer(image, "What color is the star?", withdraw="adaptive", max_new_tokens=6)
    fixed = vlm.answer(image, "What color is the star?", withdraw=search.QUIET_LAYERS, max_new_tokens=6)
    assert adaptive.token_ids == fixed.token_ids
    for key in ("withdraw_layer", "cache", "flops"):
        assert adaptive.stats[key] == fixed.stats[key]


def test_adaptive_answer_without_a_quiet_layer_withdraws_nothing(monkeypatch):
    vlm, image = embedded_vlm(monkeypatch, quiet_share=0.0)
    adaptive = vlm.answer(image, "What color is the star?", withdraw="adaptive", max_new_tokens=6)
    assert adaptive.stats["withdraw_layer"] is None
    assert adaptive.token_ids == vlm.answer(image, "What color is the star?", withdraw=None, max_new_tokens=6).token_ids


def test_first_image_decides_for_the_conversation(monkeypatch):
    vlm, image = embedded_vlm(monkeypatch, quiet_share=1.1)
    chat = minivtw.Chat(vlm, "adaptive")
    assert chat.ask(None, "Hello?", max_new_tokens=2).stats["withdraw_layer"] is None
    assert chat.ask(image, "What color is the star?", max_new_tokens=2).stats["withdraw_layer"] == search.QUIET_LAYERS
    monkeypatch.setattr(search, "QUIET_SHARE", 0.0)  # would now decide otherwise
    assert chat.ask(image, "What shape?", max_new_tokens=2).stats["withdraw_layer"] == search.QUIET_LAYERS
    fixed = minivtw.Chat(vlm, search.QUIET_LAYERS)
    for turn in ((None, "Hello?"), (image, "What color is the star?"), (image, "What shape?")):
        fixed.ask(*turn, max_new_tokens=2)
    assert fixed.cache.tokens_per_layer == chat.cache.tokens_per_layer


def test_adaptive_in_the_door(tmp_path):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    ran = run(
        generate.main, tmp_path / "red.png", "What color?", "--withdraw", "adaptive", "--max-new-tokens", 0, "--json"
    )
    assert ran.code == 0 and json.loads(ran.out)["tokens"]["visual"] == 64
