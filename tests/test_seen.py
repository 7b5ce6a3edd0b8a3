"""An image that was seen once: every question about it is answered as if it had been the only one."""

import concurrent.futures
import importlib.util
import itertools
import pathlib
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minivtw
from minivtw import InputError
from minivtw.methods.shelf import METHODS
from minivtw.model.cache import KVCache

ROOT = pathlib.Path(__file__).parent.parent
SCENE, THREE = str(ROOT / "docs/pictures/scene.png"), str(ROOT / "docs/pictures/three.png")
QUESTIONS = ["What color is the star?", "How many objects are there?", "Describe the image."]
BLIND = [
    None, "withdraw:layer=5", "withdraw:layer=0", "withdraw:layer=12", "freeze:layers=3-4+withdraw:layer=5",
    "uniform:layer=2,keep=0.46", "random:layer=2,keep=0.46", "visionzip:keep=0.55", "fastervlm:keep=0.55", "divprune:keep=0.55",
    "withdraw:layer=5+renumber:layer=5", "renumber:layer=3+own_positions", "smaller:side=5", "smaller:side=3+renumber:layer=0", "late:layer=3",
    "late:layer=3+withdraw:layer=9", "late:layer=3+renumber:layer=5",
]  # fmt: skip
LOOKING = {
    "fastv:layer=2,keep=0.46": "looks at the question", "looked_at:layer=2,keep=0.46": "looks at the question",
    "pyramiddrop:layers=3/6/9,keep=0.6": "looks at the question", "dart:layer=2,keep=0.46": "looks at the question",
    "sparsevlm:layers=1/3/6,keep=0.75": "looks at the question", "random_tokens:layer=3": "looks at the question",
    "share:layers=1-4,keep=0.35": "looks at the question",
    "adaptive": "looks at the question", "withdraw:layer=4+random_tokens:layer=2": "looks at the question",
}  # fmt: skip


@pytest.fixture(scope="module")
def vlm():
    return minivtw.load()


def counted(answer):
    return {name: value for name, value in answer.stats.items() if name not in ("seconds", "reused")}


def contents(cache):
    return [(layer.keys.tobytes(), layer.values.tobytes(), layer.positions.tolist()) for layer in cache.layers]


def test_every_method_of_the_shelf_is_here():
    texts = "+".join([text for text in BLIND if text] + list(LOOKING))
    assert {part.split(":")[0] for part in texts.split("+")} == METHODS.keys()


@pytest.mark.parametrize("method", BLIND)
def test_answers_and_counts_are_those_of_the_whole_prompt(vlm, method):
    seen = vlm.see(SCENE, None, method)
    before = contents(seen.cache)
    for question in QUESTIONS:
        whole, logits = vlm.answer(SCENE, question, withdraw=None, method=method), []
        reused = seen.ask(
            question, observe=lambda name, array: logits.append(array) if name == "decoder.logits" else None
        )
        assert (reused.text, reused.token_ids) == (whole.text, whole.token_ids)
        assert counted(reused) == counted(whole)
        assert (
            reused.stats["reused"]["tokens"] == 68
            and 0 < reused.stats["reused"]["flops"] < whole.stats["flops"]["prefill"]
        )
        expected = []
        vlm.answer(SCENE, question, withdraw=None, method=method, max_new_tokens=1,
                   observe=lambda name, array: expected.append(array) if name == "decoder.logits" else None)  # fmt: skip
        np.testing.assert_allclose(logits[0], expected[0], atol=1e-5 * np.abs(expected[0]).max())
    assert contents(seen.cache) == before and seen.cache.next_position == 68


@pytest.mark.parametrize("method", LOOKING)
def test_a_method_that_looks_at_the_question_is_refused(vlm, method):
    with pytest.raises(InputError, match=f"{LOOKING[method]}; of an image nothing can be reused"):
        vlm.see(SCENE, None, method)


@pytest.mark.parametrize("method", LOOKING)
def test_with_a_fallback_it_runs_the_whole_prompt_and_the_tower_once(vlm, method, monkeypatch):
    towers, encode = [], minivtw.vlm.encode_image
    monkeypatch.setattr(minivtw.vlm, "encode_image", lambda *given: towers.append(given) or encode(*given))
    seen = vlm.see(SCENE, None, method, fallback=True)
    told, logits = [], []
    for question in QUESTIONS:
        told.append(seen.ask(question, observe=lambda name, array: logits.append(array) if "logits" in name else None))
    assert len(towers) == 1 and seen.cache.next_position == 0
    expected_logits = []
    for question, reused in zip(QUESTIONS, told):
        whole = vlm.answer(SCENE, question, withdraw=None, method=method,
                           observe=lambda name, array: expected_logits.append(array) if "logits" in name else None)  # fmt: skip
        assert reused.token_ids == whole.token_ids and counted(reused) == counted(whole)
        assert reused.stats["reused"] == {"tokens": 0, "flops": 0}
    np.testing.assert_array_equal(logits, expected_logits)


def test_with_a_fallback_a_conversation_goes_on_and_reuse_stays_reuse(vlm):
    chat, whole = vlm.see(SCENE, None, "fastv:layer=2", fallback=True).chat(), minivtw.Chat(vlm, None, "fastv:layer=2")
    expected = [whole.ask(QUESTIONS[0], SCENE), whole.ask(QUESTIONS[1]), whole.ask(QUESTIONS[2], THREE)]
    turns = [chat.ask(QUESTIONS[0]), chat.ask(QUESTIONS[1]), chat.ask(QUESTIONS[2], THREE)]
    assert [turn.token_ids for turn in turns] == [turn.token_ids for turn in expected]
    assert [counted(turn) for turn in turns] == [counted(turn) for turn in expected]
    arrays = [{}, {}]
    for ask, into in ((vlm.see(SCENE, None, "fastv:layer=2", fallback=True).ask, arrays[0]),
                      (lambda *given, **more: vlm.answer(SCENE, *given, withdraw=None, method="fastv:layer=2", **more), arrays[1])):  # fmt: skip
        ask(QUESTIONS[0], max_new_tokens=1, observe=into.__setitem__)
    assert np.array_equal(arrays[0]["decoder.embeddings"], arrays[1]["decoder.embeddings"])
    assert vlm.see(SCENE, fallback=True).ask(QUESTIONS[0]).stats["reused"]["tokens"] == 68


def test_own_methods_are_judged_by_what_they_do(vlm):
    def by_length(index, tokens):
        return tokens[~tokens.is_visual] if index == len(tokens) % 5 else tokens

    def by_words(index, tokens):
        word = int(1000 * np.abs(tokens.hidden[~tokens.is_visual][-1]).sum())
        return tokens.freeze(tokens.is_visual & (np.arange(len(tokens)) % 7 == word % 7)) if index == 3 else tokens

    def every_second(index, tokens):
        visual = np.flatnonzero(tokens.is_visual)
        stays = np.ones(len(tokens), bool)
        stays[visual[1::2]] = index != 3
        return tokens[stays]

    def for_long_questions(index, tokens):
        return tokens[~tokens.is_visual] if index == 1 and (~tokens.is_visual).sum() > 25 else tokens

    def by_state(index, tokens):
        if index != 2 or not tokens.is_visual.any():
            return tokens
        after = tokens.hidden[np.flatnonzero(tokens.is_visual)[-1] + 1 :].mean(0)
        return replace(tokens, hidden=tokens.hidden + 5 * np.where(tokens.is_visual[:, None], after, 0))

    for method in (by_length, by_words, for_long_questions, by_state):
        with pytest.raises(InputError, match="looks at the question"):
            vlm.see(SCENE, None, method)
    seen = vlm.see(SCENE, None, every_second)
    assert (
        seen.ask(QUESTIONS[0]).token_ids
        == vlm.answer(SCENE, QUESTIONS[0], method=every_second, withdraw=None).token_ids
    )


@pytest.mark.parametrize(
    "folder", sorted(path.parent.name for path in (ROOT / "tests/golden/families").glob("*/config.json"))
)
def test_every_family_and_several_images(folder):
    model = minivtw.load(ROOT / "tests/golden/families" / folder)
    for images in (SCENE, [SCENE, THREE]):
        for withdraw, method in ((None, None), (1, None), (None, "fastv:layer=1")):
            seen = model.see(images, withdraw, method, fallback=True)
            assert bool(seen.embedded) == bool(method)
            for question in ("Hi", "What is it?"):
                whole = model.answer(images, question, withdraw=withdraw, method=method, max_new_tokens=3)
                assert seen.ask(question, max_new_tokens=3).token_ids == whole.token_ids


def test_a_conversation_goes_on_from_there_and_the_image_is_asked_again(vlm):
    seen = vlm.see(SCENE)
    chat, whole = seen.chat(), minivtw.Chat(vlm)
    expected = [whole.ask(QUESTIONS[0], SCENE), whole.ask(QUESTIONS[1]), whole.ask(QUESTIONS[2], THREE)]
    turns = [chat.ask(QUESTIONS[0]), chat.ask(QUESTIONS[1]), chat.ask(QUESTIONS[2], THREE)]
    assert [turn.token_ids for turn in turns] == [turn.token_ids for turn in expected]
    assert [counted(turn) for turn in turns] == [counted(turn) for turn in expected]
    assert "reused" in turns[0].stats and "reused" not in turns[1].stats
    assert seen.ask(QUESTIONS[0]).token_ids == expected[0].token_ids


def test_threads_ask_side_by_side(vlm):
    seen = vlm.see(SCENE)
    expected = [seen.ask(question).token_ids for question in QUESTIONS] * 4
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        told = list(pool.map(lambda question: seen.ask(question).token_ids, QUESTIONS * 4))
    assert told == expected


def test_what_cannot_be_seen_or_asked_is_one_line(vlm):
    with pytest.raises(InputError, match="there is no image to be seen"):
        vlm.see(None)
    seen = vlm.see(SCENE)
    with pytest.raises(InputError, match="this question does not stand after the image"):
        seen.ask("Compare <image> with the first")
    with pytest.raises(InputError, match="the model has 4096 positions"):
        seen.ask("word " * 5000)
    for withdraw in ("off", 5):
        with pytest.raises(InputError, match="the model has 4096 positions"):
            vlm.see(SCENE, withdraw, system="word " * 5000)
    with pytest.raises(ZeroDivisionError):
        seen.ask(QUESTIONS[0], stream=lambda piece: 1 / 0)
    chat = seen.chat()
    with pytest.raises(ZeroDivisionError):
        chat.ask(QUESTIONS[0], stream=lambda piece: 1 / 0)
    assert chat.ask(QUESTIONS[0]).text == "white"
    with pytest.raises(InputError, match="the image of this conversation has been seen"):
        seen.chat().ask(QUESTIONS[0], THREE)


def test_a_system_message_comes_first_in_both(vlm):
    seen = vlm.see(SCENE, system="Answer in one word.")
    assert seen.ask(QUESTIONS[1]).token_ids == vlm.answer(SCENE, QUESTIONS[1], system="Answer in one word.").token_ids


def test_the_shelf_s_table_says_what_can_be_reused(vlm):
    """And how many other patches another question keeps, at the parameters of the chapter's numbers."""
    page, numbers = (
        (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("08-your-own-method.md", "data/08-the-shelf.md")
    )
    rows = re.findall(r"^\| (`\w+`.*?) \|.*\| (yes|no, (\d+) %) \|$", page.split("## One table")[0], re.M)
    told = {}
    for names, cell, share in rows:
        for place, name in enumerate(re.findall(r"`(\w+)`", names)):
            found = re.search(rf"`({name}:[^`]*)`", numbers)
            told[name], method = cell, re.sub(",seed=.*", "", found[1]) if found else name
            if cell == "yes":
                vlm.see(SCENE, None, method)
                continue
            with pytest.raises(InputError, match="nothing can be reused"):
                vlm.see(SCENE, None, method)
            if place == 0:
                assert abs(100 * replaced_patches(vlm, method) - int(share)) < 2, name
    assert told.keys() | {"renumber", "own_positions", "random_tokens"} == METHODS.keys()


def replaced_patches(vlm, method):
    """Of the patches in the last layer's cache, the share that is not there at another question: mean over pairs."""
    kept = []
    for question in ("What color is the star?", "How many objects are there?", "Where is the square?"):
        prompt, cache = vlm.prepare(SCENE, question), KVCache(vlm.config)
        vlm.advance(vlm.embed(prompt), cache, vlm.method(None, method))
        kept.append({place for place in cache.layers[-1].positions if prompt.is_visual[place]})
    return np.mean([len(one - other) / len(one) for one, other in itertools.permutations(kept, 2)])


def test_the_drawing_of_a_seen_image_is_what_stands_in_the_caches(vlm):
    spec = importlib.util.spec_from_file_location("drawn", ROOT / "docs" / "pictures" / "seen.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.draw(vlm) == (ROOT / "docs" / "pictures" / "seen.svg").read_text(encoding="utf-8")


@settings(max_examples=15)
@given(
    st.lists(st.sampled_from(QUESTIONS + ["Hello", "Is there a red square?", "star"]), min_size=1, max_size=4),
    st.integers(0, 12),
)
def test_the_order_of_questions_does_not_matter(questions, layer):
    vlm = minivtw.load()
    seen = vlm.see(SCENE, layer)
    before = contents(seen.cache)
    told = {question: seen.ask(question, max_new_tokens=4).token_ids for question in questions}
    for question in reversed(questions):
        assert seen.ask(question, max_new_tokens=4).token_ids == told[question]
    assert contents(seen.cache) == before
