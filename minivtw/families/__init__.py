"""Published model families, one file each: their config keys, tensor names and prompt. Nothing else knows them."""

from . import language, llava

# model_type of config.json -> the module whose `load(fields, folder, checkpoint)` fills in the form
FAMILIES = {"llava": llava, "llama": language, "qwen2": language}
