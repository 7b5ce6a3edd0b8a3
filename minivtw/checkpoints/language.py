"""A language model alone: the decoder without eyes (transformers `LlamaForCausalLM`, `Qwen2ForCausalLM`)."""

from . import llama
from .llava import chatml
from .parts import Parts


def load(fields, folder, checkpoint):
    """config.json's `Fields`, the folder and its `Checkpoint` -> Parts."""
    config = llama.decoder_config(fields)
    return Parts(decoder=checkpoint.fill(lambda take: llama.decoder(config, take)), chat=chatml, turn_end="<|im_end|>")
