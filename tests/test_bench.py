"""The door `python -m minivtw.bench`. What it measures is not tested: time is not a property of the code."""

import json
from inspect import signature
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from minivtw.bench import main, read, see
from minivtw.counting import vision_flops
from minivtw.methods.shelf import METHODS
from minivtw.methods.text import Layer, Layers, Until
from minivtw.methods.withdrawal import withdraw
from minivtw.timing import rounds as timing
from minivtw.timing import shapes
from tests.doors import assert_one_line_error, run
from tests.small_llava import write_folder

SMALL = (
    shapes.VisionConfig(16, 4, 8, 2, 2, 12, post_norm=True, feature_layer=-1, **shapes.SIGLIP), 2,
    shapes.DecoderConfig(50, 16, 4, 4, 2, 4, 24, 1e-5, 1e4, 64),
)  # fmt: skip
SMALL_CLIP = (
    shapes.VisionConfig(16, 4, 8, 2, 2, 12, post_norm=False, feature_layer=-1, **shapes.CLIP), 1,
    shapes.DecoderConfig(50, 16, 4, 4, 4, 4, 24, 1e-6, 1e6, 64, qkv_bias=True, tied_head=True),
)  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    """Two small shapes, and ceilings of a moment."""
    monkeypatch.setattr(shapes, "SHAPES", {"small": SMALL, "small-clip": SMALL_CLIP})
    monkeypatch.setattr("minivtw.bench.SHAPES", shapes.SHAPES)
    monkeypatch.setattr(timing, "Ceilings", lambda: lambda: {"sgemm": 1e9, "stream": 1e9})


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """The arguments that every run shares: a picture, a question, a small model."""
    folder = tmp_path_factory.mktemp("bench")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (12, 12, 3), np.uint8)).save(folder / "noise.png")
    return folder / "noise.png", "Hm?", "--model", write_folder(folder / "model")


def test_every_work_is_timed_under_every_method(small, asked):
    ran = run(main, *asked, "--withdraw", "off,auto,0", "--repeats", "2", "--new-tokens", "1", "--alone", "--json")
    assert ran.code == 0 and ran.err == ""
    result = json.loads(ran.out)
    assert [(row["work"], row["method"]) for row in result["rows"]] == [
        ("vision", "off"),
        *((work, name) for work in ("prefill", "decode", "question", "second question") for name in ("off", "auto", "0")),
    ]  # fmt: skip
    for row in result["rows"]:
        low, high = row["quartiles"]
        assert 0 < low <= row["seconds"] <= high and row["of_ceiling"] > 0 and "times_transformers" not in row
    saved = {row["method"]: row["flops_saved"] for row in result["rows"] if "flops_saved" in row}
    assert 0 < saved["auto"] < saved["0"] < 1
    again = [row for row in result["rows"] if row["work"] == "second question"]
    whole = {row["method"]: row["flops"] for row in result["rows"] if row["work"] == "prefill"}
    assert all(0 < row["flops"] < whole[row["method"]] for row in again if row["method"] != "0")
    assert all(row["times_whole"] > 0 for row in again)


def test_a_second_question_is_not_timed_where_the_method_looks_at_it(small, asked):
    ran = run(main, *asked, "--method", "fastv:layer=1", "--repeats", "1", "--new-tokens", "1", "--alone")
    assert "second question, auto" in ran.out and "second question, fastv" not in ran.out
    assert "x as fast as vision and prefill" in ran.out


@pytest.mark.parametrize("name", METHODS)
def test_every_method_of_the_shelf_can_be_timed(small, asked, name):
    layers = {Layer: "layer=1", Until: "layer=1", Layers: "layers=1"}
    needed = [
        layers[one.annotation] for one in signature(METHODS[name]).parameters.values() if one.default is one.empty
    ]
    text = ":".join([name, *needed])
    ran = run(main, *asked, "--method", text, "--repeats", "1", "--new-tokens", "1", "--alone", "--json")
    assert ran.code == 0 and ran.err == ""
    assert {row["method"] for row in json.loads(ran.out)["rows"]} == {"off", "auto", text}


def test_a_shape_has_the_sizes_that_are_asked_for(small):
    ran = run(
        main,
        "--shape",
        "small",
        "--tiles",
        "3",
        "--tokens",
        "20",
        "--repeats",
        "1",
        "--new-tokens",
        "1",
        "--alone",
        "--json",
    )
    result = json.loads(ran.out)
    assert (result["tiles"], result["tokens"], result["visual"], result["model"]) == (3, 20, 12, "small")
    assert "small: 3 tiles, 20 tokens, 12 of them visual" in run(
        main, "--shape", "small", "--tiles", "3", "--tokens", "20", "--repeats", "1", "--new-tokens", "1", "--alone"
    ).out  # fmt: skip


def test_a_ceiling_is_the_fastest_of_several_ways(monkeypatch):
    """On whatever machine: BLAS's threads or ours, a product or a maximum. A clock that the ways move tells which."""
    now, ceilings = [0.0], timing.Ceilings(4, 2)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def lasting(seconds):
        return lambda: now.__setitem__(0, now[0] + seconds)

    ceilings.products, ceilings.reads = [lasting(2), lasting(0.5), lasting(1)], [lasting(0.25), lasting(4)]
    assert ceilings() == {"sgemm": 2 * 4**3 / 0.5, "stream": 2 * 2048 * 4 / 0.25}
    assert now == [7.75]


def test_every_way_to_a_ceiling_does_all_of_the_work(monkeypatch):
    """Each core's part together: else a ceiling would be too high."""
    parts = []
    monkeypatch.setattr(timing, "side_by_side", lambda work, blocks: parts.append([work(block) for block in blocks]))
    monkeypatch.setattr("minivtw.threads.THREADS", 2)
    ceilings = timing.Ceilings(96, 2048)
    for way in [*ceilings.products, *ceilings.reads]:
        parts.append([way()])
    made = [part for part in parts if part[0] is not None]
    assert [sum(map(np.size, part)) for part in made] == [96 * 96, 96 * 96, 2048, 2048, 2048, 2]
    assert all(np.all(one == size) for part, size in zip(made, (96, 96, 2048, 2048, 2048, 1)) for one in part)
    assert [len(part) for part in made] == [1, 2, 1, 2, 2, 2]


def test_busy_moments_hit_all_alike():
    """Everything once a round, in turns; the first round only warms up."""
    calls = []
    measures = [lambda: calls.append("a") or {"a": len(calls)}, lambda: calls.append("b") or {"b": len(calls)}]
    assert timing.rounds(measures, 2) == {"a": [3, 5], "b": [4, 6]} and calls == list("ababab")
    assert timing.quartiles([5.0, 1, 2, 3, 4]) == (2, 3, 4) and timing.quartiles([7.0]) == (7, 7, 7)


def test_vision_flops_by_hand():
    """16 patches of 4 x 4 pixels, width 8, two layers with 12 mlp channels."""
    layer = (
        16 * 8 * 24 + 16 * 16 * 8 + 16 * 16 * 8 + 16 * 8 * 8 + 2 * 16 * 8 * 12
    )  # qkv scores context output up and down
    assert vision_flops(SMALL[0]) == 2 * (16 * 48 * 8 + 2 * layer)


@pytest.mark.live
@pytest.mark.parametrize("shape", ["small", "small-clip"])
def test_transformers_computes_the_same_beside_it(small, shape):
    """Else the two would be timed at different work."""
    from minivtw.bench import random_prompt
    from minivtw.timing.torch_twin import Twin

    vlm = shapes.random_model(shape)
    pixels, prompt = random_prompt(vlm, shape, 2, 40)
    twin = Twin(vlm, 1)
    features, theirs = see(vlm, pixels)[1], twin.see(pixels)[1]
    if vlm.parts.vision.encoder.config.post_norm:
        assert np.abs(features - theirs).max() < 2e-5 * np.abs(theirs).max()
    _, _, logits, tokens, _ = read(vlm, prompt, None, 2)
    expected = twin.read(prompt.hidden, 2)[2]
    assert np.abs(logits - expected).max() < 2e-5 * np.abs(expected).max() and len(tokens) == 40
    with mock.patch("minivtw.bench.THREADS", 1):
        ran = run(main, "--shape", shape, "--repeats", "2", "--new-tokens", "1", "--tokens", "40", "--json")
    ratios = [row["times_transformers"] for row in json.loads(ran.out)["rows"] if row["work"] != "second question"]
    assert len(ratios) == 7 and min(ratios) > 0


def test_a_method_is_timed_on_fewer_tokens(small):
    from minivtw.bench import random_prompt

    vlm = shapes.random_model("small")
    prompt = random_prompt(vlm, "small", 2, 20)[1]
    assert [ran.entered for ran in read(vlm, prompt, withdraw(2), 1)[3].ran] == [20, 20, 12, 12]


@pytest.mark.parametrize(
    "options, words",
    [
        (("--withdraw", "5"), "from 0 to 4"),
        (("--method", "adaptive:loud=1"), "takes share, quiet"),
        (("--repeats", "0"), "1 or more"),
        (("--new-tokens", "0"), "1 or more"),
        (("--tiles", "2"), "sizes of a --shape"),
        (("--shape", "smolvlm-256m"), "takes no image"),
    ],
)
def test_options_that_make_no_sense(asked, options, words):
    assert_one_line_error(run(main, *asked, *options), words)


def test_a_shape_needs_room_for_its_visual_tokens(small):
    assert_one_line_error(run(main, "--shape", "small", "--tiles", "3", "--tokens", "13"), "3 tiles make 12 of them")
    assert_one_line_error(run(main), "an image and a question, or a --shape")
