"""Rows that do not depend on each other are computed in blocks, a core each.

BLAS has threads of its own, but they wait for each other at the end of every product, and the elementwise work between
two products stays on one core. A block instead goes through products and elementwise work alike on the core that began
it, and what it holds on the way is small. NumPy gives up Python's lock while it computes, so plain threads do.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Concatenate, ParamSpec

import numpy as np

from .. import threads

Arguments = ParamSpec("Arguments")
RowFunction = Callable[Concatenate[np.ndarray, Arguments], np.ndarray]
MOST_ROWS = 256  # in a block: enough for a product to run at full speed
LEAST_ROWS = 48  # fewer are not worth a thread of their own


def side_by_side(work: Callable[[slice], object], blocks: Sequence[slice]) -> None:
    """work(block) for every block, on all cores, with one BLAS thread to each."""
    if len(blocks) == 1:
        list(map(work, blocks))
        return
    with threads.alone() as workers_are_free:
        list((threads.WORKERS.map if workers_are_free else map)(work, blocks))


def row_blocks(rows: int, most: int) -> list[slice]:
    """Slices that cover `rows` rows: `most` in each at most, and a block for every core if there are rows enough."""
    fewest = max(-(-rows // most), min(threads.THREADS, rows // LEAST_ROWS), 1)
    step = max(-(-rows // (1 << (fewest - 1).bit_length())), 1)  # into a power of two: cores share evenly
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def by_rows(function: RowFunction[Arguments]) -> RowFunction[Arguments]:
    """Let a function of (rows, in) that treats each row on its own compute the rows of its (rows, out) in blocks."""

    @functools.wraps(function)
    def in_blocks(x: np.ndarray, /, *arguments: Arguments.args, **options: Arguments.kwargs) -> np.ndarray:
        if len(x) < 2 * LEAST_ROWS or (len(x) <= MOST_ROWS and threads.BUSY.locked()):
            return function(x, *arguments, **options)
        out = np.empty((len(x), function(x[:0], *arguments, **options).shape[1]), np.float32)  # no rows tell the width
        work = lambda rows: np.copyto(out[rows], function(x[rows], *arguments, **options))
        side_by_side(work, row_blocks(len(x), MOST_ROWS))
        return out

    return in_blocks
