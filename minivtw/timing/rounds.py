"""Time measured in rounds, everything once a round, so that a busy moment of the machine hits all alike."""

import ctypes
import functools
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from ..errors import counted
from ..model.blocks import row_blocks, side_by_side
from ..threads import THREADS, blas_function

Measure = Callable[[], dict[Any, float]]  # seconds, or speeds, by what they are of
Way = Callable[[], object]  # to do something


def rounds(measures: list[Measure], count: int) -> dict[Any, list[float]]:
    """Call each measure once per round, after one round that only warms up. Returns what each name measured, in order."""
    taken: dict[Any, list[float]] = {}
    for turn in range(count + 1):
        for measure in measures:
            for name, value in measure().items():
                if turn:
                    taken.setdefault(name, []).append(value)
    return taken


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """(first quartile, median, third quartile)."""
    if len(values) == 1:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


class Ceilings:
    """What this machine can do at best: a large product, and a read of memory that no cache holds.

    Each is done in several ways, with BLAS's threads and with ours: which is fastest depends on the machine, and a ceiling
    is what none of them exceeds.
    """

    def __init__(self, side: int = 2048, rows: int = 1 << 15) -> None:
        square, long = np.ones((side, side), np.float32), np.ones((rows, 2048), np.float32)  # 256 MB
        vector, each_core = np.ones(2048, np.float32), functools.partial(row_blocks, most=max(side, rows))
        self.work = 2 * side**3, long.nbytes
        self.products: list[Way] = [
            lambda: square @ square,
            lambda: side_by_side(lambda rows: square[rows] @ square, each_core(side)),
        ]
        self.reads: list[Way] = [
            lambda: long @ vector,
            lambda: side_by_side(lambda rows: long[rows] @ vector, each_core(rows)),
            lambda: side_by_side(lambda rows: long[rows] @ vector, row_blocks(rows, 1024)),
            lambda: side_by_side(lambda rows: np.max(long[rows]), each_core(rows)),
        ]

    def __call__(self) -> dict[str, float]:
        """`sgemm` in FLOP/s, `stream` in bytes/s."""
        flops, read_bytes = self.work
        return {"sgemm": flops / fastest(self.products), "stream": read_bytes / fastest(self.reads)}


def fastest(ways: Iterable[Way]) -> float:
    """Seconds of the fastest of several ways to do one thing."""
    taken = []
    for way in ways:
        started = time.perf_counter()
        way()
        taken.append(time.perf_counter() - started)
    return min(taken)


def machine() -> str:
    """The processor, its cores, NumPy, and its BLAS with the kernel that BLAS chose for this processor."""
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    core_name, kernel = blas_function("get_corename"), ""
    if core_name:
        core_name.restype = ctypes.c_char_p
        kernel = f", {core_name().decode()} kernel"
    return (
        f"{processor()}, {counted(os.cpu_count() or 1, 'core')}; "
        f"NumPy {np.__version__}, {blas['name']} {blas['version']}{kernel}, {counted(THREADS, 'thread')}"
    )


def processor() -> str:
    """The processor's name, as Linux tells it, or what Python knows."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def load_average() -> float | None:
    """How many jobs the machine had on average in the last minute; None where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
