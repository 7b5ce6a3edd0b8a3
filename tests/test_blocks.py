"""Blocks of rows: they cover everything, in one piece, on whatever threads."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import minivtw
from minivtw import threads
from minivtw.methods.sharing import mixtures
from minivtw.model import blocks
from minivtw.model.blocks import by_rows, row_blocks, side_by_side
from minivtw.model.cache import KVCache
from minivtw.model.decoder import decoder_layer
from minivtw.model.layers import Linear, gelu_tanh, mlp
from minivtw.model.tokens import arriving
from minivtw.model.weights import DecoderConfig
from minivtw.threads import threads_that_fit
from tests.random_models import random_decoder, random_prompt


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
    monkeypatch.setattr(threads, "get_blas_threads", lambda: told[-1] if told else 7)
    monkeypatch.setattr(threads, "set_blas_threads", told.append)
    monkeypatch.setattr(threads, "THREADS", 2)
    with ThreadPoolExecutor(2) as workers:
        monkeypatch.setattr(threads, "WORKERS", workers)
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
    square = by_rows(lambda x, /, weight: x @ weight)

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
    assert not threads.BUSY.locked()


@pytest.mark.parametrize(
    "running, own, is_shared", [("2/99", "R", True), ("3/99", "R", False), ("5/99", "RRSRR", True)]
)
def test_work_is_shared_only_where_a_core_is_free(blas, monkeypatch, tmp_path, running, own, is_shared):
    """More that want to run than two cores: a thread would wait for its turn, and the others for the thread. Threads of
    this process that have done their work make room."""
    (tmp_path / "loadavg").write_text(f"0.10 0.20 0.30 {running} 99\n", encoding="utf-8")
    for number, state in enumerate(own):
        (tmp_path / "task" / str(number)).mkdir(parents=True)
        (tmp_path / "task" / str(number) / "stat").write_text(f"7 (a name) {state} 1 7\n", encoding="utf-8")
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(threads.pathlib, "Path", lambda path: tmp_path / path.rpartition("/")[2])
    with threads_that_fit(1000, 1000, 1000):
        assert threads.BUSY.locked() is not is_shared
    assert blas == ([] if is_shared else [1, 7]) and not threads.BUSY.locked()


@pytest.mark.parametrize("sizes, is_shared", [((77, 128, 320), False), ((1, 576, 1536), True), ((1, 128, 512), False)])
def test_what_is_too_small_to_be_shared_runs_on_one_thread(blas, monkeypatch, sizes, is_shared):
    """The embedded model's prompt and its head are; a token of SmolVLM-256M reads weights enough for two."""
    monkeypatch.setattr(threads, "is_crowded", lambda: False)
    with threads_that_fit(*sizes):
        side_by_side(lambda rows: None, row_blocks(1000, 100))  # its blocks, too, in the caller
        assert blas == ([1, 7] if is_shared else [1])
    assert blas == [1, 7]


def test_what_a_method_asks_for_wakes_no_other_thread(blas):
    """Small products; a thread of BLAS that has worked spins for a while, and the workers miss a core."""
    mixtures(np.ones((2, 8, 4), np.float32), np.ones((2, 8)), 3)
    assert blas == [1, 7]
    decoder = random_decoder(DecoderConfig(20, 8, 2, 2, 1, 4, 12, 1e-6, 1e4, 20))
    tokens = arriving(random_prompt(decoder, [True, True, False]), KVCache(decoder.config))
    passed = decoder_layer(decoder, 0, tokens.follow([0], [1], np.ones((1, 1), np.float32)))
    assert blas == 2 * [1, 7]
    passed.attention([2])
    assert blas == 3 * [1, 7]


def test_who_leaves_last_gives_blas_its_threads_back(blas):
    with threads.one_blas_thread():
        other = threads.one_blas_thread()
        other.__enter__()
    assert set(blas) == {1}
    other.__exit__(None, None, None)
    assert blas[-1] == 7 and not threads.held


def test_where_linux_does_not_tell_the_machine_is_not_crowded(monkeypatch, tmp_path):
    monkeypatch.setattr(threads.pathlib, "Path", lambda path: tmp_path / "none")
    assert not threads.is_crowded()


def test_the_embedded_model_never_wakes_another_thread(blas, monkeypatch):
    def wake(*arguments):
        raise AssertionError("a worker was given work")

    vlm = minivtw.load()
    image = Image.new("RGB", (64, 64), "red")
    monkeypatch.setattr(threads.WORKERS, "map", wake)
    assert vlm.answer(image, "What color is the star?", max_new_tokens=2).token_ids
    assert set(blas) == {1, 7} and blas[-1] == 7
