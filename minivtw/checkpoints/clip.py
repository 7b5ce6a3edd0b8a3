"""CLIP and SigLIP vision towers: their config keys and tensor names.

transformers calls them `CLIPVisionConfig`, `SiglipVisionConfig` and, for SigLIP on tiles, `Idefics3VisionConfig`.
"""

from ..model.layers import ACTIVATIONS, LayerNorm, Linear
from ..model.vision import Vision, VisionConfig, VisionLayer

# What a config leaves out has its class's default.
CLIP = dict(image=224, patch=32, width=768, heads=12, activation="quick_gelu", eps=1e-5)
SIGLIP = dict(image=224, patch=16, width=768, heads=12, activation="gelu_pytorch_tanh", eps=1e-6)
IDEFICS3 = dict(image=224, patch=32, width=1152, heads=16, activation="gelu_pytorch_tanh", eps=1e-6)
DEFAULTS = {
    "clip_vision_model": CLIP,
    "siglip_vision_model": SIGLIP,
    **dict.fromkeys(("idefics3", "idefics3_vision", "smolvlm", "smolvlm_vision"), IDEFICS3),
}


def vision_config(fields, feature_layer, drop_first, post_norm=False, default_type="clip_vision_model"):
    """A vision config's `Fields` -> VisionConfig. The family says which features it takes."""
    model_type = fields.choice("model_type", tuple(DEFAULTS), default_type)
    default = DEFAULTS[model_type]
    fields.choice("num_channels", (3,), 3)
    is_clip = model_type == "clip_vision_model"
    config = VisionConfig(
        image_size=fields.whole("image_size", default["image"]),
        patch_size=fields.whole("patch_size", default["patch"]),
        width=fields.whole("hidden_size", default["width"]),
        layers=fields.whole("num_hidden_layers", 12),
        heads=fields.whole("num_attention_heads", default["heads"]),
        mlp_width=fields.whole("intermediate_size", 3072),
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
    if not 0 <= config.used_layers <= config.layers:
        raise fields.error(f"has {config.layers} layers, so there is no feature layer {feature_layer}")
    return config


def vision(config, take, prefix):
    """Fill in a Vision from a checkpoint whose tower tensors start with `prefix`."""
    width, kernel = config.width, (3, config.patch_size, config.patch_size)

    def norm(name):
        return LayerNorm(take.vector(f"{name}.weight", size=width), take.vector(f"{name}.bias", size=width))

    def linear(*names, into=width, out=width):
        return Linear(
            take.matrix(*(f"{name}.weight" for name in names), into=into, out=out),
            take.vector(*(f"{name}.bias" for name in names), size=out),
        )

    def layer(index):
        name = f"{prefix}encoder.layers.{index}."
        return VisionLayer(
            attention_norm=norm(f"{name}layer_norm1"),
            qkv=linear(*(f"{name}self_attn.{letter}_proj" for letter in "qkv")),
            output=linear(f"{name}self_attn.out_proj"),
            mlp_norm=norm(f"{name}layer_norm2"),
            up=linear(f"{name}mlp.fc1", out=config.mlp_width),
            down=linear(f"{name}mlp.fc2", into=config.mlp_width),
        )

    if not config.class_token:
        take.skip(f"{prefix}head.")  # SigLIP's pooled vector of the whole image, which no feature depends on
    patch = f"{prefix}embeddings.patch_embedding"
    return Vision(
        config=config,
        patch_embedding=Linear(
            take.matrix(f"{patch}.weight", into=3 * config.patch_size**2, out=width, kernel=kernel),
            None if config.class_token else take.vector(f"{patch}.bias", size=width),
        ),
        class_embedding=take.vector(f"{prefix}embeddings.class_embedding", size=width) if config.class_token else None,
        position_embedding=take.table(
            f"{prefix}embeddings.position_embedding.weight", config.patches + config.class_token, width
        ),
        pre_norm=norm(f"{prefix}pre_layrnorm") if config.pre_norm else None,  # CLIP's own spelling
        layers=take.layers(config.layers, layer),
        post_norm=norm(f"{prefix}post_layernorm"),  # in every file, whether the features are normed or not
    )
