"""The search for a schedule: what it tries costs and saves what a run from the bottom says, and it shares no more than it must."""

import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minivtw
from minivtw import InputError, calibrate
from minivtw.counting import plain_run, prompt_flops
from minivtw.inputs.questions import read_questions
from minivtw.loading import embedded_folder
from minivtw.methods.shelf import method_of
from minivtw.methods.text import spec_of, withdrawal_layer
from minivtw.model.decoder import DecoderConfig
from minivtw.model.tokens import EmbeddedPrompt
from minivtw.search import calibration
from minivtw.search import schedule as schedules
from minivtw.search.layer import run_in_full
from minivtw.search.schedule import BLOCK, STEPS, schedule, tried

from .doors import copied
from .random_models import prefill, random_decoder, random_prompt

CONFIG = DecoderConfig(
    vocabulary=31, width=16, layers=5, heads=4, kv_heads=2, head_dim=8, mlp_width=24,
    rms_norm_eps=1e-5, rope_theta=1e4, max_positions=512,
)  # fmt: skip
LEAVES = CONFIG.layers - 1


@pytest.fixture(scope="module")
def samples():
    """A small decoder and three prompts with their answers of up to four tokens."""
    decoder = random_decoder(CONFIG)
    prompts = [
        random_prompt(decoder, [False, *[True] * visual, False, False], seed) for seed, visual in enumerate((9, 6, 12))
    ]
    return decoder, prompts, [run_in_full(decoder, prompt, 4) for prompt in prompts]


def plainly(decoder, prompts, walks, method):
    """What a method changes and saves, from the bottom: prompt and answer in one run, nothing shared."""
    changed, flops, plain = [], 0, 0
    for prompt, walked in zip(prompts, walks):
        run = prefill(decoder, prompt, method)
        said = EmbeddedPrompt(decoder.embedding[walked.answer[:-1]], np.zeros(len(walked.answer) - 1, bool))
        after = prefill(decoder, said, method, run.cache).logits
        said, full = (
            np.exp(scores - np.logaddexp.reduce(scores, -1, keepdims=True))
            for scores in (np.concatenate([run.logits[-1:], after]), walked.full)
        )
        changed.append(np.abs(said - full).sum(-1).mean() / 2)
        flops += prompt_flops(CONFIG, run.ran)
        plain += prompt_flops(CONFIG, plain_run(CONFIG, len(prompt.hidden)))
    return np.mean(changed), 1 - flops / plain


@settings(max_examples=25)
@given(st.integers(0, CONFIG.layers), st.integers(1, BLOCK))
def test_a_trial_is_what_a_run_from_the_bottom_says(samples, leaves, worked):
    decoder, prompts, walks = samples
    trial = tried(decoder, walks, schedule(leaves, worked))
    changed, saved = plainly(decoder, prompts, walks, method_of(trial.method.spec))
    assert trial.changed == pytest.approx(changed, rel=1e-3, abs=1e-5) and trial.saved == pytest.approx(
        saved, abs=1e-12
    )
    assert withdrawal_layer(trial.method) == leaves and ("share" in trial.method.spec) == (
        worked < BLOCK and leaves > 1
    )


def test_as_many_are_worked_on_as_the_goal_allows(samples):
    decoder, _, walks = samples
    counted = {worked: tried(decoder, walks, schedule(LEAVES, worked)).saved for worked in (64, 48, 32, 24, 16)}
    for save in [0.0, *sorted(counted.values())[1:]]:
        told: list[int] = []
        path = schedules.search(decoder, walks, LEAVES, save, progress=told.append)
        assert path[-1].saved >= save and told == list(range(1, len(path) + 1)) and len(path) <= STEPS
        assert path[-1].saved == pytest.approx(max(save, counted[BLOCK]))  # no more than it must


def test_a_threshold_is_met_by_what_is_found(samples):
    decoder, _, walks = samples
    far = schedules.search(decoder, walks, LEAVES, 0.4)[-1]
    for limit in (far.changed * 0.99, far.changed * 1.01, 1.0):
        found = schedules.search(decoder, walks, LEAVES, threshold=limit)[-1]
        assert found.changed <= limit
    assert "keep=0.0156" in found.method.spec  # everything may change: one of 64
    most = schedules.search(decoder, walks, LEAVES, threshold=-1.0)[-1]
    assert most.method.spec == f"withdraw:layer={LEAVES}"  # nothing may: what is found is withdrawal alone
    with pytest.raises(InputError, match="within the threshold saves 40%"):
        schedules.search(decoder, walks, LEAVES, 0.4, far.changed * 0.99)
    assert schedules.search(decoder, walks, LEAVES, 0.4, far.changed)[-1].method.spec == far.method.spec


def test_what_cannot_be_saved_is_an_input_error(samples):
    decoder, _, walks = samples
    for leaves in (LEAVES, 1):
        with pytest.raises(InputError, match="no schedule saves 99%; with one in 64 worked on it is"):
            schedules.search(decoder, walks, leaves, 0.99)


def test_calibrate_finds_stores_and_auto_uses_a_schedule(tmp_path, capsys):
    model = copied(embedded_folder(), tmp_path / "model")
    calibrate.main([str(model), "--save", "65%", "--limit", "3", "--store", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["saved"] >= 0.65 and found["samples"]["count"] == 3 and "share:layers=1-" in found["method"]
    vlm = minivtw.load(model)
    assert spec_of(vlm.method("auto")) == found["method"]
    sample = read_questions(model / "samples", most=1)[0]
    stats = vlm.answer(sample.image, sample.question, max_new_tokens=1).stats
    assert stats["method"] == found["method"] and stats["withdraw_layer"] == withdrawal_layer(vlm.method("auto"))
    assert 1 - stats["flops"]["prefill"] / stats["flops"]["prefill_without_withdrawal"] > 0.6


def test_a_terminal_is_told_how_long_it_will_take_and_nothing_else_is(monkeypatch, capsys):
    for is_terminal, told in ((True, "minivtw: the search takes about 2 minutes\n"), (False, "")):
        monkeypatch.setattr(sys.stderr, "isatty", lambda is_terminal=is_terminal: is_terminal)
        calibrate.announce(123)
        assert capsys.readouterr().err == told
    vlm, seconds, done = minivtw.load(), [], []
    samples = read_questions(vlm.folder / "samples", most=2)
    calibration.find_schedule(vlm, samples, 0.6, progress=done.append, announce=seconds.append)
    assert len(seconds) == 1 and seconds[0] > 0
    assert done[:2] == [1, 2] and done[2:] == list(range(4, 2 * len(done) - 1, 2))  # in full, and under each schedule


@pytest.mark.parametrize("value", ["0", "100%", "half", "-3%"])
def test_shares_that_make_no_sense(value):
    with pytest.raises(InputError, match="--save"):
        calibrate.main(["--save", value])
