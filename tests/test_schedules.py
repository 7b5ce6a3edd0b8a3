"""The search for a schedule: its steps cost and save what a run from the bottom says, and its answer is the best it saw."""

import json
import os

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
from minivtw.search import layer as search
from minivtw.search import notebook
from minivtw.search import schedule as schedules
from minivtw.search.schedule import Pruning, Schedule

from .doors import copied
from .random_models import prefill, random_decoder, random_prompt

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
    return decoder, prompts, [search.run_in_full(decoder, prompt, 4) for prompt in prompts]


def plainly(decoder, prompts, walks, schedule):
    """What a schedule changes and saves, from the bottom: prompt and answer in one run, nothing shared."""
    changed, flops, plain = [], 0, 0
    for prompt, walked in zip(prompts, walks):
        run = prefill(decoder, prompt, schedule.method())
        said = EmbeddedPrompt(decoder.embedding[walked.answer[:-1]], np.zeros(len(walked.answer) - 1, bool))
        after = prefill(decoder, said, schedule.method(), run.cache).logits
        said, full = (
            np.exp(scores - np.logaddexp.reduce(scores, -1, keepdims=True))
            for scores in (np.concatenate([run.logits[-1:], after]), walked.full)
        )
        changed.append(np.abs(said - full).sum(-1).mean() / 2)
        flops += prompt_flops(CONFIG, run.ran)
        plain += prompt_flops(CONFIG, plain_run(CONFIG, len(prompt.hidden)))
    return np.mean(changed), 1 - flops / plain


def bench_on(samples, leaves=CONFIG.layers - 1):
    decoder, prompts, walks = samples
    return schedules.Trials(decoder, prompts, walks.__getitem__, Schedule(leaves))


def searched(samples, save=None, threshold=None):
    """The path of a search, and a trials with all that it measured."""
    decoder, prompts, walks = samples
    trials = schedules.Trials(decoder, prompts, walks.__getitem__, Schedule(CONFIG.layers - 1), known={})
    return schedules.search(trials, save, threshold), trials


def some_schedules(layers):
    thinned = st.sampled_from(
        [None, Pruning("uniform", 1, 0.5), Pruning("looked_at", 2, 0.75), Pruning("uniform", 0, 0.5)]
    )
    return st.builds(
        lambda leaves, frozen, thin: Schedule(layers, frozen, thin).leaving(leaves),
        st.integers(0, layers), st.frozensets(st.integers(0, layers - 1)), thinned,
    )  # fmt: skip


@settings(max_examples=60)
@given(st.lists(some_schedules(CONFIG.layers), min_size=1, max_size=4, unique=True))
def test_what_schedules_share_changes_no_price(samples, chosen):
    decoder, prompts, walks = samples
    trials = bench_on(samples)
    for measured in trials.measure(chosen, len(walks)):
        changed, saved = plainly(decoder, prompts, walks, measured.schedule)
        assert measured.changed == pytest.approx(changed, rel=1e-3, abs=1e-5)
        assert measured.saved == pytest.approx(saved, abs=1e-12)
    assert len(trials.known) == len(walks) * len({Schedule(CONFIG.layers - 1), *chosen})


@settings(max_examples=60)
@given(some_schedules(CONFIG.layers))
def test_what_is_counted_is_what_runs(samples, schedule):
    trials = bench_on(samples)
    measured, counted = trials.measure([schedule], trials.count)[0].saved, trials.saved(schedule)
    if schedule.thinned and schedule.thinned.name == "looked_at":
        # what it asks for is counted as on the longest sample
        assert counted <= measured + 1e-12 and counted == pytest.approx(measured, abs=0.01)
    else:
        assert counted == pytest.approx(measured, abs=1e-12)


@settings(max_examples=100)
@given(some_schedules(CONFIG.layers), st.permutations(range(CONFIG.layers)), st.floats(0, 0.9), st.integers(0, 4))
def test_a_fitted_schedule_saves_enough_and_freezes_no_layer_that_it_need_not(samples, schedule, order, goal, held):
    trials = bench_on(samples)
    fitted = trials.fitted(schedule, order, goal, [held])
    assert trials.saved(fitted) >= goal or fitted.leaves == 0
    if held < fitted.leaves:
        assert (held in fitted.frozen) == (held in schedule.frozen)
    for layer in fitted.frozen - {held}:
        assert trials.saved(fitted._replace(frozen=fitted.frozen - {layer})) < goal
    if fitted.leaves == schedule.leaves and not schedule.thinned:
        # every layer saves as much, so the first in order are added
        added = [order.index(layer) for layer in fitted.frozen - schedule.frozen]
        free = [order.index(layer) for layer in range(fitted.leaves) if layer not in {held, *schedule.frozen}]
        assert all(place in added for place in free if place < max(added, default=0))


@pytest.mark.parametrize("save", [0.2, 0.5, 0.7])
def test_the_last_of_the_path_is_the_best_that_was_measured(samples, save):
    decoder, prompts, walks = samples
    path, trials = searched(samples, save)
    assert path[0] == trials.start and path[0].schedule == Schedule(CONFIG.layers - 1)
    changed, saved = plainly(decoder, prompts, walks, path[-1].schedule)
    assert path[-1].changed == pytest.approx(changed, rel=1e-3, abs=1e-5) and saved == pytest.approx(path[-1].saved)
    every = {text: [trials.known[index, text] for index in range(len(walks))] for _, text in trials.known}
    means = {text: np.mean(seen, axis=0) for text, seen in every.items()}
    enough = {text: changed for text, (changed, flops, plain) in means.items() if 1 - flops / plain >= save}
    best = max(min(enough.values()) - trials.start.changed, schedules.NOISE)
    assert spec_of(path[-1].schedule.method()) in enough and path[-1].cost == pytest.approx(best)
    costs = [one.cost for one in path[1:]]
    assert costs == sorted(costs, reverse=True) and len(set(costs)) == len(costs)


@pytest.mark.parametrize("save", [0.3, 0.5])
def test_it_beats_or_equals_the_contiguous_schedules(samples, save, monkeypatch):
    monkeypatch.setattr(schedules, "FIRST", 1)  # so that some leave the race before all samples have been seen
    decoder, prompts, walks = samples
    leaves = CONFIG.layers - 1
    path, _ = searched(samples, save)
    rivals = [Schedule(leaves, frozenset(range(first, leaves))) for first in range(leaves)]
    rivals += [Schedule(earlier) for earlier in range(leaves)]
    measured = [plainly(decoder, prompts, walks, rival) for rival in rivals]
    allowed = path[0].changed + path[-1].cost - 1e-5
    assert path[-1].saved >= save and all(changed >= allowed for changed, saved in measured if saved >= save)


def test_in_a_race_the_worse_half_leaves_each_time(samples, monkeypatch):
    monkeypatch.setattr(schedules, "FIRST", 1)
    trials = bench_on(samples)
    runners = [Schedule(4, frozenset(frozen)) for frozen in ([0], [1], [2], [3], [0, 1], [1, 2], [2, 3])]
    worst = max(trials.measure(runners, 1), key=lambda one: one.cost).schedule
    winner = schedules.race(trials, runners, 0.0, [worst])
    seen = {one: sum(text == spec_of(one.method()) for _, text in trials.known) for one in runners}
    assert sorted(seen.values()) == [1, 1, 2, 3, 3, 3, 3]  # 7, then 4 and who stays, then 3 and who stays
    finalists = trials.measure([one for one in runners if seen[one] == 3], 3)
    assert seen[worst] == 3 and winner == min(finalists, key=lambda one: one.cost)


def test_of_equals_the_one_at_hand_wins_and_else_the_simpler(samples, monkeypatch):
    monkeypatch.setattr(schedules, "NOISE", 1.0)  # so that nothing changes more
    trials = bench_on(samples)
    thin, frozen = Schedule(4, thinned=Pruning("uniform", 1, 0.5)), Schedule(4, frozenset([1, 2]))
    assert schedules.race(trials, [thin, frozen], 0.0).schedule == frozen
    assert schedules.race(trials, [thin, frozen], 0.0, [thin]).schedule == thin
    assert schedules.freezing_order(trials, 4) == [3, 2, 1, 0]  # and the deepest layer first


@given(some_schedules(CONFIG.layers), st.permutations(range(CONFIG.layers)))
def test_neighbours_save_enough_and_differ_in_what_was_changed(samples, schedule, order):
    trials = bench_on(samples)
    goal = min(trials.saved(schedule), 0.5)
    around = list(schedules.neighbours(trials, schedule, order, goal))
    assert all(trials.saved(one) >= goal for one in around if one.leaves)
    for layer, one in zip([layer for layer in order if layer < schedule.leaves], around):
        assert one.leaves < schedule.leaves or (layer in one.frozen) != (layer in schedule.frozen)
    assert {one.leaves for one in around} - {schedule.leaves} or schedule.leaves in (0, CONFIG.layers)
    if schedule.thinned and schedule.thinned.layer and schedule.leaves == CONFIG.layers:
        thinned = [one.thinned for one in around if one.thinned]
        for varied in zip(*thinned):  # the method, its layer, its share
            assert len(set(varied)) > 1
        assert all(0 <= one.layer < CONFIG.layers and 0 < one.keep < 1 for one in thinned)


def test_a_threshold_ends_the_search(samples):
    far, _ = searched(samples, 0.7)
    limit = (far[0].changed + far[-1].changed) / 2
    path, _ = searched(samples, threshold=limit)
    assert path[-1].changed <= limit and path[0].saved <= path[-1].saved < 0.7
    with pytest.raises(InputError, match="within the threshold saves 70%"):
        searched(samples, 0.7, limit)
    assert searched(samples, 0.7, far[-1].changed)[0] == far


def test_what_cannot_be_saved_is_an_input_error(samples):
    with pytest.raises(InputError, match="no schedule saves 99%; the search ends at"):
        searched(samples, 0.99)


@given(some_schedules(12))
def test_a_schedule_is_stored_as_the_text_of_its_method(schedule):
    assert spec_of(method_of(spec_of(schedule.method()))) == spec_of(schedule.method())


def test_only_the_first_samples_are_kept_walked(monkeypatch):
    vlm, walked = minivtw.load(), []
    samples = read_questions(vlm.folder / "samples", most=3)

    def counted(decoder, prompt, **options):
        walked.append(len(prompt.hidden))
        return search.run_in_full(decoder, prompt, **options)

    every = notebook.find_schedule(vlm, samples, 0.6)
    monkeypatch.setattr(notebook, "run_in_full", counted)
    assert notebook.find_schedule(vlm, samples, 0.6) == every and len(walked) == 3
    monkeypatch.setattr(notebook, "FIRST", 1)
    assert notebook.find_schedule(vlm, samples, 0.6)["saved"] >= 0.6 and len(walked) > 2 * 3


def test_calibrate_finds_stores_and_auto_uses_a_schedule(tmp_path, capsys):
    model = copied(embedded_folder(), tmp_path / "model")
    calibrate.main([str(model), "--save", "45%", "--limit", "3", "--store", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["saved"] >= 0.45 and found["samples"]["count"] == 3
    vlm = minivtw.load(model)
    assert spec_of(vlm.method("auto")) == found["method"]
    sample = read_questions(model / "samples", most=1)[0]
    stats = vlm.answer(sample.image, sample.question, max_new_tokens=1).stats
    assert stats["method"] == found["method"] and stats["withdraw_layer"] == withdrawal_layer(vlm.method("auto"))
    assert 1 - stats["flops"]["prefill"] / stats["flops"]["prefill_without_withdrawal"] > 0.4


def find(path, limit="1", save="65%"):
    calibrate.main(["--save", save, "--limit", limit, "--json", *(["--measured", str(path)] if path else [])])


def test_a_search_goes_on_from_what_it_kept(tmp_path, capsys, monkeypatch):
    notes = tmp_path / "notes.jsonl"
    find(None)
    whole = json.loads(capsys.readouterr().out)
    change, asked = schedules.Trials.change, []

    def broken_off(trials, full_run, schedule):
        asked.append(schedule)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return change(trials, full_run, schedule)

    monkeypatch.setattr(schedules.Trials, "change", broken_off)
    with pytest.raises(KeyboardInterrupt):
        find(notes)
    kept = notes.read_text(encoding="utf-8").splitlines()
    assert len(kept) == 1 + 2  # the first line says what was measured
    notes.write_text("\n".join(kept) + '\n[1, "withdraw:lay', encoding="utf-8")  # killed while it wrote
    asked[:] = [None] * 3
    find(notes)
    assert json.loads(capsys.readouterr().out) == whole
    assert len(asked) - 3 == len(notes.read_text(encoding="utf-8").splitlines()) - 1 - 2  # nothing is measured twice
    asked[:] = [None] * 3
    find(notes)
    assert json.loads(capsys.readouterr().out) == whole and len(asked) == 3


@pytest.mark.parametrize("content", ["dear diary\n", "dear diary", '{"model": "another"}\n'])
def test_a_file_that_holds_something_else_stays_as_it_is(tmp_path, content):
    notes = tmp_path / "notes.jsonl"
    notes.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match="does not hold what was measured"):
        find(notes)
    assert notes.read_text(encoding="utf-8") == content


@pytest.mark.parametrize(
    "line",
    ["[1]", "nonsense", '[0, "withdraw:layer=4", "much", 1, 2]', '[0, "withdraw:layer=4", 0.1, 1e999, 2]', "[" * 100_000,
     '[[0], "withdraw:layer=4", 0.1, 1, 2]', '[0, {}, 0.1, 1, 2]', '[0, "withdraw:layer=4", 0.1, null, 2]',
     '[0, "withdraw:layer=4", 0.1, 1]', '[0, "withdraw:layer=4", NaN, 1, 2]', '[0, "withdraw:layer=4", 0.1, -1, 2]', f'[0, "withdraw:layer=4", {10**400}, 1, 2]', "{}", ""],
)  # fmt: skip
def test_a_broken_line_is_named(tmp_path, line):
    notes = tmp_path / "notes.jsonl"
    about = {"model": "m", "samples": {}}
    notebook.Notebook(notes, about)[0, "withdraw:layer=4"] = schedules.SampleChange(0.1, 1, 2)
    assert notebook.Notebook(notes, about) == {(0, "withdraw:layer=4"): schedules.SampleChange(0.1, 1, 2)}
    with notes.open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")
    with pytest.raises(InputError, match="line 3: is not what --measured writes"):
        notebook.Notebook(notes, about)
    with pytest.raises(InputError, match="these samples"):
        notebook.Notebook(notes, {"model": "another", "samples": {}})


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, "/dev/null", tmp_path / "pipe"):
        with pytest.raises(InputError, match="is a folder|is not a file"):
            notebook.Notebook(path, {})


def test_what_another_model_measured_is_refused_whatever_its_name(tmp_path):
    """The folder's name tells nothing: a model that was trained again keeps it. What calibrate stores changes nothing."""
    for name in ("a", "b"):
        copied(embedded_folder(), tmp_path / name / "model")
    first, second, notes = tmp_path / "a" / "model", tmp_path / "b" / "model", tmp_path / "notes.jsonl"
    find = lambda model: calibrate.main(
        [str(model), "--save", "65%", "--limit", "1", "--measured", str(notes), "--store"]
    )
    find(first)
    kept = notes.read_bytes()
    find(second)  # with another withdrawal.json now
    assert notes.read_bytes() == kept
    for name in ("model.safetensors", "generation_config.json"):
        content = (second / name).read_bytes()
        (second / name).write_bytes(
            content[:-1] + bytes([content[-1] ^ 1]) if name.startswith("model") else content + b" "
        )
        with pytest.raises(InputError, match="does not hold what was measured with this model on these samples"):
            find(second)
        (second / name).write_bytes(content)
    assert notes.read_bytes() == kept


def test_measured_alone_is_refused(tmp_path):
    with pytest.raises(InputError, match="--measured keeps what"):
        calibrate.main(["--measured", str(tmp_path / "notes")])


@pytest.mark.parametrize("value", ["0", "100%", "half", "-3%"])
def test_shares_that_make_no_sense(value):
    with pytest.raises(InputError, match="--save"):
        calibrate.main(["--save", value])
