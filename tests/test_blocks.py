"""Blocks of rows: they cover everything, in one piece, on whatever threads."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minivtw.model import blocks
from minivtw.model.blocks import by_rows, row_blocks, side_by_side
from minivtw.model.layers import Linear, gelu_tanh, mlp


@given(st.integers(0, 5000), st.integers(1, 300))
def test_row_blocks_cover_the_rows_in_order(rows, most):
    covered = [row for block in row_blocks(rows, most) for row in range(block.start, block.stop)]
    assert covered == list(range(rows))
    assert all(0 < block.stop - block.start <= most for block in row_blocks(rows, most))


@given(st.integers(1, 12).map(lambda power: 2**power * 48))
def test_cores_share_evenly(rows):
    sizes = {block.stop - block.start for block in row_blocks(rows, blocks.MOST_ROWS)}
    assert len(sizes) == 1


@pytest.fixture
def blas(monkeypatch):
    """Two workers, also on a machine of one core; and the numbers of threads that BLAS is told to use."""
    told = []
    monkeypatch.setattr(blocks, "get_blas_threads", lambda: 7)
    monkeypatch.setattr(blocks, "set_blas_threads", told.append)
    monkeypatch.setattr(blocks, "THREADS", 2)
    with ThreadPoolExecutor(2) as workers:
        monkeypatch.setattr(blocks, "WORKERS", workers)
        yield told


def test_a_block_within_a_block_ends(blas):
    """A feed-forward's block multiplies by blocks again; threads that wait for each other would never end."""
    random = np.random.default_rng(0)
    x, up, down = (random.standard_normal(shape).astype(np.float32) for shape in ((600, 8), (8, 12), (12, 8)))
    arguments = Linear(up), Linear(down), gelu_tanh
    assert np.abs(mlp(x, *arguments) - mlp.__wrapped__(x, *arguments)).max() < 1e-4


def test_threads_of_the_caller_do_not_meet(blas):
    """Two conversations in two threads of one process."""
    random, results = np.random.default_rng(0), {}
    x, weight = (
        random.standard_normal((600, 32)).astype(np.float32),
        random.standard_normal((32, 32)).astype(np.float32),
    )
    square = by_rows(lambda x, weight: x @ weight)

    def many(name):
        results[name] = [np.abs(square(x, weight) - x @ weight).max() for _ in range(50)]

    callers = [threading.Thread(target=many, args=(name,)) for name in "abc"]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert sorted(results) == ["a", "b", "c"] and max(map(max, results.values())) < 1e-4


def test_what_goes_wrong_in_a_block_is_raised_and_blas_has_its_threads_back(blas):
    def fail(rows):
        raise MemoryError

    with pytest.raises(MemoryError):
        side_by_side(fail, row_blocks(1000, 100))
    assert blas == [1, 7]
    assert not blocks.BUSY.locked()
