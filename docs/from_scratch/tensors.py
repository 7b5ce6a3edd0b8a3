"""The safetensors format in plain Python: a header's length, the header, the numbers. It holds no code, so nothing in it runs.

    8 bytes      the length of the header, little-endian
    the header   JSON: name -> dtype, shape, data_offsets [first, stop] after the header; __metadata__ -> texts
    the rest     the numbers, little-endian, row after row, with no byte between two tensors or after the last

As much of the `safetensors` library as the package calls. tests/test_from_scratch.py compares the two.
"""

import json
import math
import os
import pathlib
from typing import Any

import numpy as np

KINDS = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "u1",
    "BOOL": "?",
    "BF16": "<u2",
}  # fmt: skip  bfloat16 as its 16 bits
MOST_HEADER = 100_000_000  # bytes


class SafetensorError(Exception):
    """A file that is not whole, or not of this format."""


def header_of(data: bytes, size: int) -> tuple[dict[str, Any], int]:
    """The header and where the numbers begin. data: a file from its start; size: of the whole file.

    Raises SafetensorError unless the tensors lie one after the other and fill the file to its last byte.
    """
    length = int.from_bytes(data[:8], "little")
    start = 8 + length
    if len(data) < 8 or length > MOST_HEADER or start > size:
        raise SafetensorError("the file ends in its header")
    try:
        header = json.loads(data[8:start].decode())
        tensors = {name: header[name] for name in header if name != "__metadata__"}
        place = 0
        for first, stop, kind, shape in sorted(
            (*one["data_offsets"], one["dtype"], one["shape"]) for one in tensors.values()
        ):
            if first != place or stop - first != math.prod(shape) * np.dtype(KINDS[kind]).itemsize:
                raise ValueError("a tensor does not fill its place")
            place = stop
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SafetensorError(f"the header is wrong: {error}") from error
    if start + place != size:
        raise SafetensorError("the file is longer or shorter than its header says")
    return tensors, start


def load(data: bytes) -> dict[str, np.ndarray]:
    """Name -> array."""
    tensors, start = header_of(data, len(data))
    arrays = {}
    for name, one in tensors.items():
        first = start + one["data_offsets"][0]
        flat = np.frombuffer(data, KINDS[one["dtype"]], math.prod(one["shape"]), first)
        arrays[name] = flat.reshape(one["shape"]).copy()
    return arrays


def load_file(path: str | os.PathLike) -> dict[str, np.ndarray]:
    return load(pathlib.Path(path).read_bytes())


def save(tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> bytes:
    """A file of arrays: the widest numbers first, so that each begins at a multiple of its size."""
    names = {np.dtype(kind): name for name, kind in reversed(KINDS.items())}
    ordered = sorted(tensors.items(), key=lambda pair: (-pair[1].itemsize, pair[0]))
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    place = 0
    for name, array in ordered:
        offsets = [place, place := place + array.nbytes]
        header[name] = {"dtype": names[array.dtype], "shape": list(array.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *(array.tobytes() for _, array in ordered)])


def save_file(tensors: dict[str, np.ndarray], path: str | os.PathLike, metadata: dict[str, str] | None = None) -> None:
    pathlib.Path(path).write_bytes(save(tensors, metadata))


class safe_open:
    """A file whose header has been read: `keys` are the names of its tensors."""

    def __init__(self, path: str | os.PathLike, framework: str = "numpy") -> None:
        with open(path, "rb") as file:
            length = file.read(8)
            rest = file.read(min(int.from_bytes(length, "little"), MOST_HEADER))
        self._tensors, _ = header_of(length + rest, os.path.getsize(path))

    def __enter__(self) -> "safe_open":
        return self

    def __exit__(self, *error: object) -> None: ...

    def keys(self) -> list[str]:
        return list(self._tensors)
