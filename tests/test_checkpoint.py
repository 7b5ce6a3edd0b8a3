"""Files to arrays: every tensor checked before anything is read, every problem named in one message."""

import copy
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

import minivtw
from minivtw import InputError
from minivtw.checkpoints.checkpoint import Checkpoint, widen_bfloat16
from tests.small_llava import CONFIG, random_tensors, write_folder


def test_every_missing_surplus_and_misshapen_tensor_is_named_in_one_message(tmp_path):
    tensors = random_tensors()
    missing = "language_model.model.layers.2.mlp.up_proj.weight"
    misshapen = "vision_tower.vision_model.encoder.layers.1.mlp.fc1.bias"
    wrong_dtype = "multi_modal_projector.linear_2.weight"
    del tensors[missing]
    tensors[misshapen] = np.zeros(5, np.float32)
    tensors[wrong_dtype] = tensors[wrong_dtype].astype(np.int32)
    tensors["language_model.model.layers.4.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)
    with pytest.raises(InputError) as caught:
        minivtw.load(write_folder(tmp_path, tensors))
    message = str(caught.value)
    assert f"missing {missing} (24, 16)" in message
    assert f"{misshapen} has shape (5,) where the config says (12,)" in message
    assert f"{wrong_dtype} is I32" in message
    assert "surplus language_model.model.layers.4.mlp.up_proj.weight" in message
    assert message.count(";") == 3  # and nothing else is blamed


@pytest.mark.parametrize("name", sorted(random_tensors()))
def test_no_tensor_can_be_missing_unnoticed(tmp_path, name):
    tensors = random_tensors()
    del tensors[name]
    with pytest.raises(InputError, match=f"missing {name}"):
        minivtw.load(write_folder(tmp_path, tensors))


def test_every_tensor_of_the_file_ends_in_the_model_exactly_once(tmp_path):
    """Tensor i holds i everywhere, so the model's numbers tell which tensors it took, and how often."""
    tensors = {name: np.full_like(tensor, index) for index, (name, tensor) in enumerate(random_tensors().items(), 1)}
    vlm = minivtw.load(write_folder(tmp_path, tensors))
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
    assert found[1:].tolist() == [tensor.size for tensor in tensors.values()]


def test_half_precision_widens_to_the_same_numbers(tmp_path):
    tensors = {name: tensor.astype(np.float16) for name, tensor in random_tensors().items()}
    halves = minivtw.load(write_folder(tmp_path / "halves", tensors))
    widened = minivtw.load(
        write_folder(tmp_path / "floats", {name: t.astype(np.float32) for name, t in tensors.items()})
    )
    for half, wide in zip(halves.decoder.layers, widened.decoder.layers):
        assert half.qkv.weight.dtype == half.down.dtype == np.float32
        assert np.array_equal(half.qkv.weight, wide.qkv.weight) and np.array_equal(half.down, wide.down)


def write_bfloat16(path, tensors):
    """A safetensors file by hand, from its published layout: header length, header, data. NumPy cannot write BF16."""
    header, data = {}, b""
    for name, tensor in tensors.items():
        upper = (tensor.view(np.uint32) >> 16).astype("<u2").tobytes()
        header[name] = {
            "dtype": "BF16",
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(upper)],
        }
        data += upper
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_bfloat16_is_read(tmp_path):
    tensors = random_tensors()
    folder = write_folder(tmp_path, tensors)
    write_bfloat16(folder / "model.safetensors", tensors)
    truncated = (tensors["language_model.model.norm.weight"].view(np.uint32) & 0xFFFF0000).view(np.float32)
    assert np.array_equal(minivtw.load(folder).decoder.norm, truncated)


def test_every_bfloat16_widens_to_the_number_it_stands_for():
    """Sign, exponent and fraction by IEEE 754, computed apart."""
    halves = np.arange(1 << 16, dtype=np.uint16)
    sign, exponent, fraction = halves >> 15, (halves >> 7 & 0xFF).astype(np.int32), (halves & 0x7F).astype(np.float64)
    normal = np.ldexp(1 + fraction / 128, exponent - 127)
    subnormal = np.ldexp(fraction / 128, -126)
    expected = np.where(exponent == 0, subnormal, normal) * np.where(sign, -1.0, 1.0)
    wide, finite = widen_bfloat16(halves), exponent < 255
    assert np.array_equal(wide[finite], expected[finite].astype(np.float32))
    assert np.array_equal(np.isinf(wide), ~finite & (fraction == 0)) and np.array_equal(
        np.isnan(wide), ~finite & (fraction > 0)
    )


def test_shards_are_one_model(tmp_path):
    tensors = random_tensors()
    whole, parts = write_folder(tmp_path / "whole", tensors), write_folder(tmp_path / "parts", tensors)
    (parts / "model.safetensors").unlink()
    names = {name: f"model-{index % 3 + 1:05}-of-00003.safetensors" for index, name in enumerate(tensors)}
    for shard in set(names.values()):
        save_file({name: tensors[name] for name in names if names[name] == shard}, parts / shard)
    (parts / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}), encoding="utf-8")
    one, three = minivtw.load(whole), minivtw.load(parts)
    for left, right in zip(one.decoder.layers, three.decoder.layers):
        assert np.array_equal(left.qkv.weight, right.qkv.weight) and np.array_equal(left.gate_up, right.gate_up)


def test_a_lost_shard_is_named(tmp_path):
    folder = write_folder(tmp_path)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}), encoding="utf-8")
    with pytest.raises(InputError, match="model-00002-of-00002"):
        Checkpoint(folder)


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", 7, None])
def test_an_index_cannot_point_outside_the_folder(tmp_path, name):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}), encoding="utf-8")
    with pytest.raises(InputError, match="files beside it|must be text|lacks a"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 8, 50, 1000, -1])
def test_a_truncated_file_is_not_a_model(tmp_path, keep):
    folder = write_folder(tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        minivtw.load(folder)


def test_position_buffers_of_older_files_are_not_surplus(tmp_path):
    buffers = {
        "vision_tower.vision_model.embeddings.position_ids": np.arange(10)[None],
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32),
    }
    minivtw.load(write_folder(tmp_path, random_tensors() | buffers))


@pytest.mark.parametrize(
    "part, key, value, words",
    [
        (None, "model_type", "blip", "must be one of"),
        (None, "text_config", 3, "must be an object"),
        (None, "text_config", None, "lacks text_config"),
        (None, "vision_feature_layer", -9, "no feature layer -9"),
        (None, "vision_feature_layer", [1, 2], "must be a whole number"),
        (None, "vision_feature_select_strategy", "cls", "must be one of"),
        (None, "image_token_index", 5, "disagree on the token of <image>"),
        ("text_config", "num_key_value_heads", 3, "cannot share evenly"),
        ("text_config", "hidden_size", "16", "must be a whole number"),
        ("text_config", "head_dim", 5, "even number"),
        ("text_config", "rope_scaling", {"rope_type": "llama3"}, "must be one of 'default'"),
        ("text_config", "hidden_act", "relu", "is 'relu', and only 'silu' is computed"),
        ("text_config", "num_hidden_layers", 5, "missing language_model.model.layers.4"),
        ("text_config", "tie_word_embeddings", False, "missing language_model.lm_head.weight"),
        ("vision_config", "image_size", 16, "pixels; the vision tower sees 16 x 16|position_embedding"),
        ("vision_config", "num_attention_heads", 3, "cannot share evenly"),
    ],
)
def test_configs_that_do_not_fit_are_named(tmp_path, part, key, value, words):
    config = copy.deepcopy(CONFIG)
    (config[part] if part else config)[key] = value
    with pytest.raises(InputError, match=words):
        minivtw.load(write_folder(tmp_path, config=config))
