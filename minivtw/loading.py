"""From a folder, or a name, to a model."""

import pathlib
import time

from .checkpoints import family
from .checkpoints.checkpoint import Checkpoint
from .checkpoints.fields import Fields
from .checkpoints.files import file_of, read_json
from .checkpoints.hub import embedded_folder, is_name, model_folder, tokenizer_folder
from .checkpoints.tokenizer import load_tokenizer
from .errors import reading, whole
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
        vlm = assembled(folder, config_of(folder), Checkpoint(folder, low_memory), max_tiles, is_name(place))
    vlm.load_seconds = time.perf_counter() - started
    return vlm


def config_of(folder: pathlib.Path) -> Fields:
    """The fields of a model folder's config.json."""
    return Fields(read_json(folder, "config.json"), f"{folder}/config.json")


def assembled(
    folder: pathlib.Path, fields: Fields, checkpoint: Checkpoint, max_tiles: int | None = None, downloads: bool = False
) -> VLM:
    """A folder's config and weights -> `VLM`. downloads: whether a tokenizer that the folder lacks may be downloaded."""
    if max_tiles is not None:
        max_tiles = whole(max_tiles, "max-tiles", least=1)
    parts = family(fields).load(fields, folder, checkpoint)
    tokenizer = load_tokenizer(tokenizer_folder(folder, parts.tokenizer, downloads), parts.extra_tokens)
    turn_end, stop_ids = tokenizer.token_to_id(parts.layout.turn_end or ""), end_tokens(folder, fields)
    stop_ids |= set() if turn_end is None else {turn_end}
    return VLM(folder, parts, tokenizer, stop_ids, max_tiles=max_tiles)


def end_tokens(folder: pathlib.Path, fields: Fields) -> frozenset[int]:
    """The token ids that end an answer, from generation_config.json or else config.json."""
    if file_of(folder, "generation_config.json"):
        generation = Fields(read_json(folder, "generation_config.json"), f"{folder}/generation_config.json")
        if generation.has("eos_token_id"):
            return generation.ids("eos_token_id")
    return fields.ids("eos_token_id")
