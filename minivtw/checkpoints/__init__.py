"""Published model families, one file each: their config keys, tensor names and prompt. Nothing else knows them."""

from types import ModuleType

from . import idefics3, llama, llava, nanovlm, onevision
from .fields import Fields

# model_type of config.json -> the module whose `load(fields, folder, checkpoint)` fills in the form
FAMILIES: dict[str, ModuleType] = {
    "llava": llava,
    "llava_onevision": onevision,
    "idefics3": idefics3,
    "smolvlm": idefics3,
    "llama": llama,
    "qwen2": llama,
}


def family(fields: Fields) -> ModuleType:
    """The module for a config's `Fields`. nanoVLM's is the one config that does not say whose it is."""
    if fields.has("vit_hidden_dim"):
        return nanovlm
    return FAMILIES[fields.choice("model_type", tuple(FAMILIES))]
