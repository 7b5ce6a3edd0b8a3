"""Llama and Qwen2 decoders: their config keys and tensor names (transformers `LlamaConfig`, `Qwen2Config`).

As a whole model they are language models that see nothing (`LlamaForCausalLM`, `Qwen2ForCausalLM`).
"""

import pathlib

from ..model.weights import MOST_LAYERS, Decoder, DecoderConfig, DecoderLayer
from .checkpoint import Checkpoint
from .fields import Fields
from .layouts import CHATML, folder_layout
from .parts import Parts

# What a config leaves out has its class's default.
DEFAULTS = {
    "llama": dict(vocabulary=32000, mlp_width=11008, positions=2048),
    "qwen2": dict(vocabulary=151936, mlp_width=22016, positions=32768),
}
# What other decoders of this shape may ask for, and is not computed here: the values under which nothing changes.
REFUSED = dict(
    hidden_act="silu", attention_bias=False, mlp_bias=False, use_sliding_window=False, qk_layer_norms=False,
    rope_interleaved=False, use_resampler=False, partial_rotary_factor=1, add_cross_attention=False,
    embedding_multiplier=1, attention_multiplier=None, residual_multiplier=1, logits_scaling=1,
    quantization_config=None,
)  # fmt: skip


def load(fields: Fields, folder: pathlib.Path, checkpoint: Checkpoint) -> Parts:
    """config.json's `Fields`, the folder and its `Checkpoint` -> Parts."""
    config = decoder_config(fields)
    return Parts(checkpoint.fill(lambda take: decoder(config, take)), folder_layout(folder, CHATML))


def decoder_config(fields: Fields) -> DecoderConfig:
    """A text config's `Fields` -> DecoderConfig. Raises InputError for what the decoder does not do."""
    model_type = fields.choice("model_type", tuple(DEFAULTS), "llama")
    default = DEFAULTS[model_type]
    fields.refuse_unless(**REFUSED)
    layers = fields.positive_int("num_hidden_layers", 32, most=MOST_LAYERS)
    fields.refuse_unless(layer_types=["full_attention"] * layers)
    width = fields.positive_int("hidden_size", 4096)
    heads = fields.positive_int("num_attention_heads", 32)
    config = DecoderConfig(
        vocabulary=fields.positive_int("vocab_size", default["vocabulary"]),
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=fields.positive_int("num_key_value_heads", 32 if model_type == "qwen2" else heads),
        head_dim=fields.positive_int("head_dim", width // heads),
        mlp_width=fields.positive_int("intermediate_size", default["mlp_width"]),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope_theta=rope_theta(fields, 10_000.0),
        max_positions=fields.positive_int("max_position_embeddings", default["positions"]),
        qkv_bias=model_type == "qwen2",
        tied_head=fields.boolean("tie_word_embeddings", False),
    )
    if config.heads % config.kv_heads:
        raise fields.error(f"has {config.heads} heads, which {config.kv_heads} key-value heads cannot share evenly")
    if config.head_dim % 2 or not config.head_dim:
        raise fields.error(f"has heads of width {config.head_dim}; rotary positions need an even number")
    return config


def rope_theta(fields: Fields, default: float) -> float:
    """The base of the rotary frequencies: `rope_theta`, or since transformers 5 a part called `rope_parameters`."""
    for key in ("rope_scaling", "rope_parameters"):
        part = fields.section(key, {})
        part.choice("rope_type" if part.has("rope_type") else "type", ("default",), "default")
        part.refuse_unless(partial_rotary_factor=1)
        default = part.number("rope_theta", default)
    return fields.number("rope_theta", default)


def decoder(config: DecoderConfig, take: Checkpoint, prefix: str = "model.", head: str = "lm_head.weight") -> Decoder:
    """Fill in a Decoder from a checkpoint whose decoder tensors start with `prefix`."""
    width, query, key_value = config.width, config.heads * config.head_dim, config.kv_heads * config.head_dim
    sizes = (query, key_value, key_value)

    def layer(index: int) -> DecoderLayer:
        name = f"{prefix}layers.{index}."
        projections = [f"{name}self_attn.{letter}_proj" for letter in "qkv"]
        gate_up = [f"{name}mlp.{part}_proj.weight" for part in ("gate", "up")]
        return DecoderLayer(
            input_norm=take.vector(f"{name}input_layernorm.weight", size=width),
            qkv=take.linear(*projections, into=width, out=sizes, bias=config.qkv_bias),
            output=take.matrix(f"{name}self_attn.o_proj.weight", into=query, out=width),
            mlp_norm=take.vector(f"{name}post_attention_layernorm.weight", size=width),
            gate_up=take.matrix(*gate_up, into=width, out=config.mlp_width),
            down=take.matrix(f"{name}mlp.down_proj.weight", into=config.mlp_width, out=width),
        )

    embedding = f"{prefix}embed_tokens.weight"
    # Some files of tied models store the head all the same, and then it counts; some of nanoVLM's store it alone.
    tied = config.tied_head and (head not in take or embedding not in take)
    return Decoder(
        config=config,
        embedding=take.table(head if tied and head in take else embedding, config.vocabulary, width),
        layers=take.layers(config.layers, layer),
        norm=take.vector(f"{prefix}norm.weight", size=width),
        head=None if tied else take.matrix(head, into=width, out=config.vocabulary),
    )
