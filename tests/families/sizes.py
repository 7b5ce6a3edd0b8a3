"""The sizes of the published models that are built with random weights; free of torch."""

from typing import NamedTuple


class Idefics3Size(NamedTuple):
    """A SmolVLM: what its configs say, and the pixels of a tile."""

    model_type: str
    vision: dict
    text: dict
    factor: int = 4
    side: int = 512
    tied: bool = False


class LlavaSize(NamedTuple):
    """A LLaVA: what its configs say, and how its files are stored."""

    vision: dict
    text: dict
    llava: dict
    dtype: str


def llama(width, mlp_width, layers, heads, kv_heads, vocabulary, **changes):
    return dict(
        model_type="llama", hidden_size=width, intermediate_size=mlp_width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=vocabulary, rms_norm_eps=1e-5,
        **{"rope_theta": 1e5, "max_position_embeddings": 8192, **changes},
    )  # fmt: skip


def vit(image, patch, width, mlp_width, layers, heads, **changes):
    return dict(
        image_size=image, patch_size=patch, hidden_size=width, intermediate_size=mlp_width, num_hidden_layers=layers,
        num_attention_heads=heads, **changes,
    )  # fmt: skip


BASE = vit(512, 16, 768, 3072, 12, 12)
SO400M = vit(384, 14, 1152, 4304, 27, 16)
SMALL, MIDDLE = llama(576, 1536, 30, 9, 3, 49280), llama(960, 2560, 32, 15, 5, 49280)
IDEFICS3 = {
    "SmolVLM-256M": Idefics3Size("idefics3", BASE, SMALL),
    "SmolDocling-256M": Idefics3Size("idefics3", BASE, SMALL, tied=True),
    "Granite-Docling-258M": Idefics3Size("idefics3", BASE, {**SMALL, "vocab_size": 100352}, tied=True),
    "SmolVLM2-256M": Idefics3Size("smolvlm", BASE, SMALL),
    "SmolVLM2-500M": Idefics3Size("smolvlm", BASE, MIDDLE),
    "SmolVLM-2.2B": Idefics3Size(
        "idefics3",
        SO400M,
        llama(2048, 8192, 24, 32, 32, 49155, rope_theta=273768.0, max_position_embeddings=16384),
        3,
        384,
    ),
}
CLIP_L = vit(
    336,
    14,
    1024,
    4096,
    24,
    16,
    model_type="clip_vision_model",
    hidden_act="quick_gelu",
    projection_dim=768,
    vocab_size=32000,
)
SIGLIP = dict(
    vit(384, 14, 1152, 4304, 26, 16, model_type="siglip_vision_model", hidden_act="gelu_pytorch_tanh"),
    vision_use_head=False,
)
VICUNA = dict(rope_theta=1e4, max_position_embeddings=4096)
QWEN = {**llama(1024, 2816, 24, 16, 16, 152000, rope_theta=1e6, max_position_embeddings=32768), "model_type": "qwen2"}
QWEN["rms_norm_eps"] = 1e-6
CLASSLESS = dict(vision_feature_layer=-2, vision_feature_select_strategy="default")
WHOLE = dict(vision_feature_layer=-1, vision_feature_select_strategy="full", tie_word_embeddings=True)
LLAVA = {
    "LLaVA-1.5-7B": LlavaSize(CLIP_L, llama(4096, 11008, 32, 32, 32, 32064, **VICUNA), CLASSLESS, "float16"),
    "LLaVA-1.5-13B": LlavaSize(CLIP_L, llama(5120, 13824, 40, 40, 40, 32064, **VICUNA), CLASSLESS, "float16"),
    "LLaVA-Interleave-0.5B": LlavaSize(SIGLIP, QWEN, WHOLE, "bfloat16"),
}
