"""A cache's memory is taken before it is needed, and what it holds stays."""

from __future__ import annotations

import mmap
import sys

import psutil
import pytest
import torch

from serve.engines.torch.kv_cache import LayerShape, PagedCache
from serve.engines.torch.pages import PageTaker, pieces

SIZE = 64 << 20


def rss() -> int:
    return psutil.Process().memory_info().rss


def paged() -> PagedCache:
    return PagedCache([LayerShape(4, 64, 64)], SIZE // (2 * 4 * 32 * 64 * 4), torch.float32, torch.device("cpu"))


def test_pieces_cover_whole_pages() -> None:
    assert pieces(4096, 8192, 4096, 4096) == [(4096, 4096), (8192, 4096)]
    assert pieces(5000, 1, 4096, 1 << 20) == [(4096, 4096)]
    assert pieces(8191, 2, 4096, 1 << 20) == [(4096, 8192)]
    assert pieces(0, 10 * 4096, 4096, 3 * 4096) == [(0, 12288), (12288, 12288), (24576, 12288), (36864, 4096)]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can take pages without writing")
def test_what_was_written_stays_and_the_rest_is_taken() -> None:
    before = rss()
    cache = paged()
    keys, values = cache.tensors
    keys[7] = 3.0
    assert rss() - before < SIZE // 2
    taker = PageTaker(cache.tensors)
    taker.start()
    values[5] = 4.0  # a step beside it
    taker.wait()
    if sys.platform == "linux" and rss() - before < SIZE // 2:
        pytest.skip("this kernel is older than 5.14")
    assert rss() - before > 0.95 * SIZE
    assert bool((keys[7] == 3).all() and (values[5] == 4).all())
    assert float(keys.sum() + values.sum()) == 3 * keys[7].numel() + 4 * values[5].numel()


def test_a_taker_that_is_stopped_or_never_ran_ends() -> None:
    idle = PageTaker([])
    idle.stop()
    taker = PageTaker([torch.zeros(mmap.PAGESIZE), torch.zeros(1, device="meta")])
    taker.start()
    taker.stop()
    taker.wait()
