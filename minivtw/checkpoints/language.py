"""A language model alone: the decoder without eyes (transformers `LlamaForCausalLM`, `Qwen2ForCausalLM`)."""

from . import llama
from .layouts import CHATML, folder_layout
from .parts import Parts


def load(fields, folder, checkpoint):
    """config.json's `Fields`, the folder and its `Checkpoint` -> Parts."""
    config = llama.decoder_config(fields)
    decoder = checkpoint.fill(lambda take: llama.decoder(config, take))
    return Parts(decoder=decoder, layout=folder_layout(folder, CHATML))
