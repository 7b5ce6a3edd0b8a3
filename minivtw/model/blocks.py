"""Rows that do not depend on each other are computed in blocks, one core per block.

BLAS has threads of its own, but they wait for each other at the end of every product, and the elementwise work between
two products stays on one core. A block instead goes through products and elementwise work alike on the core that began
it, and what it holds on the way is small. NumPy gives up Python's lock while it computes, so plain threads suffice.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec

import numpy as np

from .. import threads

Arguments = ParamSpec("Arguments")
MOST_ROWS = 256  # in a block: enough for a product to run at full speed
LEAST_ROWS = 48  # fewer are not worth a thread of their own


def side_by_side(work: Callable[[slice], object], blocks: Sequence[slice]) -> None:
    """work(block) for every block, on all cores, each with one BLAS thread."""
    if len(blocks) == 1:
        list(map(work, blocks))
        return
    with threads.alone() as workers_are_free:
        list((threads.WORKERS.map if workers_are_free else map)(work, blocks))


def row_blocks(rows: int, most: int) -> list[slice]:
    """Slices that cover `rows` rows: at most `most` in each, and a block for every core if there are enough rows."""
    fewest = max(-(-rows // most), min(threads.THREADS, rows // LEAST_ROWS), 1)
    step = max(-(-rows // (1 << (fewest - 1).bit_length())), 1)  # into a power of two: cores share evenly
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def by_rows(function: Callable[Arguments, np.ndarray]) -> Callable[Arguments, np.ndarray]:
    """Let a function that treats each row on its own compute the rows of its (rows, out) in blocks.

    The arguments before the `/` in its signature have a row each, (rows, …).
    """
    kinds = [parameter.kind for parameter in inspect.signature(function).parameters.values()]
    count = kinds.count(inspect.Parameter.POSITIONAL_ONLY)

    @functools.wraps(function)
    def in_blocks(*arguments: Any, **options: Any) -> np.ndarray:
        rows = len(arguments[0])
        if rows < 2 * LEAST_ROWS or (rows <= MOST_ROWS and threads.BUSY.locked()):
            return function(*arguments, **options)
        compute = lambda block: function(*(x[block] for x in arguments[:count]), *arguments[count:], **options)
        out = np.empty((rows, compute(slice(0)).shape[1]), np.float32)  # a call with no rows tells the width
        side_by_side(lambda block: np.copyto(out[block], compute(block)), row_blocks(rows, MOST_ROWS))
        return out

    return in_blocks
