"""Published decoders by their shapes, for timing with random weights, which take as long as others.

The towers are tiny: they are not timed. Their names are listed without transformers, so it is imported in each.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

TOWER = dict(
    num_hidden_layers=1, hidden_size=64, intermediate_size=64, num_attention_heads=1, image_size=28, patch_size=14
)  # fmt: skip
QWEN_TOWER = dict(depth=1, hidden_size=64, num_heads=1, intermediate_size=64, fullatt_block_indexes=[0])


class Shape(NamedTuple):
    """A published decoder, and how many tokens a usual prompt has."""

    config: Callable[[], Any] | None  # None: a model that is loaded
    visual: int
    text: int


def smolvlm_256m() -> Any:
    import transformers

    text = dict(
        model_type="llama", hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, rope_parameters={"rope_type": "default", "rope_theta": 1e5}, vocab_size=49280,
        max_position_embeddings=8192, tie_word_embeddings=True,
    )  # fmt: skip
    marks = dict(image_token_id=49190, pad_token_id=2)
    return transformers.SmolVLMConfig(text_config=text, vision_config=TOWER, tie_word_embeddings=True, **marks)


def llava_7b() -> Any:
    import transformers

    text = dict(model_type="llama", max_position_embeddings=4096, vocab_size=32064)  # otherwise Llama 2's, the default
    vision = {**TOWER, "model_type": "clip_vision_model"}
    return transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=32000)


def qwen_7b() -> Any:
    import transformers

    text = dict(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}, vocab_size=152064,
        max_position_embeddings=128000,
    )  # fmt: skip
    vision = {**QWEN_TOWER, "out_hidden_size": 3584}
    return transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=151655)


SHAPES = {
    "smolvlm-256m": Shape(smolvlm_256m, 1088, 60),  # sixteen tiles and the overview, 64 tokens each
    "llava-1.5-7b": Shape(llava_7b, 576, 64),
    "qwen2.5-vl-7b": Shape(qwen_7b, 1296, 64),  # a photo of 1008 x 1008 pixels
}
