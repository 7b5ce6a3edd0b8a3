"""Llama and Qwen2 decoders: their config keys and tensor names (transformers `LlamaConfig`, `Qwen2Config`)."""

from ..model.decoder import Decoder, DecoderConfig, DecoderLayer
from ..model.layers import Linear

# What a config leaves out has its class's default.
DEFAULTS = {
    "llama": dict(vocabulary=32000, mlp_width=11008, positions=2048),
    "qwen2": dict(vocabulary=151936, mlp_width=22016, positions=32768),
}


def decoder_config(fields):
    """A text config's `Fields` -> DecoderConfig. Raises InputError for what the decoder does not do."""
    model_type = fields.choice("model_type", tuple(DEFAULTS), "llama")
    default = DEFAULTS[model_type]
    fields.choice("hidden_act", ("silu",), "silu")
    for key in ("attention_bias", "mlp_bias", "use_sliding_window"):
        fields.choice(key, (False,), False)
    width = fields.whole("hidden_size", 4096)
    heads = fields.whole("num_attention_heads", 32)
    kv_heads = fields.whole("num_key_value_heads", 32 if model_type == "qwen2" else heads)
    head_dim = fields.whole("head_dim", width // heads)
    if heads % kv_heads:
        raise fields.error(f"has {heads} attention heads, which {kv_heads} key-value heads cannot share evenly")
    if head_dim % 2:
        raise fields.error(f"has heads of width {head_dim}; rotary positions need an even number")
    return DecoderConfig(
        vocabulary=fields.whole("vocab_size", default["vocabulary"]),
        width=width,
        layers=fields.whole("num_hidden_layers", 32),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_width=fields.whole("intermediate_size", default["mlp_width"]),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope_theta=rope_theta(fields, 10_000.0),
        max_positions=fields.whole("max_position_embeddings", default["positions"]),
        qkv_bias=model_type == "qwen2",
        tied_head=fields.flag("tie_word_embeddings", False),
    )


def rope_theta(fields, default):
    """The base of the rotary frequencies: `rope_theta`, or since transformers 5 a part called `rope_parameters`."""
    for key in ("rope_scaling", "rope_parameters"):
        part = fields.part(key, {})
        part.choice("rope_type" if part.has("rope_type") else "type", ("default",), "default")
        default = part.number("rope_theta", default)
    return fields.number("rope_theta", default)


def decoder(config, take, prefix="model.", head="lm_head.weight"):
    """Fill in a Decoder from a checkpoint whose decoder tensors start with `prefix`."""
    width, query, key_value = config.width, config.heads * config.head_dim, config.kv_heads * config.head_dim
    sizes = (query, key_value, key_value)

    def layer(index):
        name = f"{prefix}layers.{index}."
        projections = [f"{name}self_attn.{letter}_proj" for letter in "qkv"]
        gate_up = [f"{name}mlp.{part}_proj.weight" for part in ("gate", "up")]
        bias = take.vector(*(f"{p}.bias" for p in projections), size=sizes) if config.qkv_bias else None
        return DecoderLayer(
            input_norm=take.vector(f"{name}input_layernorm.weight", size=width),
            qkv=Linear(take.matrix(*(f"{p}.weight" for p in projections), into=width, out=sizes), bias),
            output=take.matrix(f"{name}self_attn.o_proj.weight", into=query, out=width),
            mlp_norm=take.vector(f"{name}post_attention_layernorm.weight", size=width),
            gate_up=take.matrix(*gate_up, into=width, out=config.mlp_width),
            down=take.matrix(f"{name}mlp.down_proj.weight", into=config.mlp_width, out=width),
        )

    # Some files of tied models store the head all the same; then it is the one that counts.
    tied = config.tied_head and head not in take
    return Decoder(
        config=config,
        embedding=take.table(f"{prefix}embed_tokens.weight", config.vocabulary, width),
        layers=take.layers(config.layers, layer),
        norm=take.vector(f"{prefix}norm.weight", size=width),
        head=None if tied else take.matrix(head, into=width, out=config.vocabulary),
    )
