"""Rows that do not depend on each other are computed in blocks, a core each.

BLAS has threads of its own, but they wait for each other at the end of every product, and the elementwise work between
two products stays on one core. A block instead goes through products and elementwise work alike on the core that began
it, and what it holds on the way is small. NumPy gives up Python's lock while it computes, so plain threads do.
"""

import ctypes
import functools
import os
import pathlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Concatenate, ParamSpec

import numpy as np

Arguments = ParamSpec("Arguments")
RowFunction = Callable[Concatenate[np.ndarray, Arguments], np.ndarray]
MOST_ROWS = 256  # in a block: enough for a product to run at full speed
LEAST_ROWS = 48  # fewer are not worth a thread of their own


def blas_function(name: str) -> Any:
    """A function of the OpenBLAS that came with NumPy; None where NumPy has another BLAS."""
    package = pathlib.Path(np.__file__).parent
    for path in [*package.parent.glob("numpy.libs/*openblas*"), *package.glob(".dylibs/*openblas*")]:
        for full_name in (f"scipy_openblas_{name}64_", f"openblas_{name}64_"):
            if function := getattr(ctypes.CDLL(str(path)), full_name, None):
                return function
    return None


get_blas_threads, set_blas_threads = blas_function("get_num_threads"), blas_function("set_num_threads")
THREADS = get_blas_threads() if get_blas_threads else 1  # every core, or OPENBLAS_NUM_THREADS or OMP_NUM_THREADS
WORKERS: ThreadPoolExecutor
BUSY: threading.Lock  # held while the workers work


def prepare() -> None:
    """Workers for this process: a forked one has none of its parent's threads. They start with the first work."""
    global WORKERS, BUSY
    WORKERS = ThreadPoolExecutor(THREADS, initializer=lambda: np.seterr(all="ignore"))  # as in `decoder_layer`
    BUSY = threading.Lock()


prepare()
if hasattr(os, "register_at_fork"):  # all but Windows
    os.register_at_fork(after_in_child=prepare)


def side_by_side(work: Callable[[slice], object], blocks: Sequence[slice]) -> None:
    """work(block) for every block, on all cores, with one BLAS thread to each."""
    if THREADS == 1 or len(blocks) == 1 or not BUSY.acquire(blocking=False):  # busy with this block or another thread
        list(map(work, blocks))
        return
    before = get_blas_threads()
    set_blas_threads(1)
    try:
        list(WORKERS.map(work, blocks))
    finally:
        set_blas_threads(before)
        BUSY.release()


def row_blocks(rows: int, most: int) -> list[slice]:
    """Slices that cover `rows` rows: `most` in each at most, and a block for every core if there are rows enough."""
    fewest = max(-(-rows // most), min(THREADS, rows // LEAST_ROWS), 1)
    step = max(-(-rows // (1 << (fewest - 1).bit_length())), 1)  # into a power of two: cores share evenly
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def by_rows(function: RowFunction[Arguments]) -> RowFunction[Arguments]:
    """Let a function of (rows, in) that treats each row on its own compute the rows of its (rows, out) in blocks."""

    @functools.wraps(function)
    def in_blocks(x: np.ndarray, /, *arguments: Arguments.args, **options: Arguments.kwargs) -> np.ndarray:
        if len(x) < 2 * LEAST_ROWS or BUSY.locked():
            return function(x, *arguments, **options)
        out = np.empty((len(x), function(x[:0], *arguments, **options).shape[1]), np.float32)  # no rows tell the width
        work = lambda rows: np.copyto(out[rows], function(x[rows], *arguments, **options))
        side_by_side(work, row_blocks(len(x), MOST_ROWS))
        return out

    return in_blocks
