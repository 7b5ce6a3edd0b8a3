"""A reader's own method: what it raises arrives as it is, and what it returns is checked before a layer works on it."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import minivtw
from minivtw import Chat, InputError, chat, evaluate, generate
from minivtw.methods.shelf import method_of
from minivtw.methods.text import spec_of
from minivtw.methods.withdrawal import freeze, then, withdraw
from minivtw.model.cache import KVCache
from tests.doors import assert_one_line_error, run
from tests.small_llava import write_folder

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8))


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    return minivtw.load(write_folder(tmp_path_factory.mktemp("model")))


def ask(vlm, method):
    return vlm.answer(PICTURE, "Hm?", method=method, max_new_tokens=3)


def taken(tokens, rows):
    """Tokens as nobody should make them: any rows of every array."""
    names = ("hidden", "positions", "is_visual", "rotary_positions")
    return replace(tokens, **{name: getattr(tokens, name)[rows] for name in names})


def last(tokens):
    return np.arange(len(tokens)) == len(tokens) - 1


def with_nan(tokens):
    hidden = tokens.hidden.copy()
    hidden[0, 0] = np.nan
    return replace(tokens, hidden=hidden)


def written_into(tokens):
    tokens.hidden[0, 0] = np.inf
    return tokens


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda tokens: None, "tokens, not NoneType"),
        (lambda tokens: tokens.hidden, "tokens, not ndarray"),
        (lambda tokens: taken(tokens, np.arange(len(tokens)).repeat(2)), "each of them once and in their order"),
        (lambda tokens: taken(tokens, np.arange(len(tokens))[::-1]), "each of them once and in their order"),
        (lambda tokens: replace(tokens, positions=tokens.positions + 1), "tokens of those that it was given"),
        (lambda tokens: replace(tokens, cache=KVCache(minivtw.load().config)), "of those that it was given"),
        (lambda tokens: replace(tokens, ran=tokens.ran[:-1]), "of those that it was given, not earlier ones"),
        (lambda tokens: replace(tokens, notes={}), "of those that it was given, not earlier ones"),
        (lambda tokens: tokens[:-1], "the last token, to be worked on"),
        (lambda tokens: tokens[:0], "the last token, to be worked on"),
        (lambda tokens: tokens.freeze(last(tokens)), "the last token, to be worked on"),
        (lambda tokens: replace(tokens, hidden=tokens.hidden.astype(np.float64)), "hidden as float32, of shape (31, 16)"),
        (lambda tokens: replace(tokens, hidden=tokens.hidden.astype(int)), "hidden as float32"),
        (lambda tokens: replace(tokens, hidden=tokens.hidden[:, :8]), "hidden as float32, of shape (31, 16)"),
        (lambda tokens: replace(tokens, hidden=tokens.hidden[1:]), "hidden as float32, of shape (31, 16)"),
        (lambda tokens: replace(tokens, hidden=tokens.hidden.tolist()), "hidden as float32, of shape (31, 16)"),
        (lambda tokens: replace(tokens, positions=None), "positions as int64, of shape (31,)"),
        (lambda tokens: replace(tokens, is_visual=tokens.is_visual.astype(int)), "is_visual as bool, of shape (31,)"),
        (lambda tokens: replace(tokens, works=np.ones(len(tokens))), "works as bool, of shape (31,)"),
        (lambda tokens: replace(tokens, works=np.ones(3, bool)), "works as bool, of shape (31,)"),
        (lambda tokens: replace(tokens, rotary_positions=tokens.positions / 2), "rotary_positions as int64"),
        (lambda tokens: replace(tokens, rotary_positions=tokens.positions + 10**9), "rotary positions from 0 to 63"),
        (lambda tokens: replace(tokens, rotary_positions=tokens.positions - 1), "rotary positions from 0 to 63"),
        (with_nan, "finite numbers"),
        (written_into, "finite numbers"),
        (lambda tokens: tokens.follow([1, 2], [3], np.full((2, 1), np.nan)), "finite numbers"),
    ],
)  # fmt: skip
def test_what_no_layer_can_work_on_is_refused_and_the_line_names_the_method(vlm, change, words):
    def mine(index, tokens):
        return change(tokens) if index == 1 else tokens

    for method in (mine, then(mine, withdraw(2))):
        with pytest.raises(InputError) as refused:
            ask(vlm, method)
        assert str(refused.value).startswith("mine must return ") and str(refused.value).endswith(", before layer 1")
        assert words in str(refused.value)


def test_shares_of_another_shape_are_refused_where_they_are_given(vlm):
    for followers, leaders, shares in (([1, 2], [3], np.ones((1, 2))), ([1], [2], 1.0), (1, [2], np.ones((1, 1)))):
        with pytest.raises(InputError, match="shares have one row for each token that follows"):
            ask(vlm, lambda index, tokens: tokens.follow(followers, leaders, shares))


def test_tokens_of_an_earlier_layer_are_refused(vlm):
    """They would undo the work of the layers between, and still count as if it had been done."""
    first = []

    def stale(index, tokens):
        first.append(tokens)
        return first[0]

    with pytest.raises(InputError, match="stale must return tokens of those that it was given, not earlier ones"):
        ask(vlm, stale)


def test_a_method_that_is_given_to_advance_is_checked_too(vlm):
    prompt = vlm.prepare(PICTURE, "Hm?")
    for method, words in (
        (lambda index, tokens: tokens.freeze(last(tokens)), "<lambda> must return the last token, to be worked on"),
        (then(lambda index, tokens: tokens[:-1]), "<lambda> must return the last token, to be worked on"),
    ):
        with pytest.raises(InputError, match=words):
            vlm.advance(vlm.embed(prompt), KVCache(vlm.config), method)


def test_the_vision_tower_is_known_where_a_turn_has_an_image(vlm):
    tower = vlm.embed(vlm.prepare(PICTURE, "Hm?")).tower
    assert tower is not None and len(tower.entering) == 1
    assert vlm.embed(vlm.prepare(None, "Hm?")).tower is None


def test_the_k_of_whatever_withdraws_is_told(vlm):
    told = [
        ("freeze:layers=1+withdraw:layer=2", 2),
        ("withdraw:layer=3+withdraw:layer=1", 1),
        ("freeze:layers=1", None),
    ]
    for method, layer in told:
        assert vlm.answer(PICTURE, "Hm?", method=method, max_new_tokens=1).stats["withdraw_layer"] == layer


def test_a_prompt_that_ends_with_the_image_is_refused_where_the_image_leaves(vlm):
    prompt = vlm.prepare(PICTURE, "Hm?")
    ends = np.arange(len(prompt.token_ids)) > 3
    with pytest.raises(InputError, match="the method withdrew the prompt's last token"):
        vlm.advance(vlm.embed(prompt)._replace(is_visual=ends), KVCache(vlm.config), withdraw(2))


def test_what_a_method_may_do_is_not_refused(vlm):
    """Drop, freeze, change states and positions, look: the answer is that of the same thing on the shelf, or any."""

    def gone(index, tokens):
        return tokens[np.flatnonzero(~tokens.is_visual)] if index == 2 else tokens

    def frozen(index, tokens):
        return replace(tokens, works=~tokens.is_visual)

    def changed(index, tokens):
        looked = index and tokens.attention([0, -1]).any()
        return (
            replace(tokens, hidden=tokens.hidden * 1.5, rotary_positions=np.arange(len(tokens)), works=None)
            if looked
            else tokens
        )

    assert ask(vlm, gone).token_ids == ask(vlm, withdraw(2)).token_ids
    assert ask(vlm, frozen).token_ids == ask(vlm, freeze(range(4))).token_ids
    assert ask(vlm, frozen).stats["prefill"] == ask(vlm, freeze(range(4))).stats["prefill"]
    assert ask(vlm, changed).token_ids


def test_a_token_that_is_fed_back_is_checked_as_well(vlm):
    def late(index, tokens):
        return tokens[:0] if len(tokens) == 1 else tokens

    talk = Chat(vlm, method=late)
    with pytest.raises(InputError, match="late must return the last token"):
        talk.ask("Hm?", PICTURE, max_new_tokens=2)
    assert talk.cache.next_position == 0 and not any(talk.cache.tokens_per_layer)


def test_what_a_method_writes_into_the_first_layers_tokens_stays_there(vlm):
    """An embedded prompt may be used for many methods (`evaluate`, the page): none of them changes it for the next."""

    def loud(index, tokens):
        tokens.hidden[:] *= 2
        return tokens

    prompt = vlm.prepare(PICTURE, "Hm?")
    embedded = vlm.embed(prompt)
    kept = embedded.hidden.copy()
    vlm.advance(embedded, KVCache(vlm.config), loud)
    assert np.array_equal(embedded.hidden, kept)


FAULTS = ["BrokenPipeError('mine')", "OSError(2, 'mine', '/nowhere')", "MemoryError('mine')", "LookupError('mine')"]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("main", [generate.main, chat.main])
def test_what_a_method_raises_arrives_as_it_is(vlm, tmp_path, fault, main):
    """In the library, and at a command, which ends with exit code 0 or 2 where an error of this kind is its own."""
    raised = eval(fault)

    def mine(index, tokens):
        raise raised

    with pytest.raises(type(raised)) as caught:
        ask(vlm, mine)
    assert caught.value is raised
    (tmp_path / "mine.py").write_text(f"def mine(index, tokens):\n    raise {fault}\n", encoding="utf-8")
    PICTURE.save(tmp_path / "picture.png")
    options = ["--model", vlm.folder, "--method", f"{tmp_path}/mine.py:mine"]
    question = [] if main is chat.main else ["Hm?"]
    with pytest.raises(type(raised), match="mine"):
        run(main, tmp_path / "picture.png", *question, *options, stdin="Hm?\n")


@pytest.mark.parametrize("name", ["mine.py", "c++/mine.py", "a:b/mine.py", "a:b+c:d, e.py/mi+ne.py"])
def test_a_file_may_have_any_name(vlm, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "def gone(index, tokens):\n    return tokens[~tokens.is_visual] if index == 2 else tokens\n"
        "def lost(index, tokens):\n    pass\n",
        encoding="utf-8",
    )
    for text in (f"{name}:gone", f"{path}:gone", f"freeze:layers=3 + {name}:gone+{path}:gone+withdraw:layer=3"):
        method = method_of(text)
        assert ask(vlm, method).token_ids == ask(vlm, withdraw(2)).token_ids
        assert spec_of(method_of(spec_of(method))) == spec_of(method)
    PICTURE.save("picture.png")
    ran = run(generate.main, "picture.png", "Hm?", "--model", vlm.folder, "--method", f"{name}:lost")
    assert_one_line_error(ran, f"{name}:lost must return tokens, not NoneType, before layer 0")


def test_a_file_runs_only_for_a_function_in_it(vlm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "__import__('pathlib').Path('ran').touch()\ndef gone(index, tokens):\n    return tokens\n", encoding="utf-8"
    )
    for text in ("mine.py", "mine.py:", "mine.py+withdraw:layer=1", "withdraw:layer=1+mine.py", "mine.py:layer=1"):
        with pytest.raises(InputError, match="there is no method 'mine.py'"):
            method_of(text)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(InputError, match="has no function 'other'"):
        method_of("mine.py:other")
    assert (tmp_path / "ran").exists()


SWEPT = """
from minivtw.methods.text import Layer, named

def leave(layer: int, keep=0, name="f"):
    def method(index, tokens):
        visual = tokens.is_visual.cumsum() * tokens.is_visual
        return tokens[visual <= keep] if index == layer else tokens
    return method

def mine(index, tokens):
    return tokens

written_in_c = max

def lost(layer):
    return layer

def strict(layer):
    raise ValueError(f"no {layer}")

@named
def checked(layer: Layer):
    return leave(layer)
"""


def test_parameters_after_a_function_make_the_method(vlm, tmp_path, monkeypatch):
    """They are read as numbers where they are, and the method is told apart by them in every table."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mi,ne.py").write_text(SWEPT, encoding="utf-8")
    for text, same in (
        ("mi,ne.py:leave,layer=2", "withdraw:layer=2"),
        ("mi,ne.py:leave,keep=1e9,layer=2", "mi,ne.py:mine"),
        ("mi,ne.py:checked,layer=1", "withdraw:layer=1"),
        (" mi,ne.py:leave,layer=3,name=x=y + freeze:layers=1", "freeze:layers=1+withdraw:layer=3"),
    ):
        assert spec_of(method_of(text)) == text.strip().replace(" + ", "+")
        assert spec_of(method_of(spec_of(method_of(text)))) == spec_of(method_of(text))
        assert ask(vlm, text).stats["prefill"]["entered"] == ask(vlm, same).stats["prefill"]["entered"]
    PICTURE.save("0.png")
    question = {"image": "0.png", "family": "count", "question": "Hm?", "answer": "two"}
    (tmp_path / "questions.jsonl").write_text(json.dumps(question), encoding="utf-8")
    swept = [f"mi,ne.py:leave,layer={layer}" for layer in (1, 3)]
    out = run(evaluate.main, ".", "--model", vlm.folder, "--methods", *swept, "--json", "swept.json")[1]
    runs = json.loads((tmp_path / "swept.json").read_text(encoding="utf-8"))["runs"]
    by_name = {one["method"]: one["prefill_flops"] for one in runs}
    assert all(text in out for text in swept) and by_name[swept[0]] < by_name[swept[1]]


@pytest.mark.parametrize(
    "given, words",
    [
        ("leave,laier=2", "the method {}:leave takes layer, keep, name, not 'laier'"),
        ("leave,layer=2,layer=3", "the text gives the method {}:leave its layer twice"),
        ("leave,layer=2.5", "layer of the method {}:leave cannot be '2.5'"),
        ("leave,layer", "layer of the method {}:leave cannot be ''"),
        ("leave,keep=1", "{}:leave,keep=1 cannot be called without more: missing a required argument: 'layer'"),
        ("leave", "{}:leave must return tokens, not function (a function that returns a method takes a comma"),
        (
            "strict",
            "{}:strict cannot be called with an index and tokens: too many positional arguments; a function that returns a method takes a comma",
        ),
        (
            "mine,",
            "{}:mine, cannot be called without more: missing a required argument: 'index'; a function that returns a method takes a comma",
        ),
        ("written_in_c,layer=2", "the method {}:written_in_c takes positional, named, not 'layer'"),
        ("strict,layer=2", "cannot make {}:strict,layer=2: ValueError: no 2"),
        ("lost,layer=2", "{}:lost,layer=2 must be a function of index and tokens, not int"),
        ("mine,layer=2", "the method {}:mine takes index, tokens, not 'layer'"),
        ("checked,layer=-1", "layer must be 0 or more, not -1"),
        ("checked,layer=99", "a layer must be from 0 to 4, the number of layers, not 99"),
        ("leave,layer=99+nope", "there is no method 'nope'"),
        ("other,layer=2", "has no function 'other'"),
    ],
)
def test_parameters_that_make_no_method_are_refused_in_one_line(vlm, tmp_path, given, words):
    (tmp_path / "mine.py").write_text(SWEPT, encoding="utf-8")
    PICTURE.save(tmp_path / "picture.png")
    options = ["--model", vlm.folder, "--method", f"{tmp_path}/mine.py:{given}"]
    ran = run(generate.main, tmp_path / "picture.png", "Hm?", *options)
    assert_one_line_error(ran, words.replace("{}", f"{tmp_path}/mine.py"))


def test_a_file_with_parameters_runs_only_where_the_command_line_names_it(vlm, tmp_path):
    (tmp_path / "mine.py").write_text("__import__('pathlib').Path(__file__ + '.ran').touch()", encoding="utf-8")
    with pytest.raises(InputError, match="code is run only if --method names it"):
        method_of(f"{tmp_path}/mine.py:leave,layer=2", files=False)
    assert not (tmp_path / "mine.py.ran").exists()
