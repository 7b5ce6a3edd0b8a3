"""Weights on disk: the same answers, in a bounded part of memory; and the refusal of what would not fit."""

import json
import os
import pathlib
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

import minivtw
from minivtw import chat, generate
from minivtw.checkpoints import checkpoint
from tests.doors import assert_one_line_error, run
from tests.small_llava import byte_tokenizer, save_tokenizer, write_folder

GOLDEN = pathlib.Path(__file__).parent / "golden"
FOLDERS = sorted(path.parent for path in GOLDEN.glob("*/*/config.json"))
WIDTH, INNER, LAYERS, VOCABULARY = 512, 2048, 20, 300
LAYER_BYTES = 4 * (4 * WIDTH**2 + 3 * WIDTH * INNER)  # in float32


@pytest.mark.parametrize("folder", FOLDERS, ids=[folder.name for folder in FOLDERS])
def test_low_memory_changes_no_bit(folder):
    """Every family, every stored precision: the layers read at every use are the layers held."""
    usual, low = minivtw.load(folder), minivtw.load(folder, low_memory=True)
    towers = [usual.parts.vision.encoder.layers], [low.parts.vision.encoder.layers]
    for held, read in zip([*towers[0], usual.decoder.layers], [*towers[1], low.decoder.layers]):
        assert not isinstance(read, list) and len(read) == len(held)
        for left, right in zip(held, read, strict=True):
            assert all(same(*pair) for pair in zip(left, right, strict=True))
    assert same(usual.decoder.embedding, low.decoder.embedding)


def same(left, right):
    """Equal in every bit; norms and linear maps are tuples of arrays, and a bias may be None."""
    if isinstance(left, tuple):
        return all(map(same, left, right))
    return left is right is None or (left.dtype == right.dtype == np.float32 and np.array_equal(left, right))


@given(st.integers(1, 5), st.data())
def test_layers_come_right_in_any_order_and_one_is_read_ahead(count, data):
    """A method that looks back asks for a layer twice; a tower may stop before its last layer."""
    order, held = data.draw(st.lists(st.integers(0, count - 1), max_size=12)), []
    layers = checkpoint.LayersOnDisk(count, lambda index: held.append(index) or [index])
    assert [layers[index] for index in order] == [[index] for index in order]
    if order:
        assert layers._ahead[0] == (order[-1] + 1) % count and layers._ahead[1].result() == [layers._ahead[0]]
    assert len(held) <= 2 * len(order)
    with pytest.raises(IndexError):
        layers[count]


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """A language model of 200 MB in float16, 400 MB in float32."""
    folder, random = tmp_path_factory.mktemp("language"), np.random.default_rng(0)

    def matrix(rows, columns):
        return (random.standard_normal((rows, columns), np.float32) / np.sqrt(columns)).astype(np.float16)

    tensors = {"model.embed_tokens.weight": matrix(VOCABULARY, WIDTH), "model.norm.weight": np.ones(WIDTH, np.float16)}
    shared = {
        **{f"self_attn.{name}_proj": matrix(WIDTH, WIDTH) for name in "qkvo"},
        "mlp.down_proj": matrix(WIDTH, INNER),
    }
    shared |= {"mlp.gate_proj": matrix(INNER, WIDTH), "mlp.up_proj": matrix(INNER, WIDTH)}
    for layer in range(LAYERS):
        tensors |= {f"model.layers.{layer}.{name}.weight": np.roll(weight, layer) for name, weight in shared.items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        tensors |= {f"model.layers.{layer}.{name}.weight": np.ones(WIDTH, np.float16) for name in norms}
    save_file(tensors, folder / "model.safetensors")
    config = dict(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        vocab_size=VOCABULARY,
    )
    config |= dict(model_type="llama", tie_word_embeddings=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_tokenizer(byte_tokenizer(), folder)
    return folder


MEASURE = """
import sys, minivtw
def peak():
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
answer = minivtw.load(sys.argv[1], low_memory=sys.argv[2] == "low").answer(None, "How many?", max_new_tokens=3)
print(answer.token_ids, peak() - before)
"""


def measured(folder, mode):
    """(token ids, bytes by which the resident memory of a process grew at most) of one answer."""
    root = pathlib.Path(__file__).parents[1]
    ran = subprocess.run(
        [sys.executable, "-c", MEASURE, folder, mode], capture_output=True, encoding="utf-8", cwd=root, check=True
    )
    said, grown = ran.stdout.rsplit(" ", 1)
    return said, int(grown)


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="measured with Linux's /proc")
def test_low_memory_holds_one_layer_and_no_page_of_the_file(language_model):
    usual, low = measured(language_model, "usual"), measured(language_model, "low")
    assert usual[0] == low[0]
    assert usual[1] > LAYERS * LAYER_BYTES
    assert low[1] < 4 * LAYER_BYTES  # the layer and the next, the largest tensor mapped, the embedding, some room


@pytest.mark.parametrize("damage", ["shorter", "gone"])
def test_weights_that_change_while_they_are_used_are_one_line(tmp_path, damage):
    """What is read again at every use may have been cut off or taken away meanwhile; a chat says so and goes on."""
    path = write_folder(tmp_path) / "model.safetensors"

    def lines():
        yield "How many?"
        if damage == "shorter":
            os.truncate(path, path.stat().st_size // 9)
        else:
            path.unlink()
        yield from ("Which?", "Who?")

    with mock.patch.object(chat, "lines", lines):
        ran = run(chat.main, "--model", tmp_path, "--low-memory", "--max-new-tokens", 1)
    words = "has become shorter since it was opened" if damage == "shorter" else "No such file"
    assert ran.code == 0 and ran.out.count("\n") == 1 and ran.err.count("\n") == ran.err.count(words) == 2


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_tensor_that_is_read_in_pieces_is_the_tensor(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(checkpoint, "PIECE", 7)
    tensor = np.random.default_rng(0).standard_normal((9, 4)).astype(dtype)
    save_file({"none": np.zeros((0, 3), dtype), "some": tensor}, tmp_path / "file")
    shard, out = checkpoint.Shard(tmp_path / "file"), np.empty((9, 4), np.float32)
    shard.read_into("some", out)
    assert np.array_equal(out, tensor.astype(np.float32)) and list(shard.pieces("none")) == []


def test_what_would_not_fit_is_refused_before_it_is_read(tmp_path):
    folder = write_folder(tmp_path)
    needed = sum(4 * np.prod(shape) for shape in checkpoint.Shard(folder / "model.safetensors").shapes.values())
    with mock.patch.object(checkpoint, "available_memory", return_value=int(needed) - 1):
        with mock.patch.object(checkpoint.Shard, "read_into", side_effect=AssertionError("read")):
            ran = run(generate.main, "Hi?", "--model", folder)
        assert_one_line_error(ran, "are free; --low-memory widens one layer at a time instead")
        assert run(generate.main, "Hi?", "--model", folder, "--low-memory", "--max-new-tokens", 2).code == 0
    for enough in (int(needed), None):  # None: the system does not tell
        with mock.patch.object(checkpoint, "available_memory", return_value=enough):
            minivtw.load(folder)


def test_free_memory_is_told_in_bytes():
    available = checkpoint.available_memory()
    assert available is None or 10**7 < available < 10**14
