"""A file of what the layers keep of an image, as `Seen.save` writes it: safetensors, checked against the model when read."""

import json
import os
import pathlib
from typing import Any

import numpy as np
import safetensors.numpy

from .checkpoints.fields import MOST, Fields
from .checkpoints.stored import fingerprint
from .counting import cache_bytes
from .errors import InputError, reading
from .inputs.prompts import Tiled
from .inputs.writing import write_whole
from .methods.shelf import method_of
from .methods.text import check, spec_of
from .model.cache import KVCache
from .model.tokens import LayerCount

SAVED = "minivtw.seen"  # where a file's metadata say what was seen


def save(seen: Any, path: str | os.PathLike) -> None:
    """Write a `Seen`, whole or not at all. Raises InputError."""
    text, tensors = spec_of(seen.method), {"token_ids": seen.token_ids, "ran": np.array(seen.ran, np.int64)}
    try:
        method_of(text, files=False) if text else None
    except InputError as error:
        raise InputError(f"the method {text} is your own; of an image seen under it no file is written") from error
    for index, layer in enumerate(seen.cache.layers):
        tensors |= {f"layers.{index}.{name}": getattr(layer, name) for name in ("keys", "values", "positions")}
    about: dict[str, Any] = {"model": fingerprint(seen.vlm.folder), "tiles": seen.tiles_sha256, "method": text}
    about |= {"system": seen.system, "expansions": seen.tiled.expansions, "sizes": seen.tiled.sizes}
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    write_whole(path, safetensors.numpy.save(contiguous, {SAVED: json.dumps(about)}))


def load(vlm: Any, path: str | os.PathLike, probe: str) -> dict[str, Any]:
    """The attributes of a `Seen`, checked against the model before any of it is used; probe: any question.

    Raises InputError for another model's file, and for whatever `Seen.save` would not have written.
    """
    about, tensors = contents(path, cache_bytes(vlm.config, [vlm.config.max_positions] * vlm.config.layers))
    if about.text("model") != fingerprint(vlm.folder):
        raise about.error(f"was not written with the model {vlm.folder}")
    config, expansions, system, text = (
        vlm.config,
        about.raw("expansions"),
        about.text("system", None),
        about.text("method", None),
    )
    sizes = about.pairs("sizes", 1000, MOST)  # (height, width) of each image
    if not isinstance(expansions, list) or [type(one) for one in expansions] != [str] * len(sizes):
        raise about.error("must say for each image the text that stands for it")
    tiled, digest, cache = Tiled(None, expansions, sizes), about.text("tiles"), KVCache(config)
    try:
        method = check(None if text is None else method_of(text, files=False), config.layers)
        prompt = vlm.prepare(tiled, probe, system=system)
        end = int(np.flatnonzero(prompt.is_visual)[-1:].sum()) + 1
        cache.claim(end)
    except InputError as error:
        raise about.error(f"cannot be used: {error}") from error
    token_ids, is_visual = prompt.token_ids[:end], prompt.is_visual[:end]

    def tensor(name: str, dtype: Any, *shape: int) -> np.ndarray:
        found = tensors.pop(name, None)
        if found is None or (found.dtype, found.shape) != (dtype, shape) or not np.isfinite(found).all():
            raise about.error(f"does not hold {name} as finite {np.dtype(dtype)}, of shape {shape}")
        return found

    if not np.array_equal(tensor("token_ids", np.int64, end), token_ids):
        raise about.error("holds other tokens than the model's tokenizer makes")
    ran = tensor("ran", np.int64, config.layers, 4)
    for index, layer in enumerate(cache.layers):
        count = tensors.get(f"layers.{index}.positions", np.empty(0)).size
        positions = tensor(f"layers.{index}.positions", np.int64, count)
        size = config.kv_heads, count, config.head_dim
        keys, values = (tensor(f"layers.{index}.{name}", np.float32, *size) for name in ("keys", "values"))
        entered, worked, cached, extra = ran[index].tolist()
        if (np.diff(positions, prepend=-1, append=end) <= 0).any():
            raise about.error(f"holds positions of layer {index} that do not ascend within the prompt")
        if not entered == cached == count >= worked >= 0 <= extra:
            raise about.error(f"does not count what layer {index} did")
        layer.append(keys, values, positions)
    if tensors:
        raise about.error(f"holds tensors that nobody needs, such as {min(tensors)[:80]}")
    counts = [LayerCount(*one) for one in ran.tolist()]
    return dict(
        method=method, system=system, token_ids=token_ids, is_visual=is_visual, tiled=tiled, tiles_sha256=digest,
        cache=cache, ran=counts,
    )  # fmt: skip


def contents(path: str | os.PathLike, most_bytes: int) -> tuple[Fields, dict[str, np.ndarray]]:
    """What a file says of itself, and its tensors by name. Raises InputError for what `Seen.save` has not written."""
    with reading(path):
        size, most = os.stat(path).st_size, 2 * most_bytes + MOST  # a position takes no more than its keys and values
        if not os.path.isfile(path) or size > most:
            raise InputError(f"{path} is not a file of at most {most / 1e6:,.0f} MB, all that an image takes")
        data = pathlib.Path(path).read_bytes()
    try:
        tensors = safetensors.numpy.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        about = json.loads(header["__metadata__"][SAVED])
    except (safetensors.SafetensorError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is not what `Seen.save` writes: {type(error).__name__}: {error}") from error
    if not isinstance(about, dict):
        raise InputError(f"{path} is not what `Seen.save` writes: it says nothing of the image")
    return Fields(about, str(path)), tensors
