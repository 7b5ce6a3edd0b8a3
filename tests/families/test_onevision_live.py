"""LLaVA-OneVision against transformers as it runs: any resolution, from the pixels to the answer."""

import json

import numpy as np
import pytest

import minivtw
from minivtw.checkpoints import family
from minivtw.checkpoints.fields import Fields
from tests.parity import TOLERANCE, relative_error

from . import sizes
from .conversation import SIZES, picture
from .published import BlankCheckpoint
from .test_families_live import names_and_shapes

TOWER = sizes.vit(24, 8, 24, 40, 3, 3, model_type="siglip_vision_model", vision_use_head=False)
TEXT = {**sizes.llama(32, 48, 4, 4, 2, 300, rope_theta=1e6, max_position_embeddings=2048), "model_type": "qwen2"}
QUESTION = "How many?"


@pytest.fixture(scope="module")
def onevision():
    from . import onevision

    return onevision


def check(model, vlm, images, tokens):
    """Prompt, pixels, logits of greedy tokens."""
    inputs = model.inputs(images, QUESTION)
    prompt = vlm.prepare(images, QUESTION)
    assert prompt.token_ids.tolist() == inputs["input_ids"][0].tolist()
    expected = model.tiles(inputs)
    assert prompt.tiles.shape == expected.shape and np.abs(prompt.tiles - expected).max() < 1e-6
    steps, said = [], vlm.stop_ids
    vlm.stop_ids = frozenset()
    keep = lambda name, array: steps.append(array) if name == "decoder.logits" else None
    result = vlm.answer(images, QUESTION, withdraw="off", max_new_tokens=tokens, observe=keep)
    vlm.stop_ids = said
    token_ids, logits = model.greedy(inputs, tokens)
    assert result.token_ids == token_ids
    assert relative_error(np.stack(steps), logits) < TOLERANCE


@pytest.mark.live
@pytest.mark.parametrize("ratio", [2, 9])
def test_pictures_of_any_shape(onevision, tmp_path, ratio):
    onevision.build(tmp_path, TOWER, TEXT, 4, ratio, seed=ratio)
    model, vlm = onevision.Reference(tmp_path), minivtw.load(tmp_path)
    for size in [(1, 1), (2, 3), (24, 24), (67, 40), (97, 96), (300, 20), (1, 500), (640, 480)]:
        check(model, vlm, [picture(*size)], 1)
    check(model, vlm, [picture(300, 20), picture(50, 90)], 5)


@pytest.mark.live
def test_the_published_grid(onevision, tmp_path):
    """384 px tiles, up to 6 x 6 of them, at most 9 tiles' worth of tokens: how pictures are cut, and tokens counted."""
    from minivtw.checkpoints.onevision import pixel_settings

    onevision.build(tmp_path, {**TOWER, "image_size": 384, "patch_size": 14}, TEXT, 6)
    model, vlm = onevision.Reference(tmp_path), minivtw.load(tmp_path)
    settings = pixel_settings(Fields({}, ""), tmp_path, vlm.parts.vision.encoder.config)
    for width, height in [*SIZES, (384, 384), (385, 384), (1000, 1000), (2304, 2304), (4000, 3000), (999, 1001)]:
        counted = model.counts._get_number_of_features(height, width, 384, 384)
        assert settings.plan(height, width).tokens == counted, (width, height)


@pytest.mark.live
def test_most_tiles_bounds_what_a_picture_costs(onevision, tmp_path):
    onevision.build(tmp_path, TOWER, TEXT, 4)
    for most in (1, 2, 5):
        vlm = minivtw.load(tmp_path, max_tiles=most)
        for size in SIZES[:10]:
            assert len(vlm.prepare(picture(*size), QUESTION).tiles) <= most
        answer = vlm.answer([picture(90, 61), picture(9, 9)], QUESTION, withdraw=2, max_new_tokens=3)
        assert len(answer.token_ids) == 3


ONEVISION = (
    sizes.vit(
        384,
        14,
        1152,
        4304,
        26,
        16,
        model_type="siglip_vision_model",
        hidden_act="gelu_pytorch_tanh",
        vision_use_head=False,
    ),
    {**sizes.llama(896, 4864, 24, 14, 2, 152000, rope_theta=1e6, max_position_embeddings=32768), "model_type": "qwen2"},
)


@pytest.mark.live
def test_every_tensor_of_onevision_is_known(onevision, tmp_path):
    vision, text = ONEVISION
    onevision.build(tmp_path, TOWER, TEXT, 2)
    pinpoints = [[384, 384], [384, 768]]
    config = onevision.LlavaOnevisionConfig(
        vision_config=vision, text_config=text, tie_word_embeddings=True, image_grid_pinpoints=pinpoints
    )
    expected = names_and_shapes(config, onevision.LlavaOnevisionForConditionalGeneration)
    expected.pop("lm_head.weight")
    pixels = json.loads((tmp_path / "preprocessor_config.json").read_text(encoding="utf-8"))
    pixels |= {"size": {"height": 384, "width": 384}, "image_grid_pinpoints": pinpoints}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(pixels), encoding="utf-8")
    fields, checkpoint = (
        Fields(json.loads(config.to_json_string(use_diff=False)), "config.json"),
        BlankCheckpoint(expected),
    )
    family(fields).load(fields, tmp_path, checkpoint)
    assert checkpoint.asked == expected


@pytest.mark.slow
def test_full_width_onevision(onevision, tmp_path):
    """The published widths and tiles, with two layers of the tower and of the decoder."""
    vision, text = ({**config, "num_hidden_layers": 2} for config in ONEVISION)
    onevision.build(tmp_path, vision, text, 2, dtype="bfloat16")
    check(onevision.Reference(tmp_path), minivtw.load(tmp_path), [picture(500, 300)], 5)
