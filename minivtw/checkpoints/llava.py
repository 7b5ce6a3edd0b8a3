"""LLaVA 1.5 (Liu et al. 2023, arXiv 2310.03744): CLIP or SigLIP, a two-layer connector, a Llama or Qwen2 decoder."""

import functools
import pathlib

from ..model.connector import Connector
from ..model.decoder import Decoder, DecoderConfig
from ..model.layers import ACTIVATIONS
from ..model.vision import Vision, VisionConfig
from . import clip, llama
from .checkpoint import Checkpoint
from .fields import Fields
from .layouts import INTERLEAVE, VICUNA, folder_layout
from .parts import Parts, Tiler, VisionParts, one_tile

# Where the parts are: (vision, connector, decoder, head), in published files and in those of some versions between.
# Within `vision`, published files have one more level, `vision_model.`; towers that transformers 5 made itself do not.
OLD_NAMES = ("vision_tower.", "multi_modal_projector.", "language_model.model.", "language_model.lm_head.weight")
NEW_NAMES = ("model.vision_tower.", "model.multi_modal_projector.", "model.language_model.", "lm_head.weight")


def load(fields: Fields, folder: pathlib.Path, checkpoint: Checkpoint) -> Parts:
    """config.json's `Fields`, the folder and its `Checkpoint` -> Parts."""
    text_config, vision_config = configs(fields, feature_layer=-2, selects="default")
    pixels = clip.pixel_settings(folder, vision_config.image_size)
    vision, connector, decoder = checkpoint.fill(lambda take: taken(take, fields, text_config, vision_config))
    plan = functools.partial(one_tile, pixels, vision_config.features, "<image>" * vision_config.features)
    vision_parts = VisionParts(
        encoder=vision,
        connect=connector,
        tile=Tiler(vision_config.image_size, text_config.max_positions, plan),
        image_token_id=fields.integer("image_token_index", fields.integer("image_token_id", 32000)),
    )
    return Parts(decoder, folder_layout(folder, INTERLEAVE if text_config.qkv_bias else VICUNA), vision_parts)


def taken(
    take: Checkpoint, fields: Fields, text_config: DecoderConfig, vision_config: VisionConfig
) -> tuple[Vision, Connector, Decoder]:
    """The tower, the connector and the decoder out of a checkpoint."""
    is_new = "model.language_model.embed_tokens.weight" in take
    vision, projector, decoder, head = NEW_NAMES if is_new else OLD_NAMES
    if f"{vision}embeddings.patch_embedding.weight" not in take:
        vision = f"{vision}vision_model."
    width, has_bias = text_config.width, fields.boolean("multimodal_projector_bias", True)
    up = take.linear(f"{projector}linear_1", into=vision_config.width, out=width, bias=has_bias)
    down = take.linear(f"{projector}linear_2", into=width, out=width, bias=has_bias)
    return (
        clip.vision(vision_config, take, vision),
        Connector(up, down, fields.choice("projector_hidden_act", tuple(ACTIVATIONS), "gelu")),
        llama.decoder(text_config, take, decoder, head),
    )


def configs(fields: Fields, feature_layer: int, selects: str) -> tuple[DecoderConfig, VisionConfig]:
    """config.json's `Fields`, and the class's defaults for what they leave out -> (DecoderConfig, VisionConfig)."""
    fields.refuse_unless(quantization_config=None)
    text_config = llama.decoder_config(fields.section("text_config"))
    if fields.boolean("tie_word_embeddings", False):  # said here or in the text config
        text_config = text_config._replace(tied_head=True)
    tower, layer = fields.section("vision_config"), fields.integer("vision_feature_layer", feature_layer)
    drop_first = fields.choice("vision_feature_select_strategy", ("default", "full"), selects) == "default"
    return text_config, clip.vision_config(tower, layer, drop_first)
