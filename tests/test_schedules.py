"""The search for a schedule: its steps cost and save what a run from the bottom says, and its answer is the best it saw."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minivtw
from minivtw import InputError, calibrate, schedules, search
from minivtw.counting import plain_run, prompt_flops
from minivtw.inputs.questions import read_questions
from minivtw.model.decoder import DecoderConfig
from minivtw.model.tokens import EmbeddedPrompt
from minivtw.schedules import Schedule
from minivtw.shelf import method_of
from minivtw.specs import spec_of, withdrawal_layer

from .random_models import cases, places_with_visual, prefill, random_decoder, random_prompt

CONFIG = DecoderConfig(
    vocabulary=31, width=16, layers=5, heads=4, kv_heads=2, head_dim=8, mlp_width=24,
    rms_norm_eps=1e-5, rope_theta=1e4, max_positions=512,
)  # fmt: skip


@pytest.fixture(scope="module")
def samples():
    """A small decoder and three prompts with their answers of up to four tokens."""
    decoder = random_decoder(CONFIG)
    prompts = [
        random_prompt(decoder, [False, *[True] * visual, False, False], seed) for seed, visual in enumerate((9, 6, 12))
    ]
    return decoder, prompts, [search.walk(decoder, prompt, 4) for prompt in prompts]


def plainly(decoder, prompts, walks, schedule):
    """What a schedule costs and saves, from the bottom: prompt and answer in one run, nothing shared."""
    costs, saved = [], []
    for prompt, walked in zip(prompts, walks):
        run = prefill(decoder, prompt, schedule.method())
        said = EmbeddedPrompt(decoder.embedding[walked.answer[:-1]], np.zeros(len(walked.answer) - 1, bool))
        after = prefill(decoder, said, schedule.method(), run.cache).logits
        said, full = (
            np.exp(scores - np.logaddexp.reduce(scores, -1, keepdims=True))
            for scores in (np.concatenate([run.logits[-1:], after]), walked.full)
        )
        costs.append(np.abs(said - full).sum(-1).mean() / 2)
        saved.append(1 - prompt_flops(CONFIG, run.ran) / prompt_flops(CONFIG, plain_run(CONFIG, len(prompt.hidden))))
    return np.mean(costs), np.mean(saved)


def some_schedules(layers):
    thinned = st.sampled_from(
        [None, "uniform:layer=1,keep=0.5", "looked_at:layer=2,keep=0.75", "uniform:layer=0,keep=0.5"]
    )
    return st.builds(
        lambda leaves, frozen, thin: Schedule(leaves, frozenset(layer for layer in frozen if layer < leaves), thin),
        st.integers(0, layers), st.frozensets(st.integers(0, layers - 1)), thinned,
    )  # fmt: skip


@settings(max_examples=60)
@given(st.lists(some_schedules(CONFIG.layers), min_size=1, max_size=4))
def test_what_is_shared_between_schedules_changes_no_price(samples, chosen):
    decoder, prompts, walks = samples
    bench = schedules.Bench(decoder, walks, Schedule(CONFIG.layers), lambda tried: None)
    for schedule in chosen:
        measured = bench.measure(schedule)
        changed, saved = plainly(decoder, prompts, walks, schedule)
        assert measured.changed == pytest.approx(changed, rel=1e-3, abs=1e-5)
        assert measured.saved == pytest.approx(saved, abs=1e-12)
        bench.take(measured)
    assert bench.tried == len(chosen) + 1


@pytest.mark.parametrize("save", [0.2, 0.5, 0.7])
def test_the_path_saves_more_at_every_step_and_enough_at_the_end(samples, save):
    decoder, prompts, walks = samples
    path, tried = schedules.search(decoder, walks, CONFIG.layers - 1, save)
    assert path[0].schedule == Schedule(CONFIG.layers - 1)
    saved = [one.saved for one in path]
    assert path[-1].saved >= save and saved == sorted(saved)
    assert plainly(decoder, prompts, walks, path[-1].schedule)[0] == pytest.approx(path[-1].changed, rel=1e-3, abs=1e-5)
    assert tried >= len(path)


@pytest.mark.parametrize("save", [0.3, 0.5])
def test_it_beats_or_equals_the_contiguous_schedules(samples, save):
    decoder, prompts, walks = samples
    leaves = CONFIG.layers - 1
    found = schedules.search(decoder, walks, leaves, save)[0][-1]
    rivals = [Schedule(leaves, frozenset(range(first, leaves))) for first in range(leaves)]
    rivals += [Schedule(earlier) for earlier in range(leaves)]
    measured = [plainly(decoder, prompts, walks, rival) for rival in rivals]
    assert all(changed >= found.changed - 1e-5 for changed, saved in measured if saved >= min(save, found.saved))


def test_a_contiguous_schedule_is_found_where_the_steps_lead_nowhere(samples, monkeypatch):
    decoder, _, walks = samples
    monkeypatch.setattr(schedules, "cheapest_step", lambda *_: None)
    path, _ = schedules.search(decoder, walks, CONFIG.layers - 1, 0.5)
    assert path[-1].saved >= 0.5 and path[-1].schedule.thinned is None


def test_what_is_saved_beyond_the_goal_lowers_no_price():
    taken, far = schedules.Measured(Schedule(4), 0.1, 0.2), schedules.Measured(Schedule(3), 0.3, 0.8)
    assert schedules.price(far, taken, 0.4) == pytest.approx(0.2 / 0.2)
    assert schedules.price(far, taken, np.inf) == pytest.approx(0.2 / 0.6)
    assert schedules.price(taken, taken, np.inf) == np.inf


def test_a_look_at_one_sample_tells_what_saves_more(samples):
    decoder, _, walks = samples
    bench = schedules.Bench(decoder, walks, Schedule(CONFIG.layers - 1), lambda tried: None)
    bench.take(bench.measure(Schedule(CONFIG.layers - 1, frozenset([1]), "uniform:layer=1,keep=0.5")))
    for step in schedules.every_step(CONFIG.layers, CONFIG.layers - 1):
        if schedule := schedules.after(bench.taken.schedule, step):
            assert bench.saves_more(schedule) == (bench.measure(schedule).saved > bench.taken.saved)


def test_a_threshold_ends_the_search(samples):
    decoder, _, walks = samples
    whole, _ = schedules.search(decoder, walks, CONFIG.layers - 1, 0.6)
    limit = (whole[0].changed + whole[1].changed) / 2 if whole[1].changed > whole[0].changed else whole[0].changed
    path, _ = schedules.search(decoder, walks, CONFIG.layers - 1, threshold=limit)
    assert all(one.changed <= limit for one in path) and path[-1].saved < whole[-1].saved


def test_what_cannot_be_saved_is_an_input_error(samples):
    decoder, _, walks = samples
    with pytest.raises(InputError, match="saves 99%; the search ends at"):
        schedules.search(decoder, walks, CONFIG.layers - 1, 0.99)


@given(some_schedules(12))
def test_a_schedule_is_stored_as_the_text_of_its_method(schedule):
    assert spec_of(method_of(spec_of(schedule.method()))) == spec_of(schedule.method())


def test_a_step_that_has_nothing_to_change_is_none():
    assert schedules.after(Schedule(3, frozenset([1])), ("frozen", 1)) is None
    assert schedules.after(Schedule(3), ("frozen", 3)) is None
    assert schedules.after(Schedule(0), ("leaves",)) is None
    thinned = Schedule(3, thinned="uniform:layer=0,keep=0.5")
    assert schedules.after(thinned, ("thinned", "uniform:layer=0,keep=0.5")) is None
    assert schedules.after(thinned, ("thinned", "uniform:layer=1,keep=0.5")) == Schedule(
        3, thinned="uniform:layer=1,keep=0.5"
    )
    assert schedules.after(Schedule(3, frozenset([1, 2])), ("leaves",)) == Schedule(2, frozenset([1]))


@settings(max_examples=30)
@given(cases(layers=st.integers(2, 5), places=places_with_visual), some_schedules(5))
def test_carrying_on_is_running_from_the_bottom(case, schedule):
    decoder, prompt, _ = case
    layers = decoder.config.layers
    fits = Schedule(min(schedule.leaves, layers), frozenset(layer for layer in schedule.frozen if layer < layers))
    walked = schedules.carried(
        decoder, search.walk(decoder, prompt, 3), fits.method(), fits.first_change(Schedule(layers))
    )
    np.testing.assert_allclose(
        walked.entering[-1].hidden, prefill(decoder, prompt, fits.method()).hidden, rtol=1e-4, atol=1e-4
    )


def test_calibrate_finds_stores_and_auto_uses_a_schedule(tmp_path, capsys):
    import shutil

    from minivtw.loading import embedded_folder

    model = tmp_path / "model"
    shutil.copytree(embedded_folder(), model)
    calibrate.main([str(model), "--save", "45%", "--limit", "3", "--store", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["saved"] >= 0.45 and found["samples"]["count"] == 3
    vlm = minivtw.load(model)
    assert spec_of(vlm.method("auto")) == found["method"]
    sample = read_questions(model / "samples", most=1)[0]
    stats = vlm.answer(sample.image, sample.question, max_new_tokens=1).stats
    assert stats["method"] == found["method"] and stats["withdraw_layer"] == withdrawal_layer(vlm.method("auto"))
    assert 1 - stats["flops"]["prefill"] / stats["flops"]["prefill_without_withdrawal"] > 0.4


@pytest.mark.parametrize("value", ["0", "100%", "half", "-3%"])
def test_shares_that_make_no_sense(value):
    with pytest.raises(InputError, match="--save"):
        calibrate.main(["--save", value])
