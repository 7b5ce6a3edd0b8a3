"""How many threads compute: BLAS's own, or workers with one BLAS thread each, or one thread alone."""

import contextlib
import ctypes
import os
import pathlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import numpy as np


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
HOLDING: threading.Lock  # for `held`
held: list[int]  # how many threads BLAS had, once for each of those who hold it to one


def prepare() -> None:
    """Workers for this process: a forked one has none of its parent's threads. They start with the first work."""
    global WORKERS, BUSY, HOLDING, held
    WORKERS = ThreadPoolExecutor(THREADS, initializer=lambda: np.seterr(all="ignore"))  # as in `decoder_layer`
    BUSY, HOLDING, held = threading.Lock(), threading.Lock(), []


prepare()
if hasattr(os, "register_at_fork"):  # all but Windows
    os.register_at_fork(after_in_child=prepare)


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """One thread for BLAS: the others, once a product has woken them, spin for a while and keep workers from a core."""
    if THREADS == 1:
        yield
        return
    with HOLDING:
        held.append(held[0] if held else get_blas_threads())
        set_blas_threads(1)
    try:
        yield
    finally:
        with HOLDING:
            before = held.pop()
            if not held:
                set_blas_threads(before)


@contextlib.contextmanager
def alone() -> Iterator[bool]:
    """One thread for BLAS, and the workers for the caller alone. False: somebody has them already, perhaps the caller."""
    if THREADS == 1 or not BUSY.acquire(blocking=False):
        yield False
        return
    try:
        with one_blas_thread():
            yield True
    finally:
        BUSY.release()


def threads_that_fit(rows: int, into: int, out: int) -> AbstractContextManager[object]:
    """One thread for a layer whose largest product is too small to share, or if no core is free: waiting takes longer.

    With fewer than about 11 rows, a product takes as long as its weights take to be read.
    """
    is_small = max(rows, 11) * into * out < 1 << 23  # multiplications: about a tenth of a millisecond of a core
    return alone() if THREADS > 1 and (is_small or is_crowded()) else contextlib.nullcontext()


def is_crowded() -> bool:
    """Whether more threads want to run than there are cores, this process's own aside, where Linux tells it."""
    cores = os.cpu_count() or 1
    try:
        running = int(pathlib.Path("/proc/loadavg").read_text(encoding="utf-8").split()[3].partition("/")[0])
        if running <= cores:
            return False
        # A BLAS's threads, ours or another's, go on running for a while after their work: they make room.
        stats = [path.read_text(encoding="utf-8") for path in pathlib.Path("/proc/self/task").glob("*/stat")]
    except OSError:  # not Linux, or a thread that has just ended
        return False
    own = sum(stat.rpartition(")")[2].split()[0] == "R" for stat in stats)
    return running - max(own - 1, 0) > cores
