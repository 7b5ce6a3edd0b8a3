"""A language model alone: the decoder alone (transformers `LlamaForCausalLM`, `Qwen2ForCausalLM`)."""

import pathlib

from . import llama
from .checkpoint import Checkpoint
from .fields import Fields
from .layouts import CHATML, folder_layout
from .parts import Parts


def load(fields: Fields, folder: pathlib.Path, checkpoint: Checkpoint) -> Parts:
    """config.json's `Fields`, the folder and its `Checkpoint` -> Parts."""
    config = llama.decoder_config(fields)
    decoder = checkpoint.fill(lambda take: llama.decoder(config, take))
    return Parts(decoder=decoder, layout=folder_layout(folder, CHATML))
