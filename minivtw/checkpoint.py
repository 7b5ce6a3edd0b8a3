"""Safetensors files to float32 arrays: one file or shards, checked against the config before anything is read.

A family says which tensors it needs by taking them from a `Checkpoint`. The same form is filled in twice: first on the
headers alone, to find everything missing, surplus or misshapen, then on the data.
"""

import json
import pathlib

import numpy as np
from safetensors import SafetensorError, safe_open

from .errors import InputError

# Buffers that older files carry. They are computed from the config, not learned.
BUFFERS = ("rotary_emb.inv_freq", "embeddings.position_ids")


def read_json(folder, name):
    """The object in a JSON file of a model folder. Raises InputError if it is missing or broken."""
    path = pathlib.Path(folder) / name
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object")
    return content


def shard_paths(folder):
    """The safetensors files of a model folder: the one file, or the shards that its index names."""
    folder = pathlib.Path(folder)
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    if (folder / "model.safetensors.index.json").exists():
        index = read_json(folder, "model.safetensors.index.json").get("weight_map")
        names = set(index.values()) if isinstance(index, dict) else {None}
        if any(not isinstance(name, str) or pathlib.Path(name).name != name for name in names):
            raise InputError(f"{folder / 'model.safetensors.index.json'} must map tensor names to files beside it")
        return [folder / name for name in sorted(names)]
    raise InputError(f"{folder} holds neither model.safetensors nor model.safetensors.index.json")


def widen_bfloat16(halves):
    """bfloat16 is the upper half of a float32: put it back there, over sixteen zero bits.

    halves: uint16 of any shape. Returns float32 of the same shape, exactly the same numbers.
    """
    return (halves.astype(np.uint32) << 16).view(np.float32)


class Shard:
    """One safetensors file, memory-mapped."""

    def __init__(self, path):
        self.path = path
        try:
            self.file = safe_open(path, framework="numpy")
            self.names = list(self.file.keys())
            slices = {name: self.file.get_slice(name) for name in self.names}
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror or error}") from error
        except SafetensorError as error:
            raise InputError(f"{path} is not a whole safetensors file: {error}") from error
        self.shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        self.dtypes = {name: part.get_dtype() for name, part in slices.items()}

    def read(self, name):
        """One tensor as float32."""
        if self.dtypes[name] != "BF16":
            return self.file.get_tensor(name).astype(np.float32, copy=False)
        # NumPy has no bfloat16. A file starts with its header's length, 8 bytes, little-endian; then the header.
        with open(self.path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            start, _ = json.loads(file.read(length))[name]["data_offsets"]
        halves = np.memmap(self.path, "<u2", "r", offset=8 + length + start, shape=self.shapes[name])
        return widen_bfloat16(halves)


class Checkpoint:
    """The tensors of a model folder. `fill` builds a model from them; `vector`, `table` and `matrix` hand them out."""

    def __init__(self, folder, low_memory=False):
        self.folder = folder
        self.low_memory = low_memory
        self.shards = {}
        for path in shard_paths(folder):
            shard = Shard(path)
            self.shards.update(dict.fromkeys(shard.names, shard))
        self._checked = False
        self._taken = []
        self._problems = []

    def fill(self, form):
        """form(checkpoint), after every tensor it takes was found, fits, and nothing is left over.

        Raises InputError with all that is wrong in one message.
        """
        form(self)
        surplus = self.shards.keys() - set(self._taken)
        self._problems += [f"surplus {name}" for name in sorted(surplus) if not name.endswith(BUFFERS)]
        if self._problems:
            raise InputError(f"the tensors in {self.folder} do not fit its config: {'; '.join(self._problems)}")
        self._checked = True
        return form(self)

    def __contains__(self, name):
        return name in self.shards

    def skip(self, prefix):
        """Account for tensors that a file may hold although nothing here computes with them."""
        self._taken += [name for name in self.shards if name.startswith(prefix)]

    def _take(self, name, shape):
        """The tensor, float32, once everything is checked; before that, a look at its header and None."""
        if self._checked:
            return self.shards[name].read(name)
        self._taken.append(name)
        if name not in self.shards:
            self._problems.append(f"missing {name} {shape}")
            return None
        shard = self.shards[name]
        if shard.shapes[name] != shape:
            self._problems.append(f"{name} has shape {shard.shapes[name]} where the config says {shape}")
        elif shard.dtypes[name] not in ("F32", "F16", "BF16"):
            self._problems.append(f"{name} is {shard.dtypes[name]}, not float32, float16 or bfloat16")
        return None

    def vector(self, *names, size):
        """Vectors laid end to end; `size`: the length of each, or one length for all. Returns (sum of sizes,)."""
        sizes = size if isinstance(size, tuple) else (size,) * len(names)
        parts = [self._take(name, (length,)) for name, length in zip(names, sizes)]
        return np.concatenate(parts) if self._checked else None

    def table(self, name, rows, width):
        """An embedding table (rows, width), as stored."""
        return self._take(name, (rows, width))

    def matrix(self, *names, into, out, kernel=()):
        """Linear weights, stored (out, in) in PyTorch, side by side as one (in, sum of outs): one product for all.

        `out`: the outputs of each, or one number for all; `kernel`: the stored input axes, where there are several.
        """
        outs = out if isinstance(out, tuple) else (out,) * len(names)
        parts = [self._take(name, (rows, *(kernel or (into,)))) for name, rows in zip(names, outs)]
        if not self._checked:
            return None
        return np.concatenate([part.reshape(len(part), into).T for part in parts], axis=1)

    def layers(self, count, read):
        """The layers read(0) … read(count - 1): a list or, to save memory, read anew at every use."""
        if self._checked and self.low_memory:
            return LayersOnDisk(count, read)
        return [read(index) for index in range(count)]


class LayersOnDisk:
    """A sequence of layers of which none is held: each is widened to float32 when it is asked for."""

    def __init__(self, count, read):
        self._count = count
        self._read = read

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        if not 0 <= index < self._count:
            raise IndexError(index)
        return self._read(index)
