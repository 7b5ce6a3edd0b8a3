"""Time measured in rounds, everything once a round, so that a busy moment of the machine hits all alike."""

import ctypes
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from ..model.blocks import THREADS, blas_function, row_blocks, side_by_side

Measure = Callable[[], dict[Any, float]]  # seconds, or speeds, by what they are of


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
    """What this machine can do at best: a large product, and a read of memory that no cache holds."""

    def __init__(self) -> None:
        self._square = np.ones((2048, 2048), np.float32)
        self._long = np.ones((1 << 15, 2048), np.float32)  # 256 MB
        self._vector = np.ones(2048, np.float32)

    def __call__(self) -> dict[str, float]:
        """`sgemm` in FLOP/s, `stream` in bytes/s."""
        started = time.perf_counter()
        _ = self._square @ self._square
        multiplied = time.perf_counter()
        side_by_side(lambda rows: self._long[rows] @ self._vector, row_blocks(len(self._long), len(self._long)))
        read = time.perf_counter()
        return {"sgemm": 2 * 2048**3 / (multiplied - started), "stream": self._long.nbytes / (read - multiplied)}


def machine() -> str:
    """The processor, its cores, NumPy, and its BLAS with the kernel that BLAS chose for this processor."""
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    core_name, kernel = blas_function("get_corename"), ""
    if core_name:
        core_name.restype = ctypes.c_char_p
        kernel = f", {core_name().decode()} kernel"
    return (
        f"{processor()}, {os.cpu_count()} cores; "
        f"NumPy {np.__version__}, {blas['name']} {blas['version']}{kernel}, {THREADS} threads"
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
