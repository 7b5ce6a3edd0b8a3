"""Safetensors files to float32 arrays: one file or shards, checked against the config before anything is read.

A family says which tensors it needs by taking them from a `Checkpoint`. The same form is filled in twice: first on the
headers alone, to find everything missing, surplus or misshapen, then on the data.
"""

import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open

from ..errors import InputError, reading
from ..model.layers import LayerNorm, Linear
from .files import file_of, read_fields

# Buffers that older files carry. They are computed from the config, not learned.
BUFFERS = ("rotary_emb.inv_freq", "rotary_embd.inv_freq", "embeddings.position_ids")
INDEX = "model.safetensors.index.json"
MOST_PROBLEMS = 100  # named in one error
PIECE = 1 << 20  # numbers read at a time
# How NumPy reads what a file holds. It has no bfloat16; those are halves of 16 bits, widened below.
STORED: dict[str, np.dtype] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
NOTHING = np.empty((0, 0), np.float32)  # what is handed out while the headers are checked
Model = TypeVar("Model")
Sizes = int | tuple[int, ...]


def shard_paths(folder: pathlib.Path) -> list[pathlib.Path]:
    """The safetensors files of a model folder: the one file, or the shards that its index names."""
    if single := file_of(folder, "model.safetensors"):
        return [single]
    if not (path := file_of(folder, INDEX)):
        raise InputError(f"{folder} holds neither model.safetensors nor {INDEX}")
    names = sorted(set(read_fields(folder, INDEX).section("weight_map").texts().values()))
    if not all(name.isprintable() and pathlib.Path(name).name == name != "" for name in names):
        raise InputError(f"{path} must map tensor names to files beside it")
    paths = {name: file_of(folder, name) for name in names}
    if lost := [name for name, path in paths.items() if path is None]:
        raise InputError(f"{folder} lacks {', '.join(lost)}, which {INDEX} names")
    return [path for path in paths.values() if path]


def widen_bfloat16(halves: np.ndarray) -> np.ndarray:
    """bfloat16 is the upper half of a float32: put it back there, over sixteen zero bits.

    halves: uint16 of any shape. Returns float32 of the same shape, exactly the same numbers.
    """
    return (halves.astype(np.uint32) << 16).view(np.float32)


def available_memory() -> int | None:
    """Bytes that a process can take without swapping, or None where the system does not tell (Linux does)."""
    try:
        lines = pathlib.Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return 1024 * kilobytes["MemAvailable"]


class Shard:
    """One safetensors file: what its header says, and its tensors on request."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        # First the header's length, 8 bytes, little-endian; then the header. The library checks that the data fit it.
        try:
            with reading(path), safe_open(path, framework="numpy") as checked, open(path, "rb") as file:
                self.names = list(checked.keys())
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
        except SafetensorError as error:
            raise InputError(f"{path} is not a whole safetensors file: {error}") from error
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(header[name]["shape"]) for name in self.names}
        self.dtypes: dict[str, str] = {name: header[name]["dtype"] for name in self.names}
        self._starts = {name: 8 + length + header[name]["data_offsets"][0] for name in self.names}

    def pieces(self, name: str) -> Iterator[np.ndarray]:
        """The numbers of one tensor, as stored, a piece at a time: what is mapped would die with a file that is cut off."""
        count, stored = math.prod(self.shapes[name]), STORED[self.dtypes[name]]
        for start in range(0, count, PIECE):
            with reading(self.path):
                size, place = min(PIECE, count - start), self._starts[name] + start * stored.itemsize
                piece = np.fromfile(self.path, stored, size, offset=place)
            if len(piece) < size:
                raise InputError(f"{self.path} ends in {name}: it has become shorter since it was opened")
            yield widen_bfloat16(piece) if self.dtypes[name] == "BF16" else piece

    def read_into(self, name: str, out: np.ndarray) -> None:
        """Widen one tensor into `out`, a float32 array of as many numbers."""
        start, out = 0, out.reshape(-1)  # a view
        for piece in self.pieces(name):
            out[start : start + len(piece)] = piece
            start += len(piece)


class Checkpoint:
    """The tensors of a model folder. `fill` builds a model from them, which takes them by the methods below."""

    def __init__(self, folder: pathlib.Path, low_memory: bool = False) -> None:
        self.folder = folder
        self.low_memory = low_memory
        self.shards: dict[str, Shard] = {}
        for path in shard_paths(folder):
            shard = Shard(path)
            self.shards.update(dict.fromkeys(shard.names, shard))
        self._names: dict[str, str] = {}
        self._checked = False
        self._taken: list[str] = []
        self._problems: list[str] = []

    def fill(self, form: "Callable[[Checkpoint], Model]", names: dict[str, str] | None = None) -> Model:
        """form(checkpoint), after every tensor it takes was found, fits, and nothing is left over.

        names: part of a tensor's name, as the form says it -> what the files say instead. Raises InputError with all
        that is wrong in one message.
        """
        self._names = names or {}
        form(self)
        surplus = self.shards.keys() - set(self._taken)
        problems = self._problems + [f"surplus {name}" for name in sorted(surplus) if not name.endswith(BUFFERS)]
        if problems:
            more = [f"and {len(problems) - MOST_PROBLEMS} more"] if len(problems) > MOST_PROBLEMS else []
            listed = "; ".join(problems[:MOST_PROBLEMS] + more)
            raise InputError(f"the tensors in {self.folder} do not fit its config: {listed}")
        if not self.low_memory:
            self._check_memory()
        self._checked = True
        return form(self)

    @property
    def numbers(self) -> int:
        """How many numbers the taken tensors hold."""
        return sum(math.prod(self.shards[name].shapes[name]) for name in set(self._taken) & self.shards.keys())

    def _check_memory(self) -> None:
        """Raise InputError if the taken tensors, widened, exceed the memory that is free; swapping helps nobody."""
        needed, available = 4 * self.numbers, available_memory()
        if available is not None and needed > available:
            sizes = f"{needed / 1e9:.1f} GB of memory as float32, and {available / 1e9:.1f} GB are free"
            raise InputError(f"{self.folder} takes {sizes}; --low-memory widens one layer at a time instead")

    def damaged(self) -> list[str]:
        """The names of the tensors that hold a number which is not finite. Reads all of the weights."""
        floats = [(name, shard) for name, shard in sorted(self.shards.items()) if shard.dtypes[name] in STORED]
        return [name for name, shard in floats if not all(np.isfinite(piece).all() for piece in shard.pieces(name))]

    def __contains__(self, name: str) -> bool:
        return self._own(name) in self.shards

    def _own(self, name: str) -> str:
        """What the files call a tensor."""
        for part, own in self._names.items():
            name = name.replace(part, own)
        return name

    def skip(self, prefix: str) -> None:
        """Account for tensors that a file may hold although nothing here computes with them."""
        self._taken += [name for name in self.shards if name.startswith(self._own(prefix))]

    def _take(self, *names: str, shapes: Sequence[tuple[int, ...]], out: tuple[int, ...]) -> np.ndarray:
        """The tensors stacked along axis 0 as one float32 array of shape `out`; NOTHING on the first (checking) pass.

        shapes: the shape of each, as the file must have it.
        """
        own_names = map(self._own, names)
        if not self._checked:
            for name, shape in zip(own_names, shapes, strict=True):
                self._look_at(name, shape)
            return NOTHING
        array, start = np.empty(out, np.float32), 0
        for name, shape in zip(own_names, shapes, strict=True):
            self.shards[name].read_into(name, array.reshape(-1)[start : start + math.prod(shape)])
            start += math.prod(shape)
        array.flags.writeable = False  # and so is every view of it: threads may share the weights
        return array

    def _look_at(self, name: str, shape: tuple[int, ...]) -> None:
        """Record that a tensor is taken, and any mismatch with its header."""
        self._taken.append(name)
        if name not in self.shards:
            self._problems.append(f"missing {name} {shape}")
            return
        shard = self.shards[name]
        if shard.shapes[name] not in (shape, (1, *shape)):  # a batch of one holds the same numbers
            self._problems.append(f"{name} has shape {shard.shapes[name]} where the config says {shape}")
        elif shard.dtypes[name] not in STORED:
            self._problems.append(f"{name} is {shard.dtypes[name]}, not float32, float16 or bfloat16")

    def vector(self, *names: str, size: Sizes) -> np.ndarray:
        """Vectors laid end to end; `size`: the length of each, or one length for all. Returns (sum of sizes,)."""
        sizes = size if isinstance(size, tuple) else (size,) * len(names)
        return self._take(*names, shapes=[(length,) for length in sizes], out=(sum(sizes),))

    def table(self, name: str, rows: int, width: int) -> np.ndarray:
        """An embedding table (rows, width), as stored."""
        return self._take(name, shapes=[(rows, width)], out=(rows, width))

    def matrix(self, *names: str, into: Sizes, out: Sizes) -> np.ndarray:
        """Linear weights, stored (out, in) in PyTorch, side by side as one (in, sum of outs): one product for all.

        `into`: the inputs, or the stored axes that they lie on; `out`: the outputs of each, or one number for all.
        """
        axes = into if isinstance(into, tuple) else (into,)
        outs = out if isinstance(out, tuple) else (out,) * len(names)
        return self._take(*names, shapes=[(rows, *axes) for rows in outs], out=(sum(outs), math.prod(axes))).T

    def linear(self, *modules: str, into: Sizes, out: Sizes, bias: bool = True) -> Linear:
        """The weights of one or more modules as `matrix` gives them, and their biases end to end."""
        weight = self.matrix(*(f"{module}.weight" for module in modules), into=into, out=out)
        return Linear(weight, self.vector(*(f"{module}.bias" for module in modules), size=out) if bias else None)

    def norm(self, module: str, size: int) -> LayerNorm:
        """The weight and the bias of a layer norm."""
        return LayerNorm(self.vector(f"{module}.weight", size=size), self.vector(f"{module}.bias", size=size))

    def layers(self, count: int, read: Callable[[int], Any]) -> Sequence[Any]:
        """The layers read(0) … read(count - 1): a list or, to save memory, read anew at every use."""
        if self._checked and self.low_memory:
            return LayersOnDisk(count, read)
        return [read(index) for index in range(count)]


class Headers(Checkpoint):
    """A checkpoint of which the headers alone are read: every tensor is checked, is zero, and takes no memory."""

    def _check_memory(self) -> None:
        pass

    def _take(self, *names: str, shapes: Sequence[tuple[int, ...]], out: tuple[int, ...]) -> np.ndarray:
        if self._checked:
            return np.broadcast_to(np.float32(0), out)
        return super()._take(*names, shapes=shapes, out=out)


class LayersOnDisk(Sequence):
    """A sequence of layers that are widened to float32 at each use; while one computes, a thread reads the next."""

    def __init__(self, count: int, read: Callable[[int], Any]) -> None:
        self._count = count
        self._read = read
        self._ahead: tuple[int, Future] | None = None  # (index, that layer)
        self._process: int | None = None  # whose thread it is: a forked process has none of its parent's

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self._count:
            raise IndexError(index)
        if self._process != os.getpid():
            self._process, self._reader, self._ahead = os.getpid(), ThreadPoolExecutor(1), None
        ahead, following = self._ahead, (index + 1) % self._count  # after the last layer the next token begins anew
        layer = ahead[1].result() if ahead and ahead[0] == index else self._read(index)
        if not ahead or ahead[0] != following:
            self._ahead = following, self._reader.submit(self._read, following)
        return layer
