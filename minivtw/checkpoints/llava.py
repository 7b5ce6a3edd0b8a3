"""LLaVA 1.5 (Liu et al. 2023, arXiv 2310.03744): CLIP or SigLIP, a two-layer connector, a Llama or Qwen2 decoder."""

import functools

import numpy as np

from .checkpoint import read_json
from ..model.connector import Connector, connect
from ..inputs.images import ClipPixels
from ..model.layers import ACTIVATIONS, Linear
from . import clip, llama
from .fields import Fields
from .parts import VisionParts, Parts

# Where the parts are: (vision, connector, decoder, head), in published files and in those of some versions between.
# Within `vision`, published files have one more level, `vision_model.`; towers that transformers 5 made itself do not.
OLD_NAMES = ("vision_tower.", "multi_modal_projector.", "language_model.model.", "language_model.lm_head.weight")
NEW_NAMES = ("model.vision_tower.", "model.multi_modal_projector.", "model.language_model.", "lm_head.weight")


def load(fields, folder, checkpoint):
    """config.json's `Fields`, the folder and its `Checkpoint` -> Parts."""
    text_config = llama.decoder_config(fields.part("text_config"))
    if fields.flag("tie_word_embeddings", False):  # said here or in the text config
        text_config = text_config._replace(tied_head=True)
    vision_config = clip.vision_config(
        fields.part("vision_config"),
        feature_layer=fields.index("vision_feature_layer", -2),
        drop_first=fields.choice("vision_feature_select_strategy", ("default", "full"), "default") == "default",
    )
    activation = fields.choice("projector_hidden_act", tuple(ACTIVATIONS), "gelu")
    has_bias = fields.flag("multimodal_projector_bias", True)

    def form(take):
        is_new = "model.language_model.embed_tokens.weight" in take
        vision, projector, decoder, head = NEW_NAMES if is_new else OLD_NAMES
        if f"{vision}embeddings.patch_embedding.weight" not in take:
            vision = f"{vision}vision_model."

        def linear(name, into):
            return Linear(
                take.matrix(f"{projector}{name}.weight", into=into, out=text_config.width),
                take.vector(f"{projector}{name}.bias", size=text_config.width) if has_bias else None,
            )

        return (
            clip.vision(vision_config, take, vision),
            Connector(linear("linear_1", vision_config.width), linear("linear_2", text_config.width), activation),
            llama.decoder(text_config, take, decoder, head),
        )

    vision, connector, decoder = checkpoint.fill(form)
    pixels = pixel_settings(folder, vision_config.image_size)
    visual = "<image>" * vision_config.features
    vision_parts = VisionParts(
        encoder=vision,
        connect=functools.partial(connect, connector),
        tile=lambda images, _: (np.stack([pixels(image) for image in images]), [visual] * len(images)),
        image_token_id=fields.index("image_token_index", fields.index("image_token_id", 32000)),
    )
    if fields.part("text_config").text("model_type", "llama") == "qwen2":
        return Parts(decoder=decoder, chat=interleave, turn_end="<|im_end|>", vision=vision_parts)
    if speaks_chatml(folder):
        return Parts(decoder=decoder, chat=chatml, turn_end="<|im_end|>", vision=vision_parts)
    return Parts(decoder=decoder, chat=vicuna, turn_end="</s>", vision=vision_parts)


def speaks_chatml(folder):
    """Whether the folder's chat template has ChatML's marks. Templates are programs; here they are only looked at."""
    paths = [folder / name for name in ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")]
    return any("<|im_start|>" in path.read_text(encoding="utf-8", errors="replace") for path in paths if path.is_file())


def vicuna(turn, is_first):
    """The chat layout of LLaVA 1.5 on Vicuna."""
    return f"USER: {turn} ASSISTANT:"


def interleave(turn, is_first):
    """The chat layout of LLaVA-Interleave on Qwen2 (its model card): ChatML without its line breaks."""
    return f"<|im_start|>user {turn}<|im_end|><|im_start|>assistant"


def chatml(turn, is_first):
    """ChatML without a system message: Qwen2 and SmolLM2 on their own, and LLaVA on SmolLM2."""
    return f"{'' if is_first else chr(10)}<|im_start|>user\n{turn}<|im_end|>\n<|im_start|>assistant\n"


def image_processor_fields(folder):
    """preprocessor_config.json or, as transformers 5 saves it, the part `image_processor` of processor_config.json."""
    if (folder / "processor_config.json").exists():
        fields = Fields(read_json(folder, "processor_config.json"), f"{folder}/processor_config.json")
        if fields.has("image_processor"):
            return fields.part("image_processor")
    return Fields(read_json(folder, "preprocessor_config.json"), f"{folder}/preprocessor_config.json")


def pixel_settings(folder, image_size):
    """The settings of the folder's image processor -> ClipPixels, checked to give the tower pictures of its size."""
    fields = image_processor_fields(folder)
    size, crop = fields.raw("size", {"shortest_edge": 224}), fields.raw("crop_size", {"height": 224, "width": 224})
    size = {"shortest_edge": size} if isinstance(size, int) else size
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    size, crop = Fields(size, "size of preprocessor_config.json"), Fields(crop, "crop_size of preprocessor_config.json")
    resizes, by_edge = fields.flag("do_resize", True), size.has("shortest_edge")
    normalises = fields.flag("do_normalize", True)
    crops = fields.flag("do_center_crop", by_edge)
    settings = ClipPixels(
        shortest_edge=size.whole("shortest_edge") if resizes and by_edge else None,
        exact_size=(size.whole("height"), size.whole("width")) if resizes and not by_edge else None,
        resample=fields.choice("resample", range(6), 3),
        crop=(crop.whole("height"), crop.whole("width")) if crops else None,
        scale=fields.number("rescale_factor", 1 / 255) if fields.flag("do_rescale", True) else None,
        mean=fields.numbers("image_mean", 3) if normalises else None,
        std=fields.numbers("image_std", 3) if normalises else None,
    )
    if settings.size != (image_size, image_size):
        raise fields.error(
            f"makes pictures of {settings.size} pixels, but the vision tower sees {image_size} x {image_size}"
        )
    return settings
