"""Mistaken users: any options, names and lines of questions, in any combination; one line, or success, at every command."""

import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minivtw import InputError, bench, calibrate, chat, doctor, evaluate, explore, fetch, generate, report, step
from minivtw.checkpoints import hub, smollm2
from minivtw.inputs.questions import read_questions
from minivtw.methods.shelf import METHODS
from minivtw.page import story
from minivtw.timing import rounds as timing
from tests.doors import assert_one_line_error, assert_promise, bounded_memory, examples, make_world, run

# What a mistaken user, a script with an empty variable or a paste from elsewhere puts where an option expects something.
ODD = [
    "", " ", "0", "1", "2", "-1", "3.5", "1e-320", "1e999", "nan", "-inf", "99999999999999999999", "0x10", "1_0", "½", "٣",
    "auto", "off", "off,auto", "0,1,4", ",", "5", "40%", "110%", "true", "None", "[]", "{}", "nope", "/", ".", "..", "~",
    "/dev/null", "a/b", "no/where/at/all", "x" * 300, "x" * 5000, "\x1b[31m", "\udcff", "a\nb", "<image>", "<s>", "-", "=",
]  # fmt: skip
NUMBERS = ["0", "1", "2", "-1", "3.5", "nan", "99999999999999999999", "1e999", "", "½", "x" * 5000]
COUNTS = ["0", "1", "2", "-1", "3.5", "nan", "", "½"]  # where a large number is a long run, and asked for


@st.composite
def methods(draw):
    """Texts that look like methods."""
    parts = []
    for _ in range(draw(st.integers(1, 3))):
        keys = st.sampled_from(["layer", "layers", "keep", "seed", "share", "quiet", "pivots", "raters", ""])
        values = st.sampled_from(["0", "2", "1-3", "3-1", "0/2/4", "1-99999999999", "-1", "0.5", "nan", "1e9", "x", ""])
        options = draw(st.lists(st.tuples(keys, values).map("=".join), max_size=3))
        name = draw(st.sampled_from([*METHODS, "nope", "nope.py", "", "model/config.json"]))
        parts.append(":".join([name, ",".join(options)] if options else [name]))
    return "+".join(parts)


METHOD = st.one_of(methods(), methods(), st.sampled_from(ODD))
ANY = st.sampled_from(ODD)
NUMBER, COUNT = st.sampled_from(NUMBERS), st.sampled_from(COUNTS)
SHARED = {"--model": ANY, "--withdraw": ANY, "--method": METHOD}
SAMPLED = {"--max-new-tokens": NUMBER, "--temperature": ANY, "--top-k": NUMBER, "--top-p": ANY, "--seed": NUMBER}
SIZES = {"--max-tiles": NUMBER, "--low-memory": None}
DOORS = {
    "generate": (generate, "{picture} Hm? --model {model} --max-new-tokens 2", SHARED | SAMPLED | SIZES | {
        "--image": ANY, "--system": ANY, "--stats": None, "--json": None, "--trace": None,
    }),
    "generate, twice": (generate, "{picture} Hm? Why? --model {model} --max-new-tokens 1", SHARED | {
        "--image": ANY, "--system": ANY, "--stats": None, "--json": None, "--trace": None,
    }),
    "chat": (chat, "{picture} --model {model} --max-new-tokens 2", SHARED | SAMPLED | SIZES | {"--system": ANY}),
    "doctor": (doctor, "{model} {picture}", {"--prompt": ANY, "--max-tiles": NUMBER}),
    "step": (step, "{picture} Hm? --model {model}", SHARED | {"--list": None}),
    "report": (report, "{picture} Hm? --model {model} --output page.html", SHARED | {"--output": ANY}),
    "explore": (explore, "{picture} --model {model} --no-browser", SHARED | {"--port": NUMBER}),
    "calibrate": (calibrate, "{model} --samples {questions} --threshold 1e9", {
        "--samples": ANY, "--criterion": st.sampled_from(["kl", "attention", "answer", "x"]), "--threshold": ANY,
        "--limit": NUMBER, "--save": ANY, "--schedule": None, "--json": None,
    }),
    "evaluate": (evaluate, "{questions} --model {model}", SHARED | {"--limit": NUMBER, "--without": ANY, "--json": ANY}),
    "bench": (bench, "{picture} Hm? --model {model} --repeats 1 --new-tokens 1", SHARED | {
        "--repeats": COUNT, "--new-tokens": COUNT, "--tiles": NUMBER, "--tokens": NUMBER, "--json": None,
        "--shape": st.sampled_from(["", "nope", "smolvlm"]),
    }),
    "fetch": (fetch, "smol", {"--wheel": ANY, "--json": None}),
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A world to work in, without network, browser and long measurements."""

    def unreachable(*_):
        raise InputError("there is no network")

    world = make_world(tmp_path_factory.mktemp("world"))
    before = os.getcwd()
    with pytest.MonkeyPatch.context() as patch:
        os.chdir(world.folder)
        patch.setenv("MINIVTW_CACHE", str(world.folder / "cache"))
        patch.setattr(hub, "fetched", unreachable)
        patch.setattr(smollm2, "fetched", unreachable)
        patch.setattr(smollm2, "download_wheel", unreachable)
        patch.setattr(explore.Server, "serve_forever", lambda server: None)
        patch.setattr(story, "REPEATS", 1)
        patch.setattr(timing, "Ceilings", lambda: lambda: {"sgemm": 1e9, "stream": 1e9})
        with bounded_memory():
            yield world
        os.chdir(before)


@st.composite
def lines(draw, usual, options):
    """The usual arguments of a command, some of them gone or replaced, and some of its options."""
    arguments = list(usual)
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 1, 2]))):
        index = draw(st.integers(0, len(arguments) - 1))
        arguments[index : index + 1] = draw(st.one_of(st.just([]), ANY.map(lambda odd: [odd])))
        if not arguments:
            break
    for name in draw(st.lists(st.sampled_from(sorted(options)), max_size=3)):
        arguments += [name] if options[name] is None else [name, draw(options[name])]
    return arguments


SLOW = {"generate, twice": 2, "report": 4, "bench": 2, "evaluate": 2, "calibrate": 2}  # these are given fewer examples


@examples(quick=20, deep=300)
@pytest.mark.parametrize("name", DOORS)
def test_any_options(world, name, examples):
    """Each run finds the same world: a page called `2` that one has left is what the next one's `--json 2` replaces."""
    module, usual, options = DOORS[name]

    def run_with(arguments):
        if name == "bench":
            arguments = [*arguments, "--alone"]  # what transformers says is its own
        if name == "fetch" and "--wheel" not in arguments:
            arguments = [*arguments, "--wheel", "nope"]
        with world.left_as_it_was():
            return run(module.main, *arguments, stdin="Hm?\n")

    @settings(max_examples=examples // SLOW.get(name, 1), suppress_health_check=[HealthCheck.too_slow])
    @given(lines(world.arguments(usual), options))
    def check(arguments):
        if name == "calibrate" and not any(each == str(world.model) for each in arguments):
            return  # without a model it is about the one that ships
        ran = run_with(arguments)
        if name == "chat" and ran.code == 0:  # it reports and goes on
            assert all(line.startswith("minivtw: error: ") and line.isprintable() for line in ran.err.splitlines())
        else:
            assert_promise(ran)

    if (
        name != "fetch"
    ):  # the usual line works, also where the world's path holds spaces: what is tried is what is odd in it
        assert_promise(run_with(world.arguments(usual)), 0)
    check()


@pytest.mark.parametrize(
    "seeds, words",
    [
        ("0-999999999", "seeds go from the smaller to the larger"),
        ("3-1", "seeds go from the smaller to the larger"),
        (f"0-{'9' * 5000}", "seed of the method random cannot be"),
    ],
)
def test_seeds_without_end(world, seeds, words):
    ran = run(evaluate.main, world.questions, "--model", world.model, "--method", f"random:layer=1,seed={seeds}")
    assert_one_line_error(ran, words)


@pytest.mark.parametrize("layers", ["0-99999999999", f"0-{'9' * 5000}"])
def test_layers_without_end(world, layers):
    ran = run(generate.main, world.picture, "Hm?", "--model", world.model, "--method", f"freeze:layers={layers}")
    assert_one_line_error(ran, "layers of the method freeze cannot be")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.sampled_from(ODD),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["image", "question", "answer", "family", "turns", "x"]), inner, max_size=4
    ),
    max_leaves=9,
)  # fmt: skip
DEEP = st.tuples(
    st.sampled_from(["[", '{"a":', '{"turns":[[', "-", "9", '"']), st.sampled_from([1, 40, 3000, 100_000])
).map(lambda pair: pair[0] * pair[1])
QUESTION = {"image": "../picture.png", "family": "f", "question": "Hm?", "answer": "a"}
NEARLY = st.dictionaries(st.sampled_from([*QUESTION, "turns"]), JSON, max_size=2).map(lambda change: QUESTION | change)
LINE = st.one_of(
    DEEP.map(str.encode),
    st.binary(max_size=40),
    *(objects.map(lambda value: json.dumps(value).encode()) for objects in (JSON, NEARLY)),
)


@examples(quick=60, deep=1500)
def test_any_lines_of_questions(world, tmp_path, examples):
    @settings(max_examples=examples, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
    @given(st.lists(LINE, max_size=3), st.sampled_from([("image", "question"), evaluate.SCORED]))
    def check(written, needed):
        (world.questions / "questions.jsonl").write_bytes(b"\n".join(written))
        try:
            questions = read_questions(world.questions, needed)
        except InputError as error:
            assert str(error).startswith(str(world.questions / "questions.jsonl"))
            return
        assert questions and all(isinstance(each.question, str) and os.path.isfile(each.image) for each in questions)

    before = (world.questions / "questions.jsonl").read_bytes()
    try:
        check()
    finally:
        (world.questions / "questions.jsonl").write_bytes(before)


NAMES = st.text(st.characters(exclude_characters="\0"), min_size=1, max_size=12) | st.sampled_from(ODD)


@examples(quick=30, deep=600)
def test_any_names(world, examples):
    """Of a picture, a model, a folder of questions, a page: one line, or it happens to be there."""

    @settings(max_examples=examples)
    @given(NAMES, st.sampled_from(["generate", "report", "doctor", "evaluate", "explore"]), st.booleans())
    def check(name, door, is_model):
        picture, model = (world.picture, name) if is_model else (name, world.model)
        arguments = {
            "generate": (picture, "Hm?", f"--model={model}", "--max-new-tokens=1"),
            "report": (picture, "Hm?", f"--model={model}", "-o=/dev/null"),
            "doctor": (model, picture),
            "evaluate": (world.questions if is_model else name, f"--model={model}"),
            "explore": (picture, f"--model={model}", "--no-browser"),
        }[door]
        assert_promise(run(DOORS[door][0].main, *arguments))

    check()


LONG = "word " * 200  # more than the small model's 256 positions


@pytest.mark.parametrize(
    "door, arguments",
    [
        ("generate", "{picture} {LONG} --model {model}"),
        ("generate", "{picture} Hm? --model {model} --system {LONG}"),
        ("report", "{picture} {LONG} --model {model}"),
        ("bench", "{picture} {LONG} --model {model} --alone"),
        ("evaluate", "{long} --model {model}"),
        ("calibrate", "{model} --samples {long} --threshold 1e9"),
    ],
)
def test_a_prompt_beyond_the_positions_is_refused_by_every_command(world, door, arguments):
    folder = world.folder / "long"
    folder.mkdir(exist_ok=True)
    (folder / "questions.jsonl").write_text(json.dumps(QUESTION | {"question": LONG}), encoding="utf-8")
    ran = run(DOORS[door][0].main, *world.arguments(arguments, LONG=LONG, long=folder))
    assert_one_line_error(ran, "; the model has 256 positions")


def test_a_chat_reports_a_prompt_beyond_the_positions_and_goes_on(world):
    ran = run(chat.main, "--model", world.model, "--max-new-tokens", "2", stdin=f"Hm?\n{LONG}\nAnd?\n")
    assert ran.code == 0 and ran.out.count("\n") == 2
    assert ran.err.count("\n") == 1 and "; the model has 256 positions" in ran.err
