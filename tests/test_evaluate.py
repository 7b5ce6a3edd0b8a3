"""The door `python -m minivtw.evaluate`, and how answers are scored."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import minivtw
from minivtw import Chat
from minivtw.evaluate import SCORED, evaluate, main, seeds
from minivtw.inputs.questions import read_questions
from minivtw.inputs.scoring import described, score
from minivtw.methods.withdrawal import then, withdraw
from minivtw.seen import Seen
from tests.doors import assert_one_line_error, run
from tests.small_llava import write_folder
from tests.test_behaviour import roomy


@pytest.mark.parametrize(
    "family, answer, right, points",
    [
        ("attribute", "Red.", "red", 1),
        ("attribute", "dark red", "red", 0),
        ("choice", "B.", "B", 1),
        ("choice", "b", "B", 1),
        ("existence", "", "no", 0),
        ("count", "five objects", "five", 0),
        ("caption", "A red star, a blue ring and a white square.", "a red star, a blue ring and a white square.", 1),
        ("caption", "a white square and a red star", "a red star, and a white square.", 1),  # order does not count
        ("caption", "an orange 7 and a red star.", "an orange 3 and a red star.", 1),  # any figure is a digit
        ("caption", "a red star.", "a red star and a blue ring.", 2 / 3),  # precision 1, recall 1/2
        (
            "caption",
            "a red star, a red star and a green cross.",
            "a red star.",
            2 / 3,
        ),  # a set: repeating gains nothing
        ("caption", "", "a red star.", 0),
        ("caption", "and and , a", "a red star.", 0),
    ],
)
def test_scoring(family, answer, right, points):
    assert score(family, answer, right) == pytest.approx(points)


@given(
    st.sets(st.tuples(st.sampled_from(["red", "orange", "black"]), st.sampled_from(["star", "ring", "7"])), min_size=1)
)
def test_captions_of_the_world_are_read_back(pairs):
    words = [f"{'an' if color == 'orange' else 'a'} {color} {shape}" for color, shape in sorted(pairs)]
    caption = ", ".join(words[:-1]) + (" and " if words[1:] else "") + words[-1] + "."
    assert described(caption) == {(color, "digit" if shape == "7" else shape) for color, shape in pairs}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small random model, and a folder of six questions of which it answers two, because its own answers are in it."""
    model, folder = write_folder(tmp_path_factory.mktemp("model")), tmp_path_factory.mktemp("questions")
    vlm, lines = minivtw.load(model), []
    for index in range(6):
        Image.fromarray(np.random.default_rng(index).integers(0, 255, (12, 12, 3), np.uint8)).save(
            folder / f"{index}.png"
        )
        said = vlm.answer(folder / f"{index}.png", "Hm?", withdraw=None, max_new_tokens=64).text
        answer = said if index in (0, 3) else "something else"
        lines.append({"image": f"{index}.png", "family": "ab"[index // 3], "question": "Hm?", "answer": answer})
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return model, folder


def test_accuracy_agreement_and_savings_by_layer(small, tmp_path):
    model, folder = small
    ran = run(main, folder, "--model", model, "--withdraw", "off,auto,0,4", "--json", tmp_path / "scores.json")
    assert ran.code == 0 and ran.err == ""
    content = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert content["questions"] == 6
    off, auto, zero, last = content["runs"]
    assert [run["withdraw_layer"] for run in content["runs"]] == [None, 2, 0, 4]
    assert off["accuracy"] == {"a": pytest.approx(1 / 3), "b": pytest.approx(1 / 3)} and off["mean"] == pytest.approx(
        1 / 3
    )
    assert off["agreement"] == last["agreement"] == 1 and zero["agreement"] < 1
    assert last["accuracy"] == off["accuracy"]
    assert (
        zero["prefill_flops"] < auto["prefill_flops"] < off["prefill_flops"] == off["prefill_flops_without_withdrawal"]
    )
    for words in ("K=2 (auto)", "unchanged", "33.3%", "saved"):
        assert words in ran.out


def test_seeds_become_one_row_with_their_mean_and_spread(small, tmp_path):
    model, folder = small
    path, text = tmp_path / "scores.json", "random:layer=1,keep=0.25,seed={}"
    one_by_one = [text.format(seed) for seed in range(3)]
    ran = run(main, folder, "--model", model, "--withdraw", "off", "--methods", text.format("0-2"), "--json", path)
    together = json.loads(path.read_text(encoding="utf-8"))["runs"]
    run(main, folder, "--model", model, "--withdraw", "off", "--methods", *one_by_one, "--json", path)
    alone = json.loads(path.read_text(encoding="utf-8"))["runs"][1:]
    assert [row["name"] for row in together] == ["off", text.format("0-2")] and together[1]["seeds"] == 3
    agreement = [row["agreement"] for row in alone]
    assert together[1]["agreement"] == pytest.approx(np.mean(agreement))
    assert together[1]["spread"]["agreement"] == pytest.approx(np.std(agreement, ddof=1))
    assert together[1]["prefill_flops"] == pytest.approx(alone[0]["prefill_flops"])
    assert f"{np.mean(agreement):.1%} ±{100 * np.std(agreement, ddof=1):.1f}" in ran.out and "spread" not in together[0]


def test_a_seed_of_another_parameter_is_left_alone():
    assert seeds("random:layer=2,seed=7") == ["random:layer=2,seed=7"]
    assert seeds("fastv:layer=2+random:layer=4,seed=8-9") == [f"fastv:layer=2+random:layer=4,seed={n}" for n in (8, 9)]
    assert seeds("freeze:layers=4-6") == ["freeze:layers=4-6"]


def test_a_second_turn_is_asked_in_the_chat_of_the_first(small, tmp_path):
    """Under every method: what it says to the first question stands before the second, whose score is its own."""
    model, folder = roomy(tmp_path / "model"), small[1]
    vlm, lines, method = minivtw.load(model), [], "random:layer=1,keep=0.0,seed=0"
    for index in range(2):
        (tmp_path / f"{index}.png").write_bytes((folder / f"{index}.png").read_bytes())
        chat = minivtw.Chat(vlm, None, method)
        chat.ask("Hm?", tmp_path / f"{index}.png", max_new_tokens=64)
        said = chat.ask("And?", max_new_tokens=64).text
        lines.append({"image": f"{index}.png", "turns": [["Hm?", "not this"], ["And?", said]]})
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    path = tmp_path / "scores.json"
    ran = run(main, tmp_path, "--model", model, "--withdraw", "off", "--methods", method, "--json", path)
    off, dropped = json.loads(path.read_text(encoding="utf-8"))["runs"]
    assert dropped["accuracy"] == {"turn 1": 0, "turn 2": 1} and off["agreement"] == 1 > dropped["agreement"]
    assert "turn 1" in ran.out and "turn 2" in ran.out


def keeping(count):
    """A method whose name does not tell it from its like."""

    def method(index, tokens):
        return tokens[~tokens.is_visual | (np.cumsum(tokens.is_visual) <= count)] if index == 0 else tokens

    return method


def test_functions_of_one_name_are_methods_of_their_own(small):
    vlm, questions = minivtw.load(small[0]), read_questions(small[1], SCORED)[:2]
    rows = {"none": keeping(0), "four": keeping(4), "all": keeping(99), "then": then(keeping(4), withdraw(3))}
    together = evaluate(vlm, questions, rows)
    assert len({row["prefill_flops"] for row in together}) == len(rows)
    for row in together:
        alone = evaluate(vlm, questions, {row["name"]: rows[row["name"]]})[0]
        assert {key: value for key, value in row.items() if "seconds" not in key}.items() <= alone.items()


def every_second(index, tokens):
    return tokens[~tokens.is_visual | (np.arange(len(tokens)) % 2 == 0)] if index == 2 else tokens


def test_questions_that_follow_each_other_about_one_image_reuse_it(small, tmp_path, monkeypatch):
    """The figures are those of the same questions when none can: each about another image than the one before it."""
    vlm, lines, probed, init = minivtw.load(roomy(tmp_path / "model")), [], [], Seen.__init__
    for index in range(3):
        (tmp_path / f"{index}.png").write_bytes((small[1] / f"{index}.png").read_bytes())
        for family, said in zip("abc", ("Hm?", "And now?", "What?")):
            lines.append({"image": f"{index}.png", "family": family, "question": said, "answer": "b"})
        lines.append({"image": f"{index}.png", "turns": [["Hm?", "a"], ["And?", "b"]]})
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    texts = ("withdraw:layer=2", "uniform:layer=1", "fastv:layer=2", "freeze:layers=1+withdraw:layer=3")
    methods = {"off": None, "own": every_second} | {text: vlm.method(method=text) for text in texts}
    questions = read_questions(tmp_path, SCORED)
    apart = evaluate(vlm, questions[::4] + questions[1::4] + questions[2::4] + questions[3::4], methods)
    count = lambda seen, vlm, beginning, method: probed.append(method) or init(seen, vlm, beginning, method)
    monkeypatch.setattr(Seen, "__init__", count)
    together = evaluate(vlm, questions, methods)
    without = lambda rows: [{key: value for key, value in row.items() if "seconds" not in key} for row in rows]
    assert without(together) == without(apart)
    assert probed == [*methods.values()][1:] + [every_second] * 2  # a method of the shelf once, our own at every image


def test_what_is_the_same_method_runs_once(small, monkeypatch):
    model, folder = small
    asked, respond = [], Chat.respond
    counted = lambda chat, *arguments, **options: asked.append(chat.method) or respond(chat, *arguments, **options)
    monkeypatch.setattr(Chat, "respond", counted)
    assert run(main, folder, "--model", model, "--withdraw", "off,auto,2", "--method", "withdraw:layer=2").code == 0
    assert len(asked) == 6 * 2  # left alone, and withdrawn before layer 2, which is `auto` as well


def test_a_limit_asks_the_first_of_each_family(small, tmp_path):
    model, folder = small
    run(main, folder, "--model", model, "--withdraw", "off", "--limit", "1", "--json", tmp_path / "scores.json")
    content = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert content["questions"] == 2 and content["runs"][0]["accuracy"] == {"a": 1, "b": 1}


def test_a_family_is_left_out(small, tmp_path):
    model, folder = small
    run(main, folder, "--model", model, "--withdraw", "off", "--without", "a", "--json", tmp_path / "scores.json")
    assert json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))["runs"][0]["accuracy"].keys() == {"b"}


@pytest.mark.parametrize(
    "line, words",
    [
        ("", "holds no questions"),
        ("{", "line 1"),
        ('{"image": "0.png"}', "line 1"),
        ("[1, 2]", "line 1"),
        ('{"image": "no.png", "family": "a", "question": "q", "answer": "a"}', "no image no.png"),
        ('{"image": "0.png", "family": "a", "question": "q", "answer": 3}', "must be text"),
        ('{"image": "0.png", "turns": []}', "line 1"),
        ('{"image": "0.png", "turns": [["q"]]}', "line 1"),
        ('{"image": "0.png", "turns": [["q", "a"], ["q", 3]]}', "must be text"),
        ('{"turns": [["q", "a"]]}', "line 1"),
    ],
)
def test_broken_questions_are_named(small, tmp_path, line, words):
    (tmp_path / "questions.jsonl").write_text(line, encoding="utf-8")
    (tmp_path / "0.png").write_bytes((small[1] / "0.png").read_bytes())
    assert_one_line_error(run(main, tmp_path, "--model", small[0]), words)


@pytest.mark.parametrize(
    "options, words",
    [
        (("--withdraw", "off,9"), "from 0 to 4"),
        (("--withdraw", ""), "auto, off or a layer"),
        (("--limit", "0"), "--limit"),
        (("--without", "c"), "there is a, b"),
    ],
)
def test_options_that_make_no_sense(small, options, words):
    assert_one_line_error(run(main, small[1], "--model", small[0], *options), words)


def test_missing_folders_and_places_that_cannot_be_written(small, tmp_path):
    assert_one_line_error(run(main, tmp_path / "nowhere", "--model", small[0]), "questions.jsonl")
    ran = run(main, small[1], "--model", small[0], "--limit", "1", "--json", tmp_path / "nowhere" / "scores.json")
    assert ran.code == 2 and "cannot write" in ran.err and ran.err.count("\n") == 1
