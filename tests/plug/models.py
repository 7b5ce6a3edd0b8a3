"""Small random models of every family in transformers, and prompts for them without a processor."""

import inspect
from typing import NamedTuple

import torch
import transformers as hf

IMAGE, LAYERS, SIDE = 90, 6, 16  # the token of a piece of an image; the decoder's depth; pixels
UNSPOKEN = list(range(90, 100))  # token ids that are no text, and that no model is to say
TEXT = dict(
    vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=99,
)  # fmt: skip
SIGLIP = dict(
    model_type="siglip_vision_model", image_size=SIDE, patch_size=4, hidden_size=16, intermediate_size=24,
    num_hidden_layers=2, num_attention_heads=2, vision_use_head=False,
)  # fmt: skip
CLIP = dict(
    model_type="clip_vision_model", image_size=SIDE, patch_size=4, hidden_size=16, intermediate_size=24,
    num_hidden_layers=2, num_attention_heads=2, projection_dim=16,
)  # fmt: skip
MROPE = dict(rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]})


class Family(NamedTuple):
    """How to build a model and what it takes for images."""

    config: object
    model: type
    images: callable  # (model, number of images a prompt) -> inputs of the images
    types: str | None = None  # an input that says what kind each token is


def plain(model, counts):
    """One tile an image, (images, 3, side, side)."""
    return {"pixel_values": torch.randn(sum(counts), 3, SIDE, SIDE)}


def tiled(model, counts):
    """An overview and tiles, and every image's size."""
    sizes = torch.tensor([[SIDE, 2 * SIDE] if image % 2 else [SIDE, SIDE] for image in range(sum(counts))])
    return {"pixel_values": torch.randn(sum(counts), 3, 3, SIDE, SIDE), "image_sizes": sizes}


def idefics(model, counts):
    """(prompts, most images, 3, side, side), zeros where a prompt has fewer."""
    pixels = torch.randn(len(counts), max(counts), 3, SIDE, SIDE)
    for row, count in enumerate(counts):
        pixels[row, count:] = 0
    return {"pixel_values": pixels}


def grids(model, counts):
    """Patches of images of different sizes in one row, and the images' grids."""
    grid = torch.tensor([[1, 4, 4] if image % 2 else [1, 4, 6] for image in range(sum(counts))])
    return {"pixel_values": torch.randn(int(grid.prod(1).sum()), 3 * 2 * 4 * 4), "image_grid_thw": grid}


def llava(text, vision, **more):
    return hf.LlavaConfig(text_config={**TEXT, **text}, vision_config=vision, image_token_index=IMAGE, **more)


def qwen_vl(kind, vision):
    text = {**TEXT, **MROPE, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 99}
    return kind(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=91,
        vision_start_token_id=92,
        vision_end_token_id=93,
    )


def gemma(kind, **text):
    return {**TEXT, "model_type": kind, "head_dim": 8, "query_pre_attn_scalar": 8, **text}


def tiling(kind, text, vision, **more):
    """LLaVA-NeXT and LLaVA-OneVision."""
    pinpoints = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [SIDE, SIDE]]
    text = {**TEXT, "model_type": text}
    return kind(text_config=text, vision_config=vision, image_token_index=IMAGE, image_grid_pinpoints=pinpoints, **more)


def shuffled(kind, vision):
    """Idefics3 and SmolVLM."""
    text, vision = {**TEXT, "model_type": "llama"}, {**SIGLIP, "model_type": vision}
    return kind(text_config=text, vision_config=vision, image_token_id=IMAGE, scale_factor=2, pad_token_id=0)


def internvl():
    vision = dict(
        image_size=[SIDE, SIDE], patch_size=[4, 4], hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2,
    )  # fmt: skip
    text = {**TEXT, "model_type": "qwen2"}
    return hf.InternVLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, downsample_ratio=0.5)


def gemma3(window):
    text = gemma("gemma3_text", sliding_window=window, sliding_window_pattern=3)
    marks = dict(image_token_index=IMAGE, boi_token_index=92, eoi_token_index=93)
    return hf.Gemma3Config(text_config=text, vision_config=SIGLIP, mm_tokens_per_image=4, **marks)


def paligemma():
    vision = {**SIGLIP, "projection_dim": 32}
    sizes = dict(projection_dim=32, hidden_size=32)
    return hf.PaliGemmaConfig(text_config=gemma("gemma"), vision_config=vision, image_token_index=IMAGE, **sizes)


QWEN = dict(depth=2, num_heads=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=2, in_channels=3)
QWEN_2 = {**QWEN, "embed_dim": 16, "hidden_size": 32}
QWEN_25 = {
    **QWEN, "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24, "window_size": 16,
    "fullatt_block_indexes": [1],
}  # fmt: skip
QWEN_3 = dict(
    depth=3, hidden_size=16, out_hidden_size=32, intermediate_size=24, num_heads=2, patch_size=4, spatial_merge_size=2,
    temporal_patch_size=2, num_position_embeddings=16, deepstack_visual_indexes=[0, 1],
)  # fmt: skip
WHOLE_TOWER = dict(vision_feature_layer=-1, vision_feature_select_strategy="full")


def families():
    """Name -> `Family`, whose config is made when it is asked for."""
    types = "mm_token_type_ids"
    return {
        "llava": Family(lambda: llava({"model_type": "llama"}, CLIP), hf.LlavaForConditionalGeneration, plain),
        "llava-interleave": Family(
            lambda: llava({"model_type": "qwen2"}, SIGLIP, **WHOLE_TOWER), hf.LlavaForConditionalGeneration, plain
        ),
        "llava-next": Family(
            lambda: tiling(hf.LlavaNextConfig, "mistral", CLIP), hf.LlavaNextForConditionalGeneration, tiled
        ),
        "llava-onevision": Family(
            lambda: tiling(hf.LlavaOnevisionConfig, "qwen2", SIGLIP, video_token_index=91),
            hf.LlavaOnevisionForConditionalGeneration,
            tiled,
        ),
        "idefics3": Family(
            lambda: shuffled(hf.Idefics3Config, "idefics3_vision"), hf.Idefics3ForConditionalGeneration, idefics
        ),
        "smolvlm": Family(
            lambda: shuffled(hf.SmolVLMConfig, "smolvlm_vision"), hf.SmolVLMForConditionalGeneration, idefics
        ),
        "qwen2-vl": Family(lambda: qwen_vl(hf.Qwen2VLConfig, QWEN_2), hf.Qwen2VLForConditionalGeneration, grids, types),
        "qwen2.5-vl": Family(
            lambda: qwen_vl(hf.Qwen2_5_VLConfig, QWEN_25), hf.Qwen2_5_VLForConditionalGeneration, grids, types
        ),
        "qwen3-vl": Family(lambda: qwen_vl(hf.Qwen3VLConfig, QWEN_3), hf.Qwen3VLForConditionalGeneration, grids, types),
        "internvl": Family(internvl, hf.InternVLForConditionalGeneration, plain),
        "gemma3": Family(lambda: gemma3(64), hf.Gemma3ForConditionalGeneration, plain, "token_type_ids"),
        "gemma3-short-window": Family(lambda: gemma3(9), hf.Gemma3ForConditionalGeneration, plain, "token_type_ids"),
        "paligemma": Family(paligemma, hf.PaliGemmaForConditionalGeneration, plain, "prefix"),
    }


NAMES = list(families())


def build(name, seed=0, attention="sdpa"):
    """A random model whose images matter: weights as large as trained ones, none of transformers' tiny first ones."""
    torch.manual_seed(seed)
    family = families()[name]
    return enliven(family.model._from_config(family.config(), attn_implementation=attention).eval())


def enliven(model):
    """Weights as large as trained ones, and no end to what is said."""
    for parameter_name, weight in model.named_parameters():
        if weight.ndim > 1 and "norm" not in parameter_name:
            weight.data.normal_(std=1.0 / weight[0].numel() ** 0.5 if "embed" not in parameter_name else 1.0)
    model.generation_config.eos_token_id = None  # every run is as long as it was asked to be
    model.generation_config.pad_token_id = 0
    model.generation_config.suppress_tokens = UNSPOKEN
    return model


def cache_name(model):
    """What this version of transformers calls the cache."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def layers_of(model):
    """The decoder's layers, by name, as these families have them."""
    inner = model.model
    return (inner.language_model if hasattr(inner, "language_model") else inner.text_model).layers


def image_lengths(name, model, images, counts):
    """How many visual tokens each image becomes."""
    if name.startswith("qwen"):
        return (images["image_grid_thw"].prod(1) // 4).tolist()
    if name in ("llava-next", "llava-onevision"):
        more = {"batch_num_images": torch.tensor([1] * sum(counts))} if name == "llava-onevision" else {}
        parts = model.model.get_image_features(**images, **more, return_dict=True).pooler_output
        return [len(part) for part in parts]
    patches = (SIDE // 4) ** 2
    return [4 if name in ("idefics3", "smolvlm", "internvl") or name.startswith("gemma3") else patches] * sum(counts)


def prompts(name, model, shapes, seed=0):
    """Inputs of a batch, left-padded, and of each of its prompts alone.

    shapes: for each prompt how many text tokens stand before, between and behind its images: [3, 5] is three tokens, an
    image, five tokens. Every id of text is from 2 to 89.
    """
    torch.manual_seed(seed)
    family, counts = families()[name], [len(shape) - 1 for shape in shapes]
    images = family.images(model, counts) if sum(counts) else {}
    lengths = iter(image_lengths(name, model, images, counts) if images else [])
    rows = []
    for shape in shapes:
        row = []
        for place, text in enumerate(shape):
            row += torch.randint(2, 90, (text,)).tolist()
            row += [IMAGE] * next(lengths) if place < len(shape) - 1 else []
        rows.append(row)
    alone = [{**padded(name, [row]), **images_of(images, counts, index)} for index, row in enumerate(rows)]
    return {**padded(name, rows), **images}, alone


def images_of(images, counts, row):
    """The images of one prompt of a batch."""
    first, behind = sum(counts[:row]), sum(counts[: row + 1])
    if first == behind:
        return {}
    pixels = images["pixel_values"]
    if pixels.ndim == 5 and "image_sizes" not in images:  # idefics: by prompt
        return {"pixel_values": pixels[row : row + 1, : counts[row]]}
    if "image_grid_thw" in images:  # all patches in a row
        starts = [0, *images["image_grid_thw"].prod(1).cumsum(0).tolist()]
        return {
            "pixel_values": pixels[starts[first] : starts[behind]],
            "image_grid_thw": images["image_grid_thw"][first:behind],
        }
    return {key: value[first:behind] for key, value in images.items()}


def padded(name, rows):
    """Token ids of each prompt -> input_ids, attention_mask and the family's token types, left-padded."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    real = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    inputs = {"input_ids": ids, "attention_mask": real}
    types = families()[name].types
    if types == "prefix":
        inputs["token_type_ids"] = torch.zeros_like(ids)
    elif types:
        inputs[types] = (ids == IMAGE).long()
    return inputs
