"""Against transformers, and PyTorch for nanoVLM, as they run: random models, the published settings, full-size models.

Run with `pytest -m live` and `pytest -m slow`; needs the extra `reference`.
"""

from collections import defaultdict

import numpy as np
import pytest

import minivtw
from minivtw.checkpoints import idefics3
from minivtw.checkpoints.fields import Fields
from tests.parity import GREEDY_TOKENS, TOLERANCE, compare_layers, observe, relative_error

from .conversation import SIZES, picture

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
@pytest.mark.parametrize("name", ["nanovlm-first", "nanovlm-plain", "nanovlm-single", "nanovlm-later", "nanovlm-filled"])
def test_random_nanovlm(nanovlm, reference, tmp_path, name, side):
    variant = next(variant for variant in (*nanovlm.RECORDED, nanovlm.PLAIN) if variant.name == name)
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
    tiles, (rows, columns) = idefics3.pixel_settings(Fields({}, ""), tmp_path)(image)
    theirs = reference.SmolVLMImageProcessorPil(**settings)(image, return_row_col_info=True)
    assert (rows, columns) == (theirs["rows"][0][0], theirs["cols"][0][0])
    expected = np.asarray(theirs["pixel_values"][0])
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

SMOLVLM_256M = dict(
    vision=dict(image_size=512, patch_size=16, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12),
    text=dict(
        model_type="llama", hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, rms_norm_eps=1e-5, rope_theta=1e5, max_position_embeddings=8192, vocab_size=49280,
    ),
    scale_factor=4,
)  # fmt: skip
NANOVLM_222M = dict(
    vit_hidden_dim=768, vit_inter_dim=3072, vit_patch_size=16, vit_img_size=224, vit_n_heads=12, vit_n_blocks=12,
    lm_hidden_dim=576, lm_inter_dim=1536, lm_n_heads=9, lm_n_kv_heads=3, lm_n_blocks=30, lm_max_position_embeddings=8192,
    lm_vocab_size=49152,
)  # fmt: skip
LLAVA_INTERLEAVE = dict(
    vision=dict(
        model_type="siglip_vision_model", image_size=384, patch_size=14, hidden_size=1152, intermediate_size=4304,
        num_hidden_layers=26, num_attention_heads=16, hidden_act="gelu_pytorch_tanh", vision_use_head=False,
    ),
    text=dict(
        model_type="qwen2", hidden_size=1024, intermediate_size=2816, num_hidden_layers=24, num_attention_heads=16,
        num_key_value_heads=16, rope_theta=1e6, max_position_embeddings=32768,
    ),
    llava=dict(vision_feature_layer=-1, vision_feature_select_strategy="full", tie_word_embeddings=True),
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
def test_full_size_smolvlm_256m(reference, tmp_path):
    pixels = reference.tiles(512, 2048)
    reference.build(reference.Variant("256m", "idefics3", **SMOLVLM_256M, pixels=pixels, dtype="bfloat16"), tmp_path)
    full_size(reference.Reference(tmp_path, "sdpa"), minivtw.load(tmp_path), picture(1000, 200), 5 * 64, 15)


@pytest.mark.slow
def test_full_size_nanovlm_222m(nanovlm, tmp_path):
    nanovlm.build(nanovlm.Variant("222m", NANOVLM_222M, "decoder.head.weight", 0), tmp_path)
    full_size(nanovlm.Reference(tmp_path), minivtw.load(tmp_path), picture(300, 200), 49, 15)


@pytest.mark.slow
def test_full_size_llava_interleave(tmp_path):
    """The published LLaVA with the SigLIP tower and the Qwen2 decoder."""
    from tests import reference as llava

    llava.build(llava.Variant("interleave", **LLAVA_INTERLEAVE, dtype="bfloat16"), tmp_path)
    model, vlm, image = llava.Reference(tmp_path), minivtw.load(tmp_path), picture(300, 200)
    inputs = model.inputs([image], QUESTION)
    assert vlm.prepare(image, QUESTION).token_ids.tolist() == inputs["input_ids"][0].tolist()
    result, ours, steps = observe(vlm, image, QUESTION)
    compare_layers(ours, model.prefill(inputs))
    greedy_ids, expected_steps, _ = model.greedy(inputs, GREEDY_TOKENS)
    assert result.token_ids == greedy_ids
    assert relative_error(steps, expected_steps) < TOLERANCE
