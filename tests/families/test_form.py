"""The family that docs/12 fills in, run as it stands there."""

import json
import pathlib
import re

import numpy as np
import pytest
from safetensors.numpy import save_file

import minivtw
from minivtw.checkpoints import FAMILIES
from tests.small_llava import byte_tokenizer, save_tokenizer

from .conversation import picture

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "12-a-family-is-a-form.md"
TEXT = dict(
    model_type="llama", vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=4
)
TOWER = dict(
    model_type="siglip_vision_model", image_size=12, patch_size=4, hidden_size=8, intermediate_size=12,
    num_hidden_layers=2, num_attention_heads=2,
)  # fmt: skip


@pytest.fixture
def monocle(monkeypatch):
    """The page's program; what it adds to the families is taken away again."""
    monkeypatch.setitem(FAMILIES, "monocle", None)
    program = "\n".join(re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S))
    exec(compile(program, PAGE.name, "exec"), {"__name__": "monocle"})


def test_the_family_of_the_page_answers(monocle, tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "monocle", "text": TEXT, "tower": TOWER}), encoding="utf-8"
    )
    pixels = {"size": {"height": 12, "width": 12}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(pixels), encoding="utf-8")
    save_tokenizer(byte_tokenizer(), tmp_path)
    save_file({"stray": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(minivtw.InputError, match="surplus stray") as caught:
        minivtw.load(tmp_path)

    random, tensors = np.random.default_rng(0), {}
    for name, shape in re.findall(r"missing (\S+) \(([^)]*)\)", str(caught.value)):
        shape = tuple(int(size) for size in shape.split(",") if size.strip())
        tensors[name] = random.standard_normal(shape).astype(np.float32) * 0.4
    assert {"bridge.weight", "bridge.bias", "text.head.weight", "eye.post_layernorm.bias"} <= tensors.keys()
    save_file(tensors, tmp_path / "model.safetensors")

    vlm = minivtw.load(tmp_path)
    answers = [vlm.answer(picture(20, 10), "What?", withdraw=layer, max_new_tokens=5) for layer in (None, 2)]
    assert [answer.stats["tokens"]["visual"] for answer in answers] == [9, 9]
    assert answers[1].stats["cache"]["tokens_per_layer"][3] == answers[0].stats["cache"]["tokens_per_layer"][3] - 9
