"""CLIP and SigLIP vision towers: their config keys, tensor names and pixels.

transformers calls them `CLIPVisionConfig`, `SiglipVisionConfig` and, for SigLIP on tiles, `Idefics3VisionConfig`.
"""

import pathlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ..inputs.images import Levels, resized
from ..model.layers import ACTIVATIONS
from ..model.vision import Vision, VisionConfig, VisionLayer
from ..model.weights import MOST_LAYERS
from .checkpoint import Checkpoint
from .fields import REQUIRED, Fields
from .files import read_fields

# What a config leaves out has its class's default.
CLIP: dict[str, Any] = dict(image=224, patch=32, width=768, heads=12, activation="quick_gelu", eps=1e-5)
SIGLIP: dict[str, Any] = dict(image=224, patch=16, width=768, heads=12, activation="gelu_pytorch_tanh", eps=1e-6)
IDEFICS3: dict[str, Any] = dict(image=224, patch=32, width=1152, heads=16, activation="gelu_pytorch_tanh", eps=1e-6)
DEFAULTS = {
    "clip_vision_model": CLIP,
    "siglip_vision_model": SIGLIP,
    **dict.fromkeys(("idefics3", "idefics3_vision", "smolvlm", "smolvlm_vision"), IDEFICS3),
}
MOST_SIDE = 4096  # pixels; transformers makes no image longer
MOST_PATCHES_PER_SIDE = 256  # of a tile; the published towers have up to 37


def vision_config(
    fields: Fields, feature_layer: int, drop_first: bool, post_norm: bool = False, kind: str = "clip_vision_model"
) -> VisionConfig:
    """A vision config's `Fields` -> VisionConfig. The family says which features it takes. Raises InputError."""
    model_type = fields.choice("model_type", tuple(DEFAULTS), kind)
    default = DEFAULTS[model_type]
    fields.refuse_unless(num_channels=3, add_cross_attention=False)
    is_clip = model_type == "clip_vision_model"
    config = VisionConfig(
        image_size=fields.positive_int("image_size", default["image"], most=MOST_SIDE),
        patch_size=fields.positive_int("patch_size", default["patch"], most=MOST_SIDE),
        width=fields.positive_int("hidden_size", default["width"]),
        layers=fields.positive_int("num_hidden_layers", 12, most=MOST_LAYERS),
        heads=fields.positive_int("num_attention_heads", default["heads"]),
        mlp_width=fields.positive_int("intermediate_size", 3072),
        activation=fields.choice("hidden_act", tuple(ACTIVATIONS), default["activation"]),
        layer_norm_eps=fields.number("layer_norm_eps", default["eps"]),
        class_token=is_clip,
        pre_norm=is_clip,
        post_norm=post_norm,
        feature_layer=feature_layer,
        drop_first=drop_first,
    )
    if config.width % config.heads:
        raise fields.error(f"has width {config.width}, which {config.heads} heads cannot share evenly")
    if config.patch_size > config.image_size:
        raise fields.error(f"has patches of {config.patch_size} pixels in images of {config.image_size}")
    if config.image_size // config.patch_size > MOST_PATCHES_PER_SIDE:
        raise fields.error(f"cuts images of {config.image_size} pixels into patches of {config.patch_size}")
    if not 0 <= config.used_layers <= config.layers:
        raise fields.error(f"has {config.layers} layers, so there is no feature layer {config.feature_layer}")
    return config


def vision(config: VisionConfig, take: Checkpoint, prefix: str) -> Vision:
    """Fill in a Vision from a checkpoint whose tower tensors start with `prefix`."""
    width, kernel = config.width, (3, config.patch_size, config.patch_size)

    def layer(index: int) -> VisionLayer:
        name = f"{prefix}encoder.layers.{index}."
        is_one = f"{name}self_attn.qkv_proj.weight" in take  # in nanoVLM's files
        projections = [f"{name}self_attn.{part}_proj" for part in (["qkv"] if is_one else "qkv")]
        return VisionLayer(
            attention_norm=take.norm(f"{name}layer_norm1", width),
            qkv=take.linear(*projections, into=width, out=3 * width // len(projections)),
            output=take.linear(f"{name}self_attn.out_proj", into=width, out=width),
            mlp_norm=take.norm(f"{name}layer_norm2", width),
            up=take.linear(f"{name}mlp.fc1", into=width, out=config.mlp_width),
            down=take.linear(f"{name}mlp.fc2", into=config.mlp_width, out=width),
        )

    if not config.class_token:
        take.skip(f"{prefix}head.")  # SigLIP's pooled vector of the whole image, which no feature depends on
    start, positions = f"{prefix}embeddings.", config.patches + config.class_token
    return Vision(
        config=config,
        patch_embedding=take.linear(f"{start}patch_embedding", into=kernel, out=width, bias=not config.class_token),
        class_embedding=take.vector(f"{start}class_embedding", size=width) if config.class_token else None,
        position_embedding=take.table(f"{start}position_embedding.weight", positions, width),
        pre_norm=take.norm(f"{prefix}pre_layrnorm", width) if config.pre_norm else None,  # CLIP's own spelling
        layers=take.layers(config.layers, layer),
        post_norm=take.norm(f"{prefix}post_layernorm", width),  # in every file, whether the features are normed or not
    )


@dataclass(frozen=True)
class ClipPixels:
    """CLIP's preprocessing, in the order it happens; None leaves a step out."""

    shortest_edge: int | None  # resize until the shorter side is this long …
    exact_size: tuple[int, int] | None  # … or to exactly this (height, width)
    resample: int  # Pillow's number of the interpolation; 3 is bicubic
    crop: tuple[int, int] | None  # (height, width) cut out of the centre; what lies beyond the image is black
    levels: Levels

    def __call__(self, image: Image.Image) -> np.ndarray:
        """A Pillow RGB image to pixels, (3, height, width) float32."""
        image = self.resize(image)
        if self.crop:
            height, width = self.crop
            top, left = (image.height - height) // 2, (image.width - width) // 2
            image = image.crop((left, top, left + width, top + height))
        return self.levels(image)

    def resize(self, image: Image.Image) -> Image.Image:
        height, width = image.height, image.width
        if self.exact_size:
            height, width = self.exact_size
        elif self.shortest_edge:
            shorter, longer = sorted((height, width))
            longer = int(self.shortest_edge * longer / shorter)  # truncated, as in transformers
            height, width = (self.shortest_edge, longer) if height <= width else (longer, self.shortest_edge)
        return resized(image, (width, height), self.resample)


def image_processor_fields(folder: pathlib.Path) -> Fields:
    """preprocessor_config.json or, as transformers 5 saves it, the part `image_processor` of processor_config.json."""
    fields = read_fields(folder, "processor_config.json", optional=True)
    if fields.has("image_processor"):
        return fields.section("image_processor")
    return read_fields(folder, "preprocessor_config.json")


def level_settings(fields: Fields, default: Any = REQUIRED) -> Levels:
    """How an image processor's `Fields` turn levels into numbers."""
    normalises = fields.boolean("do_normalize", True)
    return Levels(
        fields.number("rescale_factor", 1 / 255) if fields.boolean("do_rescale", True) else None,
        fields.triple("image_mean", default) if normalises else None,
        fields.triple("image_std", default, least=1e-6) if normalises else None,
    )


def sides(fields: Fields, key: str, default: dict[str, int]) -> Fields:
    """A size as old and new files say it, a number or an object -> Fields."""
    size = fields.raw(key)
    if type(size) is int:
        return Fields({"shortest_edge": size, "height": size, "width": size}, f"{key} of {fields.where}")
    return fields.section(key, default)


def pixel_settings(folder: pathlib.Path, image_size: int) -> ClipPixels:
    """The settings of the folder's image processor -> ClipPixels, checked to give the tower images of its size."""
    fields = image_processor_fields(folder)
    size = sides(fields, "size", {"shortest_edge": 224})
    crop = sides(fields, "crop_size", {"height": 224, "width": 224})
    resizes, by_edge = fields.boolean("do_resize", True), size.has("shortest_edge")
    crops = fields.boolean("do_center_crop", by_edge)
    settings = ClipPixels(
        size.positive_int("shortest_edge", most=MOST_SIDE) if resizes and by_edge else None,
        (size.positive_int("height"), size.positive_int("width")) if resizes and not by_edge else None,
        fields.choice("resample", range(6), 3),
        (crop.positive_int("height"), crop.positive_int("width")) if crops else None,
        level_settings(fields),
    )
    made = settings.crop or settings.exact_size
    if made != (image_size, image_size):
        raise fields.error(f"makes images of {made} pixels; the vision tower sees {image_size} x {image_size}")
    return settings
