"""What a debugger, a notebook or a failing test shows of a thing: one line, with shapes and ranges instead of numbers."""

import base64
import pathlib
import re
import xml.etree.ElementTree as xml

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import minivtw
from minivtw.model.cache import KVCache
from minivtw.model.decoder import forward
from minivtw.model.tokens import arriving
from minivtw.page.printing import in_one_line, ranges

from .random_models import cases, prefill

SCENE, QUESTION = "docs/pictures/scene.png", "What color is the star?"


@pytest.fixture(scope="module")
def vlm():
    return minivtw.load()


def test_what_a_reader_meets_on_the_way_prints_as_one_line(vlm):
    prompt = vlm.prepare(SCENE, QUESTION)
    embedded, cache, method = vlm.embed(prompt), KVCache(vlm.config), vlm.method(withdraw=5)
    assert repr(cache) == "KVCache(12 layers: 12 x 0 tokens; 0 kB)"
    entering = arriving(embedded, cache)
    assert repr(entering).startswith("Tokens(77: 64 visual, 13 text; before layer 0; hidden (77, 128) ±")
    frozen = entering.freeze(entering.is_visual)
    assert repr(frozen).endswith("positions 0-76; the next layer works on 13)")
    ended = forward(vlm.decoder, entering, method)
    assert re.fullmatch(
        r"Tokens\(13: 0 visual, 13 text; before layer 12; hidden \(13, 128\) ±[\d.]+; positions 0-3 68-76\)",
        repr(ended),
    )
    assert repr(cache) == "KVCache(12 layers: 5 x 77, 7 x 13 tokens; 244 kB)"
    assert repr(cache[11]) == "LayerCache(13 tokens: positions 0-3 68-76; 7 kB)"
    assert repr(method) == "<method withdraw:layer=5>"
    encoder, layer = vlm.parts.vision.encoder, vlm.decoder.layers[0]
    assert repr(layer.qkv) == "Linear(128 -> 384)" and repr(encoder.layers[0].up) == "Linear(192 -> 576, bias)"
    things = [vlm, prompt, embedded, embedded.tower, ended.previous, ended.ran[0], vlm.parts, vlm.parts.vision, layer,
              vlm.decoder, encoder, encoder.layers[0], minivtw.Chat(vlm), vlm.answer(SCENE, QUESTION)]  # fmt: skip
    for thing in things:
        line = repr(thing)
        assert line.startswith(type(thing).__name__) and len(line) <= 300, line
        assert line.isprintable() and "array(" not in line and "object at 0x" not in line, line


@given(cases(), st.data())
def test_tokens_print_wherever_they_are(case, data):
    """Also where none are left, and for every method: what is shown is what is there."""
    decoder, prompt, layer = case
    seen = []

    def method(index, tokens):
        seen.append((index, len(tokens), repr(tokens)))
        return tokens[data.draw(st.integers(0, len(tokens) - 1)) :] if index == layer else tokens

    run = prefill(decoder, prompt, method)
    for index, count, line in seen:
        assert line.startswith(f"Tokens({count}: ") and f"before layer {index};" in line and len(line) <= 300
    assert f"{decoder.config.layers} layers: " in repr(run.cache)


@given(st.sets(st.integers(0, 200)))
def test_ranges_name_every_number_once(numbers):
    written = ranges(sorted(numbers))
    if "…" not in written:
        ends = [[int(end) for end in run.split("-")] for run in written.split()]
        assert {number for run in ends for number in range(run[0], run[-1] + 1)} == numbers


def test_the_plain_forms_of_containers_stay():
    """Only what holds arrays prints in its own way."""
    assert repr(minivtw.InputError("x")) == "InputError('x')"
    assert in_one_line(object()).startswith("<object object at")


@pytest.mark.parametrize("withdraw", ["auto", None, 3])
def test_a_notebook_shows_the_image_and_a_bar_per_layer(vlm, withdraw):
    answer = vlm.answer([SCENE], QUESTION, withdraw=withdraw)
    shown = answer._repr_html_()
    assert f"<b>{answer.text}</b>" in shown and "<script" not in shown
    drawings = re.findall(r'src="data:image/(.+?);base64,(.+?)"', shown)
    assert [kind for kind, _ in drawings] == ["png", "svg+xml"]
    chart = xml.fromstring(base64.b64decode(drawings[1][1]))
    heights = {
        kind: [float(bar.get("height")) for bar in chart.findall(".//{*}rect") if bar.get("class") == f"fill {kind}"]
        for kind in ("visual", "text")
    }
    assert [len(bars) for bars in heights.values()] == [12 + 1, 12 + 1]  # and the legend's
    k = answer.stats["withdraw_layer"]
    assert [height > 0 for height in heights["visual"][:12]] == [
        worked > 13 for worked in answer.stats["prefill"]["worked"]
    ]
    assert (f"K = {k}" in "".join(chart.itertext())) == (k is not None)


def test_an_answer_without_an_image_shows_too(vlm):
    assert "data:image/png" not in vlm.answer(None, "Hello")._repr_html_()


def test_an_image_whose_file_has_gone_is_left_out(vlm, tmp_path):
    image = tmp_path / "scene.png"
    image.write_bytes(pathlib.Path(SCENE).read_bytes())
    answer = vlm.answer(image, QUESTION, max_new_tokens=1)
    assert "data:image/png" in answer._repr_html_()
    image.unlink()
    shown = answer._repr_html_()
    assert "data:image/png" not in shown and "data:image/svg+xml" in shown


def test_an_answer_keeps_the_image_as_it_was_given(vlm):
    image = Image.fromarray(np.zeros((20, 30, 3), np.uint8))
    assert vlm.answer(image, QUESTION, max_new_tokens=1).images is image
