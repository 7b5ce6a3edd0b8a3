"""Methods as text: whatever is typed, stored or pasted is a method that runs, or one line that says why not."""

import collections
import json
import time
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file, save_file

import minivtw
from minivtw import Chat, InputError, generate
from minivtw.methods.shelf import METHODS, dart, fastv, method_of, random
from minivtw.methods.text import MOST_PARTS, MOST_TEXT, spec_of
from minivtw.methods.withdrawal import adaptive, freeze, withdraw
from tests.doors import assert_one_line_error, examples, run
from tests.families.test_families import GOLDEN as FAMILIES
from tests.small_llava import write_folder
from tests.test_hostile_folders import CLIP, FIRST, LATER, SHARDS, SIGLIP, TILES

PICTURES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (rows, columns, 3), np.uint8))
    for seed, (rows, columns) in enumerate([(20, 30), (70, 40)])
]


def write_onevision(folder):
    """A LLaVA-OneVision of the weights of a small LLaVA, a token for the ends of lines, and tiles of 24 pixels."""
    tensors = {name: array for path in SHARDS.glob("model-*.safetensors") for name, array in load_file(path).items()}
    config = json.loads((SHARDS / "config.json").read_text(encoding="utf-8"))
    width = config["text_config"]["hidden_size"]
    points = {"image_grid_pinpoints": [[24, 24], [24, 48], [48, 24], [48, 48]]}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors | {"image_newline": np.linspace(-1, 1, width, dtype=np.float32)}, folder / "model.safetensors")
    config |= {
        "model_type": "llava_onevision",
        "vision_feature_layer": -1,
        "vision_aspect_ratio": "anyres_max_9",
        **points,
    }
    pixels = {"size": {"height": 24, "width": 24}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, **points}
    for name, content in (("config", config), ("preprocessor_config", pixels)):
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "tokenizer.json").write_bytes((SHARDS / "tokenizer.json").read_bytes())
    return folder


@pytest.fixture(scope="module")
def onevision(tmp_path_factory):
    return minivtw.load(write_onevision(tmp_path_factory.mktemp("onevision")))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return minivtw.load(write_folder(tmp_path_factory.mktemp("small")))


@pytest.mark.parametrize(
    "text, words",
    [
        ("freeze:layers=9-2", "layers of the method freeze cannot be '9-2'"),
        ("freeze:layers=", "layers of the method freeze cannot be ''"),
        ("freeze:layers=-3", "layers of the method freeze cannot be '-3'"),
        ("withdraw:layer=5,layer=6", "the text gives the method withdraw its layer twice"),
        ("fastv:keep=0.5,layer=2,keep=0.5", "the text gives the method fastv its keep twice"),
        ("adaptive:share=nan", "share is a share, from 0 to 1, not nan"),
        ("adaptive:share=-0.1", "share is a share, from 0 to 1, not -0.1"),
        ("adaptive:quiet=-3", "quiet must be 1 or more, not -3"),
        ("adaptive:quiet=0", "quiet must be 1 or more, not 0"),
        ("adaptive:quiet=nan", "quiet of the method adaptive cannot be 'nan'"),
        ("uniform:layer=1,keep=nan", "keep is a share, from 0 to 1, not nan"),
        ("uniform:layer=1,keep=inf", "keep is a share, from 0 to 1, not inf"),
        ("random:layer=1,seed=-1", "seed must be 0 or more, not -1"),
        ("random_tokens:layer=2,seed=-1", "seed must be 0 or more, not -1"),
        ("dart:layer=2,pivots=0", "pivots must be 1 or more, not 0"),
        ("visionzip:merged=-1", "merged is a share, from 0 to 1, not -1"),
        ("withdraw:layer=-1", "layer must be 0 or more, not -1"),
        ("withdraw:layer=1_0,layer", "layer twice"),
        ("", "there is no method ''"),
        ("withdraw:layer=2+", "there is no method ''"),
        ("nope+withdraw:layer=2", "there is no method 'nope'; there are withdraw,"),
        ("withdraw:layer=2+nope:layer=2", "there is no method 'nope'; there are withdraw,"),
        ("x" * (MOST_TEXT + 1), "a method's text has at most 10,000 characters and 100 methods"),
        (
            "+".join(["own_positions"] * (MOST_PARTS + 1)),
            "a method's text has at most 10,000 characters and 100 methods",
        ),
    ],
)
def test_texts_that_mean_nothing_or_contradict_themselves_are_refused(small, text, words):
    with pytest.raises(InputError) as refused:
        method_of(text)
    assert words in str(refused.value)
    PICTURES[0].save(small.folder / "picture.png")
    ran = run(generate.main, small.folder / "picture.png", "Hm?", "--model", small.folder, f"--method={text}")
    assert_one_line_error(ran, words[:100])


@pytest.mark.parametrize(
    "make",
    [
        lambda: withdraw(np.array([3])),
        lambda: withdraw(None),
        lambda: freeze(3),
        lambda: freeze("3"),
        lambda: freeze([1, 2.5]),
        lambda: freeze([[1]]),
        lambda: fastv(1, "0.5"),
        lambda: fastv(1, None),
        lambda: fastv(1, True + 1),
        lambda: fastv(1, 1j),
        lambda: random(1, seed=0.5),
        lambda: random(1, seed=True),
        lambda: dart(1, pivots="4"),
        lambda: adaptive(share=[0.1]),
    ],
)
def test_parameters_of_another_kind_are_refused_in_the_library_too(make):
    with pytest.raises(InputError):
        make()


def test_numbers_of_numpy_are_numbers():
    text = spec_of(fastv(np.int64(2), np.float32(0.5)))
    assert text == "fastv:layer=2,keep=0.5" and spec_of(freeze(np.arange(3))) == "freeze:layers=0-2"
    assert spec_of(method_of(text)) == text


def test_the_longest_texts_are_read_quickly():
    """From wherever they come: what is above the bound is refused unread, what is below it takes no time."""
    begun = time.process_time()
    with pytest.raises(InputError, match="at most 10,000 characters"):
        method_of("freeze:layers=" + "/".join(["0-1000"] * 1_000_000))
    layers = "/".join(["0-1000"] * 1400)
    assert len(method_of(f"freeze:layers={layers}").layers) == 1001
    for text in ("a:" * 4999, "+".join(["a.py:b c"] * 99), "a.py:" * 1999):
        with pytest.raises(InputError):
            method_of(text)
    assert time.process_time() - begun < 2


def test_a_long_stored_text_is_refused_in_one_line(small, tmp_path):
    folder = write_folder(tmp_path)
    text = "freeze:layers=" + "/".join(["0-1000"] * 100_000)
    (folder / "withdrawal.json").write_text(json.dumps({"method": text}), encoding="utf-8")
    PICTURES[0].save(tmp_path / "picture.png")
    assert_one_line_error(
        run(generate.main, tmp_path / "picture.png", "Hm?", "--model", folder), "at most 10,000 characters"
    )


@pytest.mark.parametrize("withdrawn", ["1", "off"])
def test_a_layer_and_a_method_contradict_each_other(small, withdrawn):
    PICTURES[0].save(small.folder / "picture.png")
    asked = (small.folder / "picture.png", "Hm?", "--model", small.folder)
    ran = run(generate.main, *asked, "--withdraw", withdrawn, "--method", "freeze:layers=1")
    assert_one_line_error(ran, "not allowed with argument --withdraw")
    with pytest.raises(InputError, match="withdraw and method both say which tokens go on"):
        small.answer(PICTURES[0], "Hm?", withdraw=1, method="freeze:layers=1")


@pytest.mark.parametrize("name", ["fastervlm", "visionzip"])
def test_where_line_ends_stand_among_the_patches_the_tower_is_not_asked(onevision, name):
    """Whatever the picture: it may come to as many tokens as it has patches."""
    for picture in (*PICTURES, Image.new("RGB", (24, 24))):
        with pytest.raises(InputError, match="only where they are its patches, without line ends"):
            onevision.answer(picture, "Hm?", method=name, max_new_tokens=1)
        assert onevision.answer(picture, "Hm?", method="divprune", max_new_tokens=1).token_ids


# --- at random

VALUES = [
    "0",
    "1",
    "2",
    "1-3",
    "3-1",
    "0/2/4",
    "1-99999999999",
    "-1",
    "0.5",
    "0.25",
    "1",
    "nan",
    "1e9",
    "x",
    "",
    "2,layer=3",
]
KEYS = ["layer", "layers", "keep", "seed", "share", "quiet", "pivots", "raters", "merged", "side", ""]
USUAL = {
    "layer": ["0", "1", "2", "3"], "layers": ["1", "0/2", "1-2", "0-3"], "keep": ["0", "0.1", "0.5", "1"],
    "seed": ["0", "7"], "share": ["0", "0.4", "1"], "quiet": ["1", "2"], "pivots": ["1", "4", "99"],
    "raters": ["0", "1"], "merged": ["0", "0.5", "1"], "side": ["1", "3", "99"],
}  # fmt: skip
NEEDED = {"layer": 1, "layers": 1}  # these are nearly always there
OPTIONS = {
    name: [key for key in USUAL if key in make.__wrapped__.__code__.co_varnames] for name, make in METHODS.items()
}


@st.composite
def parts(draw):
    """One method: mostly one that is there, with options that it has and values that make sense."""
    name = draw(st.sampled_from([*METHODS, *METHODS, *METHODS, "nope", "nope.py", "no+pe.py:f", ""]))
    if draw(st.integers(0, 5)) == 0:
        options = [(key, draw(st.sampled_from(VALUES))) for key in draw(st.lists(st.sampled_from(KEYS), max_size=3))]
    else:
        keys = [key for key in OPTIONS.get(name, []) if key in NEEDED or draw(st.booleans())]
        options = [(key, draw(st.sampled_from(USUAL[key]))) for key in keys]
    written = ",".join(map("=".join, options))
    return f"{name}:{written}" if written else name


TEXTS = st.lists(parts(), min_size=1, max_size=3).map("+".join)
MODELS = (CLIP, SIGLIP, FIRST, LATER, TILES, FAMILIES / "idefics3-whole", "onevision")
TRIED = collections.Counter()  # outcome -> cases; a deep run prints it


@pytest.fixture(scope="module")
def models(onevision):
    yield [onevision if model == "onevision" else minivtw.load(model) for model in MODELS]
    print(*TRIED.items(), sep="\n")


@examples(quick=60, deep=5000)
def test_any_text_is_a_method_that_runs_or_one_line(models, examples):
    """In seven models, in chats of two turns; what is said of it stays the same, and nothing is warned of."""

    @settings(max_examples=examples, suppress_health_check=[HealthCheck.too_slow])
    @given(TEXTS, st.integers(0, len(MODELS) - 1), st.sampled_from([(0, 1), (0, None), (None, 1), (1, 0)]))
    def check(text, model, shown):
        outcome = "ran"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                chat = Chat(models[model], method=text)
                assert spec_of(method_of(spec_of(chat.method))) == spec_of(chat.method)
                for number in shown:
                    answer = chat.ask("Hm?", None if number is None else PICTURES[number], max_new_tokens=2)
                    assert len(answer.stats["prefill"]["entered"]) == models[model].config.layers
        except InputError as error:
            assert str(error) and len(str(error).splitlines()) == 1
            outcome = "one line"
        TRIED[outcome] += 1

    check()
