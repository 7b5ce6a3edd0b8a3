"""Against transformers as it runs: random models beyond the recorded ones, pictures of every kind, withdrawal.

Run with `pytest -m live`; needs the extra `reference`.
"""

import collections
import io
import json
import pathlib

import numpy as np
import pytest
from PIL import Image, ImageOps
from safetensors.numpy import load_file

import minivtw
from minivtw.checkpoints.checkpoint import Checkpoint
from minivtw.checkpoints.clip import pixel_settings
from minivtw.inputs.opening import open_image
from minivtw.loading import embedded_folder

from .parity import GREEDY_TOKENS, PIXEL_TOLERANCE, TOLERANCE, compare_layers, observe, relative_error, stage

pytestmark = pytest.mark.live

GOLDEN = pathlib.Path(__file__).parent / "golden"
QUESTION = "What color is the star?"


@pytest.fixture(scope="session")
def reference():
    """The module reference.py: torch is imported when a live test runs, not when tests are collected."""
    from . import reference

    return reference


@pytest.fixture(scope="session")
def errors():
    """The largest error seen in each stage, printed at the end (`-s` shows it)."""
    largest = collections.defaultdict(float)
    yield largest
    for name, error in largest.items():
        print(f"\n{name:24} {error:.1e}", end="")


def picture(seed, size=(90, 61)):
    """Smooth colours with noise, so that both low and high frequencies reach the tower."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    noise = random.integers(-25, 26, (size[1], size[0], 3))
    return Image.fromarray(np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8))


def check(reference, folder, images, question, errors):
    """Prompt, every layer and greedy tokens of a folder in transformers and in minivtw."""
    torch_model, vlm = reference.Reference(folder), minivtw.load(folder)
    inputs = torch_model.inputs(images, question)
    assert vlm.prepare(images, question).token_ids.tolist() == inputs["input_ids"][0].tolist()
    expected = torch_model.prefill(inputs)
    greedy_ids, expected_steps, text = torch_model.greedy(inputs, GREEDY_TOKENS)
    result, ours, steps = observe(vlm, images, question)
    for name, error in compare_layers(ours, expected).items():
        errors[stage(name)] = max(errors[stage(name)], error)
    assert result.token_ids == greedy_ids
    assert result.text == text
    errors["steps"] = max(errors["steps"], relative_error(steps, expected_steps))
    assert errors["steps"] < TOLERANCE


@pytest.mark.parametrize("seed", range(24))
def test_random_llava(reference, tmp_path, errors, seed):
    reference.build(reference.random_variant(seed), tmp_path)
    images = [picture(seed), picture(seed + 1000, (31, 47))][: 1 + seed % 2]
    check(reference, tmp_path, images, QUESTION, errors)


@pytest.mark.parametrize("style", ["saved", "published", "between", "modules"])
@pytest.mark.parametrize("name", ["clip-tied", "siglip-qwen2"])
def test_tensor_names_of_every_version(reference, tmp_path, errors, style, name):
    variant = next(variant for variant in reference.RECORDED if variant.name == name)
    reference.build(variant._replace(style=style), tmp_path)
    check(reference, tmp_path, [picture(1)], QUESTION, errors)


@pytest.mark.parametrize("text_says, model_says", [(True, False), (False, True), (False, False)])
def test_a_tied_head_may_be_said_in_either_config(reference, tmp_path, errors, text_says, model_says):
    variant = reference.RECORDED[0]
    text, llava = (
        {**variant.text, "tie_word_embeddings": text_says},
        {**variant.llava, "tie_word_embeddings": model_says},
    )
    reference.build(variant._replace(text=text, llava=llava), tmp_path)
    has_head = "language_model.lm_head.weight" in load_file(tmp_path / "model.safetensors")
    assert has_head != (text_says or model_says)
    check(reference, tmp_path, [picture(1)], QUESTION, errors)


def test_a_tied_model_may_store_a_head_of_its_own(reference, tmp_path, errors):
    variant = reference.RECORDED[1]
    reference.build(variant, tmp_path)
    tensors = reference.load_file(tmp_path / "model.safetensors")
    tensors["language_model.lm_head.weight"] = -tensors["language_model.model.embed_tokens.weight"]
    reference.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    check(reference, tmp_path, [picture(1)], QUESTION, errors)


@pytest.mark.parametrize("seed", range(3))
def test_embedded_model(reference, errors, seed):
    check(reference, embedded_folder(), [picture(seed, (256, 256))], QUESTION, errors)


@pytest.mark.parametrize("name", sorted(path.parent.name for path in GOLDEN.glob("llava/*/meta.json")))
def test_recordings_are_what_transformers_computes(reference, name):
    folder = GOLDEN / "llava" / name
    model = reference.Reference(folder)
    expected = load_file(folder / "expected.safetensors")
    for case in json.loads((folder / "meta.json").read_text(encoding="utf-8"))["cases"]:
        inputs = model.inputs([folder.parent / "pictures" / name for name in case["images"]], case["question"])
        for array_name, array in model.prefill(inputs).items():
            assert relative_error(array, expected[f"{case['name']}.{array_name}"]) < TOLERANCE


# Withdrawal: transformers' own layers, with the visual tokens taken out between them.


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("depth", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_withdrawal(reference, tmp_path, seed, depth, images):
    reference.build(reference.random_variant(seed)._replace(dtype="float32"), tmp_path)
    torch_model, vlm = reference.Reference(tmp_path), minivtw.load(tmp_path)
    shown = [picture(seed), picture(seed + 1)][:images]
    check_withdrawal(torch_model, vlm, shown, QUESTION, int(depth * vlm.config.layers))


def check_withdrawal(torch_model, vlm, shown, question, layer):
    """Every greedy token's logits, against transformers' own layers."""
    result, ours, steps = observe(vlm, shown, question, withdraw=layer)
    prompt = torch_model.inputs(shown, question)
    embeddings = torch_model.prefill(prompt)["decoder.embeddings"]  # (tokens, width)
    is_visual = prompt["input_ids"][0].numpy() == torch_model.model.config.image_token_id  # (tokens,)
    assert ours[f"decoder.layers.{vlm.config.layers - 1}.hidden"].shape[0] == len(is_visual) - (
        is_visual.sum() if layer < vlm.config.layers else 0
    )
    for token, logits in zip(result.token_ids, steps, strict=True):
        expected = torch_model.withdrawn(embeddings, is_visual, layer)
        assert relative_error(logits, expected) < TOLERANCE
        assert expected.argmax() == token
        embeddings = np.concatenate([embeddings, torch_model.embed([token])])
        is_visual = np.append(is_visual, False)


def test_withdrawal_changes_the_logits(reference, tmp_path):
    """Else the comparison above would say nothing."""
    reference.build(reference.RECORDED[0], tmp_path)
    model = reference.Reference(tmp_path)
    prompt = model.inputs([picture(0)], QUESTION)
    embeddings = model.prefill(prompt)["decoder.embeddings"]
    is_visual = prompt["input_ids"][0].numpy() == model.model.config.image_token_id
    logits = [model.withdrawn(embeddings, is_visual, layer) for layer in range(4)]
    assert relative_error(logits[3], model.prefill(prompt)["decoder.logits"]) < TOLERANCE
    assert all(relative_error(deeper, shallower) > 1e-2 for shallower, deeper in zip(logits, logits[1:]))


# Half-precision files.


@pytest.mark.parametrize("dtype, quiet_exponent", [("bfloat16", 0x7F80), ("float16", 0x7C00)])
def test_every_half_is_widened_to_the_same_bits(reference, tmp_path, dtype, quiet_exponent):
    torch = reference.torch
    bits = np.arange(2**16).astype(np.uint16)
    bits = bits[(bits & 0x7FFF) <= quiet_exponent]  # every number and both infinities; NaNs are left out
    halves = torch.from_numpy(bits.view(np.int16)).view(getattr(torch, dtype)).reshape(2, -1)
    reference.save_file({"first": torch.zeros(3, dtype=halves.dtype), "halves": halves}, tmp_path / "model.safetensors")
    form = lambda take: (take.vector("first", size=3), take.table("halves", *halves.shape))
    _, ours = Checkpoint(tmp_path).fill(form)
    assert ours.dtype == np.float32
    assert ours.tobytes() == halves.float().numpy().tobytes()


@pytest.mark.parametrize("name", ["clip-tied", "clip-wide-heads", "siglip-qwen2"])
def test_half_precision_weights_are_the_arrays_that_torch_widens(reference, name):
    folder, tensors = GOLDEN / "llava" / name, {}
    for path in folder.glob("model*.safetensors"):
        tensors.update(reference.load_file(path))

    def take_one(take, name, tensor):
        if tensor.ndim == 1:
            return take.vector(name, size=len(tensor))
        return take.matrix(name, into=tuple(tensor.shape[1:]), out=len(tensor))

    def form(take):
        return {name: take_one(take, name, tensor) for name, tensor in tensors.items()}

    for tensor_name, ours in Checkpoint(folder).fill(form).items():
        tensor = tensors[tensor_name]
        assert tensor.dtype in (reference.torch.float16, reference.torch.bfloat16)
        assert ours.T.tobytes() == tensor.float().numpy().tobytes(), tensor_name


# Pictures: the image processors' pixels. They never see an EXIF turn; transformers applies it when it opens a file.

SIZES = [(1, 1), (1, 30), (30, 1), (2, 3), (23, 24), (24, 24), (24, 23), (25, 24), (37, 200), (200, 37), (3000, 200)]
MODES = ["RGB", "L", "LA", "P", "RGBA", "CMYK", "1", "I;16", "I", "F", "PA", "YCbCr", "HSV", "LAB"]
SETTINGS = {
    "clip": ("clip", {}),
    "clip, larger crop": ("clip", {"size": {"shortest_edge": 17}}),
    "clip, smaller crop": ("clip", {"size": {"shortest_edge": 40}}),
    "clip, bilinear": ("clip", {"resample": 2, "image_mean": [0.1, 0.5, 0.9], "image_std": [0.3, 0.2, 0.1]}),
    "clip, not normalised": ("clip", {"do_normalize": False}),
    "clip, not rescaled": ("clip", {"do_rescale": False, "image_mean": [120, 110, 100], "image_std": [60, 61, 62]}),
    "clip, no crop": ("clip", {"size": {"height": 24, "width": 24}, "do_center_crop": False}),
    "siglip": ("siglip", {}),
    "siglip, Lanczos": ("siglip", {"resample": 1}),
}


@pytest.fixture(params=SETTINGS)
def processors(reference, request, tmp_path):
    """(transformers' image processor, minivtw's) of the same preprocessor_config.json, for a tower of 24 pixels."""
    kind, changes = SETTINGS[request.param]
    square = {"height": 24, "width": 24}
    if kind == "clip":
        processor = reference.CLIPImageProcessorPil(**{"size": {"shortest_edge": 24}, "crop_size": square, **changes})
    else:
        processor = reference.SiglipImageProcessorPil(**{"size": square, **changes})
    reference.write_json(tmp_path / "preprocessor_config.json", processor.to_dict())
    return processor, pixel_settings(tmp_path, 24)


def compare_pixels(processors, image, upright=None):
    theirs, ours = processors
    expected = theirs(upright or image, return_tensors="np")["pixel_values"][0]  # (3, height, width)
    pixels = ours(open_image(image))
    assert pixels.dtype == np.float32 and pixels.shape == expected.shape
    assert np.abs(pixels - expected).max() <= PIXEL_TOLERANCE


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_pixels_of_every_size(processors, size):
    compare_pixels(processors, picture(size[0], size))


def in_mode(mode, seed=0):
    """A picture of a Pillow mode, transparent in parts where the mode knows transparency."""
    image = picture(seed)
    alpha = Image.fromarray(np.tile(np.linspace(0, 255, image.width).astype(np.uint8), (image.height, 1)))
    if mode in ("RGBA", "LA"):
        image = image.convert(mode[:-1])
        image.putalpha(alpha)
        return image
    if mode == "PA":
        return Image.merge("LA", (image.convert("L"), alpha)).convert("PA")
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    if mode == "P":
        return image.quantize(16)
    if mode == "LAB":
        return Image.frombytes("LAB", image.size, image.tobytes())
    return image.convert(mode)


@pytest.mark.parametrize("mode", MODES)
def test_pixels_of_every_mode(processors, mode):
    image = in_mode(mode)
    assert image.mode == mode
    # Pillow's own conversion, and so theirs, makes all 16-bit levels above 255 white; here they are 257 times those of L.
    compare_pixels(processors, image, upright=in_mode("L") if mode == "I;16" else None)


@pytest.mark.parametrize(
    "mode, transparency", [("P", 3), ("P", bytes(range(0, 160, 10))), ("L", 40), ("RGB", (10, 20, 30))]
)
def test_pixels_of_a_transparent_colour(processors, tmp_path, mode, transparency):
    image = in_mode(mode)
    if mode == "RGB":
        image.paste((10, 20, 30), (5, 5, 40, 40))
    image.save(tmp_path / "picture.png", transparency=transparency)
    with Image.open(tmp_path / "picture.png") as opened:
        assert opened.info.get("transparency") is not None
        opened.load()
        opaque = opened.copy()
        opaque.info.pop("transparency")
        assert np.abs(np.asarray(open_image(opened), float) - np.asarray(opaque.convert("RGB"))).max() > 50
        compare_pixels(processors, tmp_path / "picture.png", upright=opened)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pixels_of_a_turned_photograph(processors, tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(orientation, (80, 33)).save(tmp_path / "photo.jpg", exif=exif, quality=95)
    with Image.open(tmp_path / "photo.jpg") as opened:
        upright = ImageOps.exif_transpose(opened)
        assert upright.size == ((80, 33) if orientation < 5 else (33, 80))
        compare_pixels(processors, tmp_path / "photo.jpg", upright=upright)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP"])
def test_pixels_of_an_animation_are_those_of_its_first_frame(processors, tmp_path, format):
    file = io.BytesIO()
    lossless = {"lossless": True} if format == "WEBP" else {}
    picture(1).save(file, format, save_all=True, append_images=[picture(2), picture(3)], **lossless)
    (tmp_path / "animation").write_bytes(file.getvalue())
    with Image.open(tmp_path / "animation") as opened:
        assert opened.n_frames == 3
        compare_pixels(processors, tmp_path / "animation", upright=opened)
