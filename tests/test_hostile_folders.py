"""Model folders that would hurt: each is one line that says what is wrong, before it takes time or memory."""

import json
import os
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import minivtw
from minivtw import InputError, generate
from minivtw.checkpoints import hub, tokenizer
from minivtw.checkpoints.tokenizer import load_tokenizer
from minivtw.inputs import files
from minivtw.inputs.prompts import encode
from tests.doors import assert_one_line_error, bounded_memory, copied, run
from tests.families.test_families import GOLDEN as FAMILIES
from tests.small_llava import random_tensors, write_folder

LLAVA = FAMILIES.parent / "llava"
NOT_PART = shutil.ignore_patterns("expected.safetensors", "meta.json", "pixels.npz")


@pytest.fixture
def changed(tmp_path):
    """A function: a copy of a recorded model with some values of a JSON file replaced, by their dotted keys."""

    def copy(base, name="config.json", tensors=None, **values):
        folder = copied(base, tmp_path / "model", NOT_PART)
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        for dotted, value in values.items():
            *parts, key = dotted.split("__")
            part = content
            for inner in parts:
                part = part[inner]
            part[key] = value
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
        if tensors:
            save_file(tensors(load_file(folder / "model.safetensors")), folder / "model.safetensors")
        return folder

    return copy


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (70, 40), "red").save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def ask(folder, picture):
    with bounded_memory():
        return run(generate.main, picture, "What?", "--model", folder, "--max-new-tokens", 2)


FIRST, LATER, TILES = (FAMILIES / name for name in ("nanovlm-first", "nanovlm-later", "idefics3-tiles"))
CLIP, SHARDS, SIGLIP = (LLAVA / name for name in ("clip-plain", "clip-qwen2", "siglip-qwen2"))
PIXELS = "preprocessor_config.json"
CASES = [
    (CLIP, "config.json", dict(text_config__num_hidden_layers=10**9), "from 1 to 1,000"),
    (FIRST, "config.json", dict(vit_n_blocks=10**6), "from 1 to 1,000"),
    (CLIP, "config.json", dict(text_config__num_hidden_layers=900), "more"),
    (LATER, "config.json", dict(max_img_size=10**9), "max_img_size"),
    (LATER, "config.json", dict(max_img_size=8192), "max_img_size"),
    (FIRST, "config.json", dict(vit_n_heads=5), "cannot share evenly"),
    (FIRST, "config.json", dict(lm_n_heads=32, lm_n_kv_heads=16), "heads of width"),
    (FIRST, "config.json", dict(lm_n_kv_heads=3), "cannot share evenly"),
    (CLIP, "config.json", dict(text_config__num_attention_heads=10**4, text_config__head_dim=None), "width 0"),
    (CLIP, PIXELS, dict(size=[224, 224]), "size in"),
    (CLIP, PIXELS, dict(crop_size="224"), "must be an object, not '224'"),
    (CLIP, PIXELS, dict(resample=3.0), "resample"),
    (SIGLIP, PIXELS, dict(image_std=[0, 1, 1]), "image_std"),
    (SIGLIP, PIXELS, dict(image_mean=[float("nan")] * 3), "image_mean"),
    (SIGLIP, PIXELS, dict(rescale_factor=1e308), "rescale_factor"),
    (TILES, PIXELS, dict(max_image_size={"longest_edge": 4096}), "a tile of 512 x 512 cannot be cut"),
    (CLIP, "config.json", dict(vision_config__image_size=4096, vision_config__patch_size=1), "into patches of 1"),
    (FIRST, "config.json", dict(vit_img_size=4096, vit_patch_size=1), "into patches of 1"),
    (CLIP, "config.json", dict(text_config__rms_norm_eps=10**400), "rms_norm_eps"),
    (CLIP, "config.json", dict(vision_config__image_size=10**4200), "image_size"),
    (CLIP, PIXELS, dict(size={"shortest_edge": 10**400}), "shortest_edge"),
    (
        TILES,
        PIXELS,
        dict(max_image_size={"longest_edge": 1}, size={"longest_edge": 4096}),
        "a tile of 0 x 0 cannot be cut",
    ),
    (LATER, "config.json", dict(vlm_extra_tokens__r1c1="\ud800"), "is not a tokenizer"),
    (CLIP, "generation_config.json", dict(eos_token_id=[10**400]), "a token id or a list"),
    (CLIP, "generation_config.json", dict(eos_token_id={"a": 1}), "a token id or a list"),
    (SHARDS, "model.safetensors.index.json", dict(weight_map={"a": []}), "a in weight_map of"),
    (SHARDS, "model.safetensors.index.json", dict(weight_map={"a": "\ud800"}), "files beside it"),
    (SHARDS, "model.safetensors.index.json", dict(weight_map={"a": ""}), "files beside it"),
    (SHARDS, "model.safetensors.index.json", dict(weight_map={"a\nb": "nowhere.safetensors"}), "nowhere.safetensors"),
    (SHARDS, "model.safetensors.index.json", dict(weight_map={"a": "x" * 300}), "File name too long"),
    (CLIP, "tokenizer.json", dict(model__continuing_subword_prefix="##"), "continuing_subword_prefix"),
    (CLIP, "tokenizer.json", dict(model__dropout=0.5), "dropout"),
    (CLIP, "tokenizer.json", dict(post_processor__special_tokens={}), "puts '<s>', which its special_tokens lack"),
    (CLIP, "tokenizer.json", dict(model__type="Unigram"), "must be one of 'BPE'"),
    (CLIP, "tokenizer.json", dict(normalizer={"type": "Precompiled", "precompiled_charsmap": ""}), "must be one of"),
    (CLIP, "tokenizer.json", dict(pre_tokenizer={"type": "FixedLength", "length": 0}), "must be one of"),
]


@pytest.mark.parametrize("base, name, values, words", CASES)
def test_what_would_hurt_is_one_line(changed, picture, base, name, values, words):
    assert_one_line_error(ask(changed(base, name, **values), picture), words)


def test_a_list_of_templates_of_which_none_can_be_used_is_no_template(changed, picture):
    assert ask(changed(CLIP, "tokenizer_config.json", chat_template=[1, {"name": "default"}]), picture).code == 0


def doubling(count):
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    return {"type": "Sequence", "normalizers": [step] * count}


@pytest.mark.parametrize(
    "part, value",
    [
        ("normalizer", doubling(30)),
        ("normalizer", {"type": "Prepend", "prepend": "x" * 10**6}),
        ("normalizer", {"type": "Sequence", "normalizers": [doubling(2)] * 30}),
        ("normalizer", {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"Regex": ""}, "content": "x" * 99}]}),
        ("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Replace", "pattern": {"String": "a"}, "content": "ﷺ"}]}),
        ("normalizer", {"type": "Replace", "pattern": {"Regex": ".*.*.*.*.*.*.*.*\\b\\B"}, "content": "x"}),
        ("normalizer", {"pattern": {"Regex": ".*.*.*.*.*.*.*.*\\b\\B"}, "content": "x"}),  # as files were once written
        ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}),
        ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": ".*.*.*.*.*.*.*.*\\b\\B"}, "behavior": "Isolated", "invert": False}),
        ("decoder", {"type": "Sequence", "decoders": [{"type": "Fuse"}] * 10**5}),
        ("decoder", {"type": "Sequence", "decoders": 3}),
        ("decoder", {"type": "Strip", "content": " ", "start": 1, "stop": 1}),
        ("post_processor", []),
        ("post_processor", {"type": "Sequence", "processors": [{"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}] * 2}),
        ("post_processor", {"type": "ByteLevel", "single": [{"SpecialToken": {"id": "</s>", "type_id": 0}}], "pair": [], "special_tokens": {}}),
        ("post_processor", {"type": "Sequence", "processors": [], "single": [{"Sequence": {"id": "B", "type_id": 0}}], "pair": [], "special_tokens": {}}),
    ],
)  # fmt: skip
def test_a_tokenizer_that_would_not_end_is_one_line(changed, picture, part, value, capfd):
    ran = ask(changed(CLIP, "tokenizer.json", **{part: value}), picture)
    assert_one_line_error(ran, part[:9])
    assert capfd.readouterr().err == ""  # where the library panics, it writes past Python


def test_a_token_for_the_unknown_that_is_unknown_is_one_line(changed):
    tokenizer = load_tokenizer(changed(CLIP, "tokenizer.json", model__unk_token="NOPE", model__byte_fallback=False))
    with pytest.raises(InputError, match="the tokenizer cannot read the prompt: .*NOPE"):
        encode(tokenizer, "☃")


@pytest.mark.parametrize("pattern", [tokenizer.GPT2, tokenizer.QWEN2, tokenizer.LLAMA3])
def test_the_published_ways_to_split_words_are_read_and_end(changed, pattern, capfd):
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    splits = load_tokenizer(changed(CLIP, "tokenizer.json", pre_tokenizer=split)).pre_tokenizer.pre_tokenize_str
    assert [word for word, _ in splits("It's a word\n")] == ["It", "'s", " a", " word", "\n"]
    for text in (" ", "\n", " \n", "a", "'", "!\n"):
        assert "".join(word for word, _ in splits(text * 20_000)) == text * 20_000
    assert capfd.readouterr().err == ""


def test_padding_and_truncation_in_a_tokenizer_change_nothing(changed, picture):
    padding = {
        "strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "<s>",
    }  # fmt: skip
    truncation = {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    folder = changed(CLIP, "tokenizer.json", padding=padding, truncation=truncation)
    with bounded_memory():
        cut = load_tokenizer(folder).encode("What is in the picture?").ids
    assert cut == load_tokenizer(CLIP).encode("What is in the picture?").ids


def test_a_panic_of_the_tokenizers_library_is_an_input_error(monkeypatch):
    class PanicException(BaseException):
        pass

    def panics(*_):
        raise PanicException("chunk size\nmust be non-zero")

    monkeypatch.setattr("minivtw.checkpoints.tokenizer.Tokenizer.from_buffer", panics)
    with pytest.raises(InputError, match="is not a tokenizer: chunk size must be non-zero") as caught:
        load_tokenizer(CLIP)
    assert isinstance(caught.value.__cause__, PanicException)


# CLIP's last norm is stored, and no feature that LLaVA takes passes it.
USED = [name for name in sorted(random_tensors()) if "post_layernorm" not in name]


@pytest.mark.parametrize("name", [name for name in USED if not re.search(r"language.*layers\.[12]|_proj\.bias", name)])
def test_weights_that_are_not_numbers_are_noticed_in_their_layer(tmp_path, picture, name):
    """Wherever they are: one line, without a warning of NumPy's, that says where."""
    tensors = random_tensors()
    tensors[name].flat[-1] = np.nan
    ran = ask(write_folder(tmp_path / "model", tensors), picture)
    assert_one_line_error(ran, "numbers stop being finite in")
    *_, layer = name.partition("layers.")
    if layer:
        part = "decoder" if name.startswith("language") else "vision tower"
        assert f"in layer {layer[0]} of the {part};" in ran.err


@pytest.mark.parametrize("value", [np.inf, -np.inf, 3e38])
@pytest.mark.parametrize(
    "name",
    [
        "multi_modal_projector.linear_1.weight",
        "multi_modal_projector.linear_2.weight",
        "vision_tower.vision_model.embeddings.patch_embedding.weight",
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight",
        "language_model.model.layers.1.mlp.gate_proj.weight",
        "language_model.model.layers.2.self_attn.k_proj.weight",
    ],
)
def test_infinite_and_huge_weights_print_no_warning(tmp_path, picture, name, value):
    tensors = random_tensors()
    tensors[name][...] = value
    folder = write_folder(tmp_path / "model", tensors)
    assert_one_line_error(ask(folder, picture), "numbers stop being finite in")
    with (
        np.errstate(over="raise", invalid="raise"),
        pytest.raises(InputError, match="numbers stop being finite in"),
    ):  # in the library
        minivtw.load(folder).answer(picture, "Hm?", max_new_tokens=1)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"])
def test_a_link_out_of_the_folder_is_not_followed(tmp_path, name):
    folder = write_folder(tmp_path / "model")
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="is a link out of the model folder"):
        minivtw.load(folder)
    (folder / name).unlink()
    (tmp_path / "elsewhere").rename(folder / "within")
    (folder / name).symlink_to("within")
    minivtw.load(folder)


def test_the_snapshots_of_a_hub_cache_link_to_its_blobs_and_nowhere_else(tmp_path):
    cache = tmp_path / "models--a--b"
    folder = write_folder(cache / "snapshots" / "0123abc")
    for path in list(folder.iterdir()):
        (cache / "blobs").mkdir(exist_ok=True)
        path.rename(cache / "blobs" / path.name)
        path.symlink_to(f"../../blobs/{path.name}")
    (tmp_path / "moved").symlink_to(cache)  # a cache that is itself reached through a link
    for place in (cache, folder, tmp_path / "moved"):
        assert minivtw.load(place).answer(None, "Hm?", max_new_tokens=1).token_ids
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(shutil.move(cache / "blobs" / "config.json", cache / "config.json"))
    with pytest.raises(InputError, match="link out of the model folder"):
        minivtw.load(cache)


@pytest.mark.parametrize("name", [b"\xff", b"../snapshots/456", b"456", b"", b"a/b", b"\0"])
def test_the_main_revision_of_a_cache_is_one_of_its_snapshots(tmp_path, name):
    write_folder(tmp_path / "snapshots" / "0123abc")
    (tmp_path / "refs").mkdir()
    (tmp_path / "refs" / "main").write_bytes(name)
    with pytest.raises(InputError, match="refs/main"):
        hub.model_folder(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_what_is_no_ordinary_file_is_not_opened(tmp_path, name):
    folder = write_folder(tmp_path)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(InputError, match=f"{name} is not a file"):
        minivtw.load(folder)
    (folder / name).unlink()
    (folder / name).symlink_to(name)
    with pytest.raises(InputError, match=f"{name} is a link to nothing"):
        minivtw.load(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja"])
def test_a_text_without_end_is_not_read(tmp_path, name):
    folder = write_folder(tmp_path)
    with open(folder / name, "wb") as file:
        file.truncate(files.MOST_BYTES + 1)  # takes no room on the disk
    with bounded_memory(2**28), pytest.raises(InputError, match=f"{name} is 100 MB long; at most 100 are read"):
        minivtw.load(folder)
