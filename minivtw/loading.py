"""From a folder, or a name, to a model."""

import pathlib
import time

from .checkpoints import family
from .checkpoints.checkpoint import Checkpoint
from .checkpoints.fields import Fields
from .checkpoints.files import read_fields
from .checkpoints.hub import embedded_folder, is_name, model_folder, tokenizer_folder
from .checkpoints.tokenizer import load_tokenizer
from .errors import checked_int, reading
from .vlm import VLM


def load(model: str | pathlib.Path | None = None, low_memory: bool = False, max_tiles: int | None = None) -> VLM:
    """A model folder, or a name on the Hugging Face hub -> `VLM`; without one, the embedded model.

    low_memory: hold one layer at a time, read from the files at every use; max_tiles: the most tiles per image (None: the
    model's own limit). Raises InputError for a model that is not there or does not fit.
    """
    started = time.perf_counter()
    with reading("the embedded model" if model is None else model):
        place = embedded_folder() if model is None else model
        folder = model_folder(place)
        fields = read_fields(folder, "config.json")
        vlm = assembled(fields, Checkpoint(folder, low_memory), max_tiles, is_name(place))
    vlm.load_seconds = time.perf_counter() - started
    return vlm


def assembled(fields: Fields, checkpoint: Checkpoint, max_tiles: int | None = None, downloads: bool = False) -> VLM:
    """config.json's `Fields` and the weights -> `VLM`. downloads: whether a tokenizer that they lack may be downloaded."""
    folder = checkpoint.folder
    if max_tiles is not None:
        max_tiles = checked_int(max_tiles, "max-tiles", least=1)
    parts = family(fields).load(fields, folder, checkpoint)
    tokenizer = load_tokenizer(tokenizer_folder(folder, parts.tokenizer, downloads), parts.extra_tokens)
    generation = read_fields(folder, "generation_config.json", optional=True)
    stop_ids = (generation if generation.has("eos_token_id") else fields).ids("eos_token_id")
    turn_end = tokenizer.token_to_id(parts.layout.turn_end or "")
    stop_ids |= set() if turn_end is None else {turn_end}
    return VLM(folder, parts, tokenizer, stop_ids, max_tiles=max_tiles)
