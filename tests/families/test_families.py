"""Against recordings of transformers (SmolVLM) and PyTorch (nanoVLM): golden/families, made by families/record.py."""

import json
import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import minivtw
from minivtw.checkpoints.idefics3 import fractional_positions
from tests.parity import GREEDY_TOKENS, PIXEL_TOLERANCE, TOLERANCE, compare_layers, observe, relative_error

from .conversation import SIZES, picture

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "families"
FOLDERS = sorted(path.parent for path in GOLDEN.glob("*/meta.json"))
NAMES = [folder.name for folder in FOLDERS]
each_model = pytest.mark.parametrize("folder", FOLDERS, ids=NAMES)


def meta(folder):
    return json.loads((folder / "meta.json").read_text(encoding="utf-8"))


def test_every_family_and_layout_is_recorded():
    assert NAMES == [
        "idefics3-tiles",
        "idefics3-whole",
        "nanovlm-filled",
        "nanovlm-first",
        "nanovlm-later",
        "nanovlm-single",
        "smolvlm-tiles",
    ]


@each_model
def test_every_layer_the_logits_and_the_answer_are_those_of_the_reference(folder):
    vlm, expected = minivtw.load(folder), load_file(folder / "expected.safetensors")
    for case in meta(folder)["cases"]:
        images = [picture(*size) for size in case["sizes"]]
        assert vlm.prepare(images, case["question"]).token_ids.tolist() == case["token_ids"]
        own = {
            key.removeprefix(f"{case['name']}."): array
            for key, array in expected.items()
            if key.startswith(case["name"])
        }
        steps = {layer: own.pop(f"steps_{layer}") for layer in (None, 2)}
        for layer in (None, 2):
            result, ours, our_steps = observe(vlm, images, case["question"], withdraw=layer)
            assert result.token_ids == case[f"greedy_ids_{layer}"] and len(result.token_ids) == GREEDY_TOKENS
            assert relative_error(our_steps, steps[layer]) < TOLERANCE
            if layer is None and own:
                assert ours.keys() == own.keys()  # nothing that is observed went unrecorded
                for name, array in own.items():
                    if (
                        name.endswith("attention") and array.shape[-2] == 1
                    ):  # of long prompts, the last query was recorded
                        ours[name] = ours[name][..., -1:, :]
                compare_layers({name: ours[name] for name in own}, own)


@each_model
def test_pixels_and_prompts_of_any_size_are_those_of_the_processors(folder):
    vlm, recorded = minivtw.load(folder), np.load(folder / "pixels.npz")
    assert len(meta(folder)["prompts"]) == len(SIZES)
    for asked in meta(folder)["prompts"]:
        width, height = asked["size"]
        prompt = vlm.prepare(picture(width, height), "How many?")
        assert prompt.token_ids.tolist() == asked["token_ids"], (width, height)
        levels = recorded[f"{width}x{height}"].astype(np.float32)
        expected = levels / 65535 if folder.name.startswith("nanovlm") else (levels / 255 - 0.5) / 0.5
        assert prompt.tiles.shape == expected.shape and prompt.tiles.dtype == np.float32
        assert np.abs(prompt.tiles - expected).max() < PIXEL_TOLERANCE, (width, height)


@pytest.mark.parametrize("name", ["idefics3-tiles", "nanovlm-later"])
def test_most_tiles_bounds_what_an_image_costs(name):
    images = [picture(*size) for size in SIZES]
    free = minivtw.load(GOLDEN / name)
    all_unbounded = [free.prepare(image, "How many?").tiles for image in images]
    for most in (1, 2, 3, 5, 8, 17, 50):
        vlm = minivtw.load(GOLDEN / name, max_tiles=most)
        for image, unbounded in zip(images, all_unbounded, strict=True):
            tiles = vlm.prepare(image, "How many?").tiles
            assert 1 <= len(tiles) <= most
            if len(unbounded) <= most:
                assert np.array_equal(tiles, unbounded)


def test_a_bounded_picture_is_the_one_of_a_shorter_longest_edge():
    """What the processors make of `size: {"longest_edge": 64}`, two tiles of 32 a side at most."""
    vlm = minivtw.load(GOLDEN / "idefics3-tiles", max_tiles=5)
    image = picture(640, 480)
    tiles = vlm.prepare(image, "How many?").tiles
    shorter = image.resize((64, 48), 1).resize((64, 64), 1)
    assert len(tiles) == 5
    assert np.abs(tiles[3] - (np.asarray(shorter.crop((32, 32, 64, 64))).transpose(2, 0, 1) / 127.5 - 1)).max() < 1e-6


def test_positions_are_looked_up_as_transformers_does():
    for case in json.loads((GOLDEN / "positions.json").read_text(encoding="utf-8")):
        assert fractional_positions(case["patches"], case["places"]).tolist() == case["rows"], case["patches"]


EXACT = [folder for folder in FOLDERS if folder.name != "smolvlm-tiles"]  # stored as bfloat16, which NumPy cannot write


def rewritten(folder, tmp_path, change):
    """A copy of a model folder whose tensors went through `change(name, index, tensor)`; None leaves one out."""
    for path in folder.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    changed = {name: change(name, index, tensor) for index, (name, tensor) in enumerate(sorted(tensors.items()), 1)}
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, tmp_path / "model.safetensors")
    return tensors


@pytest.mark.parametrize("folder", EXACT, ids=[folder.name for folder in EXACT])
def test_every_tensor_of_the_file_ends_in_the_model_exactly_once(folder, tmp_path):
    """Tensor i holds i everywhere, so the model's numbers tell which tensors it took, and how often."""
    tensors = rewritten(folder, tmp_path, lambda name, index, tensor: np.full_like(tensor, index))
    vlm = minivtw.load(tmp_path)
    found = np.zeros(len(tensors) + 1, int)

    def count(part):
        if isinstance(part, np.ndarray):
            values, counts = np.unique(part, return_counts=True)
            found[values.astype(int)] += counts
        elif isinstance(part, (list, tuple)):
            for inner in part:
                count(inner)
        elif hasattr(part, "__dataclass_fields__"):
            for field in part.__dataclass_fields__:
                count(getattr(part, field))

    count([vlm.decoder, vlm.parts.vision.encoder, vlm.parts.vision.connect])
    buffers = [name for name in tensors if name.endswith("inv_freq")]
    assert [size for name, size in zip(sorted(tensors), found[1:]) if name not in buffers] == [
        tensors[name].size for name in sorted(tensors) if name not in buffers
    ]


@pytest.mark.parametrize("folder", EXACT, ids=[folder.name for folder in EXACT])
def test_a_missing_and_a_misshapen_tensor_are_named(folder, tmp_path):
    def damage(name, index, tensor):
        if "layers.1" in name or "blocks.1" in name:
            return None if "up_proj" in name else tensor
        return tensor[:-1] if name.endswith("post_layernorm.bias") or name.endswith("layer_norm.bias") else tensor

    rewritten(folder, tmp_path, damage)
    with pytest.raises(minivtw.InputError) as caught:
        minivtw.load(tmp_path)
    message = str(caught.value)
    assert "missing " in message and "up_proj.weight (48, 32)" in message
    assert "norm.bias has shape (23,) where the config says (24,)" in message
    assert message.count(";") == 1  # and nothing else is blamed


@pytest.mark.parametrize(
    "name, file, part, key, value, words",
    [
        ("idefics3-tiles", "config.json", None, "scale_factor", 3, "joins 3 x 3 patches"),
        ("idefics3-tiles", "config.json", None, "image_token_id", 7, "disagree on the token of <image>"),
        (
            "idefics3-tiles",
            "preprocessor_config.json",
            "size",
            "longest_edge",
            5000,
            "must be a whole number from 1 to 4,096, not 5000",
        ),
        (
            "idefics3-tiles",
            "preprocessor_config.json",
            "max_image_size",
            "longest_edge",
            4,
            "a tile of 0 x 0 cannot be cut",
        ),
        ("nanovlm-later", "config.json", None, "max_img_size", 100, "cannot name every tile of 32 pixels"),
        ("nanovlm-later", "config.json", None, "max_img_size", 32 * 9, "cannot name every tile of 32 pixels"),
        ("nanovlm-later", "config.json", "vlm_extra_tokens", "image_token", 5, "must be text, not 5"),
        ("nanovlm-first", "config.json", None, "vit_cls_flag", True, "vit_cls_flag"),
        ("nanovlm-first", "config.json", None, "lm_re_base", None, "lacks lm_re_base"),
    ],
)
def test_settings_that_cannot_be_met_are_one_clear_error(tmp_path, name, file, part, key, value, words):
    rewritten(GOLDEN / name, tmp_path, lambda name, index, tensor: tensor)
    content = json.loads((tmp_path / file).read_text(encoding="utf-8"))
    (content[part] if part else content)[key] = value
    (tmp_path / file).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(minivtw.InputError, match=words):
        minivtw.load(tmp_path)


def test_what_published_configs_say_besides_is_passed_over(tmp_path):
    """Keys of SmolVLM-256M's own config that describe its training, and the model_type its vision config carries."""
    rewritten(GOLDEN / "idefics3-tiles", tmp_path, lambda name, index, tensor: tensor)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    config["text_config"] |= {"is_llama_config": True, "rope_scaling": None, "rope_interleaved": False}
    config["text_config"] |= {
        "qk_layer_norms": False,
        "use_resampler": False,
        "perceiver_config": {"resampler_depth": 6},
    }
    config["vision_config"] |= {"model_type": "idefics3", "use_base_siglip": False, "size": {"longest_edge": 128}}
    config |= {"use_reentrant_checkpointing": False, "torch_dtype": "bfloat16", "vocab_size": 340}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    ask = lambda folder: minivtw.load(folder).answer(picture(9, 9), "How many?", max_new_tokens=4).token_ids
    assert ask(tmp_path) == ask(GOLDEN / "idefics3-tiles")
