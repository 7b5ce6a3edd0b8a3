"""Against transformers, and PyTorch for nanoVLM, as they run: random models, the published settings, full-size models.

Run with `pytest -m live` and `pytest -m slow`; needs the extra `reference`.
"""

import json
from collections import defaultdict

import numpy as np
import pytest

import minivtw
from minivtw.checkpoints import family, idefics3
from minivtw.checkpoints.fields import Fields
from tests.parity import GREEDY_TOKENS, TOLERANCE, compare_layers, observe, relative_error

from . import sizes
from .conversation import SIZES, picture
from .published import BlankCheckpoint

QUESTION = "What color is the star?"
PUBLISHED_SIZES = [
    (1, 1),
    (30, 1),
    (300, 400),
    (512, 512),
    (513, 512),
    (640, 480),
    (1000, 2000),
    (2048, 2048),
    (3000, 200),
]


@pytest.fixture(scope="module")
def reference():
    """Torch is imported when a live test runs, not when tests are collected."""
    from . import reference

    return reference


@pytest.fixture(scope="module")
def nanovlm():
    from . import nanovlm

    return nanovlm


def random_smolvlm(reference, seed):
    """A model of the family of random sizes and choices."""
    random = np.random.default_rng(seed)
    pick = lambda *choices: choices[random.integers(len(choices))]
    heads, kv_heads = pick((4, 4), (6, 2), (9, 3))
    factor, patch = pick(1, 2, 3, 4), pick(4, 7, 16)
    rows, vision_heads = factor * int(random.integers(1, 4)), int(random.integers(1, 5))
    vision = reference.tower(
        image_size=patch * pick(rows, rows, rows + 1),
        patch_size=patch,
        hidden_size=vision_heads * int(random.integers(3, 12)),
        num_attention_heads=vision_heads,
        num_hidden_layers=int(random.integers(1, 5)),
    )
    text = reference.llama(
        hidden_size=int(random.integers(3, 9)) * 2 * heads,
        num_hidden_layers=int(random.integers(3, 8)),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
    )
    side = rows * patch + int(random.integers(patch))  # a border narrower than a patch is not seen
    pixels = reference.tiles(
        side, int(random.integers(1, 4 * side)), do_image_splitting=pick(True, True, False), resample=pick(1, 3)
    )
    dtype = pick("float32", "float16", "bfloat16")
    return reference.Variant(
        f"random-{seed}", pick("idefics3", "smolvlm"), vision, text, factor, pixels, dtype, pick(True, False), seed
    )


def check(model, vlm, greedy, images, layers):
    """Prompt, every layer, greedy tokens with and without withdrawal."""
    token_ids, tiles = model.inputs(images, QUESTION)
    assert vlm.prepare(images, QUESTION).token_ids.tolist() == token_ids.tolist()
    expected = model.prefill(token_ids, tiles)
    for layer in layers:
        result, ours, steps = observe(vlm, images, QUESTION, withdraw=layer)
        if layer is None:
            compare_layers(ours, expected)
        said, expected_steps = greedy(model, token_ids, tiles, GREEDY_TOKENS, layer)
        assert result.token_ids == said
        assert relative_error(steps, expected_steps) < TOLERANCE


@pytest.mark.live
@pytest.mark.parametrize("seed", range(16))
def test_random_smolvlm(reference, tmp_path, seed):
    reference.build(random_smolvlm(reference, seed), tmp_path)
    images = [picture(90, 61), picture(31, 47)][: 1 + seed % 2]
    vlm = minivtw.load(tmp_path)
    check(reference.Reference(tmp_path), vlm, reference.greedy, images, [None, 0, vlm.config.layers - 1])


@pytest.mark.live
@pytest.mark.parametrize("side", [96, 64, 32])
@pytest.mark.parametrize("layout", ["first", "plain", "single", "later", "filled"])
def test_random_nanovlm(nanovlm, reference, tmp_path, layout, side):
    variant = {variant.name: variant for variant in (*nanovlm.RECORDED, nanovlm.PLAIN)}[f"nanovlm-{layout}"]
    changes = {"lm_n_heads": 8, "lm_n_kv_heads": 4, "vit_n_heads": 2, "mp_pixel_shuffle_factor": 4, **variant.changes}
    changes.pop("mp_image_token_length", None)  # it follows from the factor
    if "max_img_size" in changes:
        changes["max_img_size"] = side
    nanovlm.build(variant._replace(changes=changes, seed=side), tmp_path)
    check(
        nanovlm.Reference(tmp_path),
        minivtw.load(tmp_path),
        reference.greedy,
        [picture(90, 61), picture(31, 47)],
        [None, 1],
    )


@pytest.mark.live
@pytest.mark.parametrize("size", PUBLISHED_SIZES + list(SIZES))
def test_pixels_of_the_published_settings(reference, tmp_path, size):
    """SmolVLM-256M and 500M: longest edge 2048, tiles of 512."""
    settings = reference.tiles(512, 2048)
    reference.write_json(
        tmp_path / "preprocessor_config.json", reference.SmolVLMImageProcessorPil(**settings).to_dict()
    )
    image = picture(*size)
    plan = idefics3.pixel_settings(tmp_path).plan(64, image.height, image.width)
    theirs = reference.SmolVLMImageProcessorPil(**settings)(image, return_row_col_info=True)
    rows, columns = theirs["rows"][0][0], theirs["cols"][0][0]
    assert plan.tokens == 64 * plan.tiles == plan.text(0, 1).count("<image>")
    assert plan.text(0, 1).count("<row_") == rows * columns
    assert rows == columns == 0 or f"<row_{rows}_col_{columns}>" in plan.text(0, 1)
    tiles, expected = np.stack(list(plan.cut(image))), np.asarray(theirs["pixel_values"][0])
    assert tiles.shape == expected.shape
    assert np.abs(tiles - expected).max() < 1e-6


@pytest.mark.live
def test_recordings_are_what_the_references_compute(reference, nanovlm):
    from safetensors.numpy import load_file

    from .test_families import FOLDERS, meta

    for folder in FOLDERS:
        model = (nanovlm if folder.name.startswith("nanovlm") else reference).Reference(folder)
        expected, case = load_file(folder / "expected.safetensors"), meta(folder)["cases"][0]
        arrays = model.prefill(*model.inputs([picture(*size) for size in case["sizes"]], case["question"]))
        for name, array in arrays.items():
            recorded = expected[f"one.{name}"]
            assert relative_error(array[..., -1:, :] if array.shape != recorded.shape else array, recorded) < TOLERANCE


# At the full published sizes, with random weights: what is left of the differences when widths and depths are real.

NANOVLM_222M = dict(
    vit_hidden_dim=768, vit_inter_dim=3072, vit_patch_size=16, vit_img_size=224, vit_n_heads=12, vit_n_blocks=12,
    lm_hidden_dim=576, lm_inter_dim=1536, lm_n_heads=9, lm_n_kv_heads=3, lm_n_blocks=30, lm_max_position_embeddings=8192,
    lm_vocab_size=49152,
)  # fmt: skip


def full_size(model, vlm, image, visual, withdraw_layer):
    """Prompt, every layer's hidden states, logits and 16 greedy tokens, with and without withdrawal."""
    import torch

    token_ids, tiles = model.inputs([image], QUESTION)
    prompt = vlm.prepare(image, QUESTION)
    assert prompt.token_ids.tolist() == token_ids.tolist() and prompt.is_visual.sum() == visual
    expected = {
        name: array for name, array in model.prefill(token_ids, tiles).items() if not name.endswith("attention")
    }
    for layer in (None, withdraw_layer):
        seen = defaultdict(list)
        keep = lambda name, array: None if name.endswith("attention") else seen[name].append(array.copy())
        result = vlm.answer(image, QUESTION, withdraw=layer, max_new_tokens=GREEDY_TOKENS, observe=keep)
        if layer is None:
            ours = {
                name: np.stack(arrays) if name.startswith("vision.l") else arrays[0] for name, arrays in seen.items()
            }
            for name in ("vision.embeddings", "vision.features"):
                ours[name] = np.stack(seen[name])
            compare_layers(ours, expected)
        # What the reference would say after each of our tokens: the same tokens, if they are its own greedy ones.
        hidden = torch.cat([torch.tensor(expected["decoder.embeddings"]), model.embed(result.token_ids[:-1])])
        stays = torch.cat(
            [torch.tensor(token_ids != model.image_token_id), torch.ones(len(result.token_ids) - 1, dtype=torch.bool)]
        )
        steps = model.last_logits(hidden, stays, layer, len(result.token_ids))
        assert relative_error(np.stack(seen["decoder.logits"]), steps) < TOLERANCE
        assert steps.argmax(-1).tolist() == result.token_ids


@pytest.mark.slow
@pytest.mark.parametrize("name", sizes.IDEFICS3)
def test_full_size_smolvlm(reference, tmp_path, name):
    """Every published size of the family; of SmolVLM-2.2B the first two layers of the tower and of the decoder."""
    size, depth = sizes.IDEFICS3[name], {"num_hidden_layers": 2} if name == "SmolVLM-2.2B" else {}
    tokens = (size.side // size.vision["patch_size"] // size.factor) ** 2
    variant = reference.Variant(
        name, size.model_type, {**size.vision, **depth}, {**size.text, **depth}, size.factor,
        reference.tiles(size.side, 2 * size.side), "bfloat16", size.tied,
    )  # fmt: skip
    reference.build(variant, tmp_path)
    model, vlm = reference.Reference(tmp_path, "sdpa"), minivtw.load(tmp_path)
    full_size(model, vlm, picture(1000, 200), 3 * tokens, 1 if depth else 15)


@pytest.mark.slow
def test_full_size_nanovlm_222m(nanovlm, tmp_path):
    nanovlm.build(nanovlm.Variant("222m", NANOVLM_222M, "decoder.head.weight", 0), tmp_path)
    full_size(nanovlm.Reference(tmp_path), minivtw.load(tmp_path), picture(300, 200), 49, 15)


@pytest.mark.slow
@pytest.mark.parametrize("name, layers", [("LLaVA-Interleave-0.5B", None), ("LLaVA-1.5-7B", 1), ("LLaVA-1.5-13B", 1)])
def test_full_size_llava(tmp_path, name, layers):
    """Every published width; of the large models one layer of the tower and of the decoder, which is what fits 8 GB."""
    from tests import reference as llava

    size = sizes.LLAVA[name]
    depth, feature = ({}, {}) if layers is None else ({"num_hidden_layers": layers}, {"vision_feature_layer": -1})
    variant = llava.Variant(
        name, {**size.vision, **depth}, {**size.text, **depth}, {**size.llava, **feature}, "published", size.dtype
    )
    llava.build(variant, tmp_path)
    model, vlm, image = llava.Reference(tmp_path), minivtw.load(tmp_path), picture(300, 200)
    inputs = model.inputs([image], QUESTION)
    assert vlm.prepare(image, QUESTION).token_ids.tolist() == inputs["input_ids"][0].tolist()
    tokens = GREEDY_TOKENS if layers is None else 3
    seen = defaultdict(list)
    show = lambda name, array: seen[name].append(array.copy())
    result = vlm.answer(image, QUESTION, withdraw="off", max_new_tokens=tokens, observe=show)
    steps = np.stack(seen["decoder.logits"])
    ours = {
        name: np.stack(shown) if name.startswith("vision.") and name != "vision.pixels" else shown[0]
        for name, shown in seen.items()
    }
    compare_layers(ours, model.prefill(inputs))
    greedy_ids, expected_steps, _ = model.greedy(inputs, tokens)
    assert result.token_ids == greedy_ids
    assert relative_error(steps, expected_steps) < TOLERANCE


def names_and_shapes(config, model_class):
    """The tensors that transformers makes of a config, by name, with their shapes; nothing is allocated."""
    import torch

    with torch.device("meta"):
        model = model_class(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.live
@pytest.mark.parametrize("name", sizes.IDEFICS3)
def test_every_tensor_of_every_smolvlm_is_known(reference, tmp_path, name):
    size = sizes.IDEFICS3[name]
    config_class, model_class, _ = reference.CLASSES[size.model_type]
    config = config_class(
        vision_config=size.vision, text_config={**size.text, "tie_word_embeddings": size.tied},
        scale_factor=size.factor, tie_word_embeddings=size.tied,
    )  # fmt: skip
    expected = names_and_shapes(config, model_class)
    reference.write_json(tmp_path / "preprocessor_config.json", reference.tiles(size.side, 4 * size.side))
    check_names(config, expected, tmp_path, size.tied)


@pytest.mark.live
@pytest.mark.parametrize("name", sizes.LLAVA)
def test_every_tensor_of_every_llava_is_known(reference, tmp_path, name):
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    size = sizes.LLAVA[name]
    config = LlavaConfig(vision_config=size.vision, text_config=size.text, **size.llava)
    expected = names_and_shapes(config, LlavaForConditionalGeneration)
    side = size.vision["image_size"]
    pixels = {"size": {"height": side, "width": side}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    reference.write_json(tmp_path / "preprocessor_config.json", pixels)
    check_names(config, expected, tmp_path, size.llava.get("tie_word_embeddings", False))


def check_names(config, expected, folder, tied):
    """A model of full depth asks for exactly these tensors, in these shapes."""
    fields = Fields(json.loads(config.to_json_string(use_diff=False)), "config.json")
    if tied:
        expected.pop("lm_head.weight")
    checkpoint = BlankCheckpoint(expected)
    family(fields).load(fields, folder, checkpoint)
    assert checkpoint.asked == expected
