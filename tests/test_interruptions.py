"""Ctrl-C at any moment of any command: exit code 130, not a word, files old or new; a chat as it was or as it would be."""

import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minivtw
from minivtw import InputError, calibrate, chat, evaluate, fetch, generate, report
from minivtw.checkpoints import graft, hub
from minivtw.page import story
from tests.doors import assert_promise, examples, interrupted, make_world, run
from tests.test_fetch import cache  # noqa: F401  a fixture

DOORS = {
    "generate": (generate.main, "{picture} Hm? --model {model} --max-new-tokens 3"),
    "chat": (chat.main, "{picture} --model {model} --max-new-tokens 3"),
    "calibrate": (calibrate.main, "{model} --samples {questions} --threshold 1e9 --store"),
    "evaluate": (evaluate.main, "{questions} --model {model} --json {folder}/figures.json"),
    "report": (report.main, "{picture} Hm? --model {model} -o {folder}/page.html"),
}
WRITTEN = {"calibrate": "model/withdrawal.json", "evaluate": "figures.json", "report": "page.html"}
OLD = b'{"withdraw_layer": 1}'
SLOW = {"report": 6, "evaluate": 3}  # these are given fewer examples
# What the garbage collector runs is interrupted as well, and Python says so itself, of whatever ends there.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
MOMENTS = st.integers(0, 10**4)  # in ten-thousandths of the calls that a whole run makes


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(story, "REPEATS", 1)
        yield make_world(tmp_path_factory.mktemp("world"))


def calls_of(function, *arguments):
    """How many Python functions a call calls."""
    count = 0

    def seen(frame, event, argument):
        nonlocal count
        count += event == "call"

    sys.setprofile(seen)
    try:
        function(*arguments)
    finally:
        sys.setprofile(None)
    return count


def interrupts(main, calls):
    """A command's `main` with Ctrl-C after so many calls."""

    def interrupted_main(arguments):
        with interrupted(calls):
            main(arguments)

    return interrupted_main


class Run:
    """A door with its arguments, and how long it is."""

    def __init__(self, world, name):
        self.main, line = DOORS[name]
        self.arguments = world.arguments(line)
        self.calls = 0

        def counted(given):
            self.calls = calls_of(self.main, given)

        assert_promise(self.run(counted), 0)

    def run(self, main):
        return run(main, *self.arguments, stdin="Hm?\nAnd?\n")

    def interrupted(self, moment):
        return self.run(interrupts(self.main, moment * self.calls // 10**4))


def check_interrupted(world, door, name, moment):
    """Exit code 130, whole lines, and every file as it was, but for the one that may be new."""
    before = world.files()
    ran = door.interrupted(moment)
    assert ran.code in (0, 130), ran  # the moment may be after the last call
    assert_promise(ran, ran.code)
    after = world.files()
    assert after.keys() == before.keys()
    changed = [path for path in after if after[path] != before[path]]
    assert changed in ([], [WRITTEN.get(name)])
    if changed and name != "report":
        json.loads(after[WRITTEN[name]])  # whole
    if changed and name == "report":
        assert after[WRITTEN[name]].rstrip().endswith(b"</html>")


@examples(quick=8, deep=120)
@pytest.mark.parametrize("name", DOORS)
def test_ctrl_c_at_any_moment(world, name, examples):
    if name in WRITTEN:
        (world.folder / WRITTEN[name]).write_bytes(OLD)
    door = Run(world, name)

    @settings(max_examples=max(examples // SLOW.get(name, 1), 5))
    @given(MOMENTS)
    def at(moment):
        if name in WRITTEN:
            (world.folder / WRITTEN[name]).write_bytes(OLD)
        check_interrupted(world, door, name, moment)

    at()


@examples(quick=8, deep=60)
def test_ctrl_c_at_any_moment_of_a_fetch(cache, examples):  # noqa: F811
    """The model in the cache is whole: the one of an older graft, or the new one."""
    folder = graft.fetch("smol")
    (folder / graft.MADE_FROM).write_text("older", encoding="utf-8")
    calls = calls_of(run, fetch.main, "smol")

    @settings(max_examples=examples)
    @given(MOMENTS)
    def at(moment):
        (folder / graft.MADE_FROM).write_text("older", encoding="utf-8")
        ran = run(interrupts(fetch.main, moment * calls // 10**4), "smol")
        assert_promise(ran, ran.code if ran.code in (0, 130) else 0)
        assert {path.name for path in cache.iterdir()} >= set(hub.FETCHED.values())
        minivtw.load("smol")

    at()


class Broken(Exception):
    """What a caller's own function raises."""


@pytest.fixture(scope="module")
def vlm(world):
    return minivtw.load(world.model)


def talk(vlm, world, second=None):
    """A chat after a question about a picture, and perhaps another."""
    talked = minivtw.Chat(vlm, withdraw=2)
    talked.ask("Hm?", world.picture, max_new_tokens=3)
    if second:
        second(talked)
    return talked


def state(talked):
    """What a chat is at, and what it says next."""
    held = talked.cache.tokens_per_layer, talked.cache.next_position
    return held, talked.ask("C?", max_new_tokens=4).token_ids


@examples(quick=25, deep=400)
def test_a_chat_that_is_interrupted_has_had_its_turn_or_not(world, vlm, examples):
    second = lambda talked: talked.ask("B?", max_new_tokens=4)
    expected = state(talk(vlm, world)), state(talk(vlm, world, second))
    assert expected[0] != expected[1]
    calls = calls_of(second, talk(vlm, world))

    @settings(max_examples=examples)
    @given(MOMENTS)
    def at(moment):
        talked = talk(vlm, world)
        try:
            with interrupted(moment * calls // 10**4):
                second(talked)
        except KeyboardInterrupt:
            pass
        assert state(talked) in expected

    at()


@examples(quick=25, deep=400)
def test_a_chat_whose_callback_or_image_fails_is_as_it_was(world, vlm, examples):
    expected = state(talk(vlm, world))

    @settings(max_examples=examples)
    @given(st.sampled_from(["observe", "stream", "image"]), st.integers(0, 60))
    def after(what, calls):
        left = calls

        def fails(*_):
            nonlocal left
            left -= 1
            if left < 0:
                raise Broken

        options = {"image": world.folder / f"{calls}.png"} if what == "image" else {what: fails}
        talked = talk(vlm, world)
        with pytest.raises((Broken, InputError)):
            talked.ask("B?", max_new_tokens=4, **options)
            raise Broken  # so many calls were never made
        if left < 0 or what == "image":
            assert state(talked) == expected

    after()
