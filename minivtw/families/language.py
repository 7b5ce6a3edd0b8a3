"""A language model alone: the decoder without eyes (transformers `LlamaForCausalLM`, `Qwen2ForCausalLM`)."""

from . import llama
from .llava import chatml
from .model import Model


def load(fields, folder, checkpoint):
    """config.json's `Fields`, the folder and its `Checkpoint` -> Model."""
    config = llama.decoder_config(fields)
    return Model(decoder=checkpoint.fill(lambda take: llama.decoder(config, take)), chat=chatml, end="<|im_end|>")
