"""A cache's memory is taken before it is needed, and what it holds stays."""

from __future__ import annotations

import ctypes
import mmap
import sys

import pytest
import torch

from serve.engines.torch.kv_cache import LayerShape, PagedCache
from serve.engines.torch.pages import PageTaker, pieces

SIZE = 64 << 20


def resident(tensor: torch.Tensor) -> int:
    """Return how many of a tensor's bytes are in memory, by whole pages: those of other objects come and go."""
    libc = ctypes.CDLL(None, use_errno=True)
    size = tensor.numel() * tensor.element_size()
    begin = tensor.data_ptr() & ~(mmap.PAGESIZE - 1)
    pages = (tensor.data_ptr() + size - begin + mmap.PAGESIZE - 1) // mmap.PAGESIZE
    found = (ctypes.c_ubyte * pages)()
    assert libc.mincore(ctypes.c_void_p(begin), ctypes.c_size_t(pages * mmap.PAGESIZE), found) == 0
    return sum(page & 1 for page in found) * mmap.PAGESIZE


def held(cache: PagedCache) -> int:
    return sum(map(resident, cache.tensors))


def paged() -> PagedCache:
    return PagedCache([LayerShape(4, 64, 64)], SIZE // (2 * 4 * 32 * 64 * 4), torch.float32, torch.device("cpu"))


def test_pieces_cover_whole_pages() -> None:
    assert pieces(4096, 8192, 4096, 4096) == [(4096, 4096), (8192, 4096)]
    assert pieces(5000, 1, 4096, 1 << 20) == [(4096, 4096)]
    assert pieces(8191, 2, 4096, 1 << 20) == [(4096, 8192)]
    assert pieces(0, 10 * 4096, 4096, 3 * 4096) == [(0, 12288), (12288, 12288), (24576, 12288), (36864, 4096)]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can take pages without writing")
def test_what_was_written_stays_and_the_rest_is_taken() -> None:
    cache = paged()
    keys, values = cache.tensors
    keys[7] = 3.0
    assert held(cache) < SIZE // 2
    taker = PageTaker(cache.tensors)
    taker.start()
    values[5] = 4.0  # a step beside it
    taker.wait()
    if sys.platform == "linux" and held(cache) < SIZE // 2:
        pytest.skip("this kernel is older than 5.14")
    assert held(cache) > 0.95 * SIZE
    assert bool((keys[7] == 3).all() and (values[5] == 4).all())
    assert float(keys.sum() + values.sum()) == 3 * keys[7].numel() + 4 * values[5].numel()


def test_a_taker_that_is_stopped_or_never_ran_ends() -> None:
    idle = PageTaker([])
    idle.stop()
    taker = PageTaker([torch.zeros(mmap.PAGESIZE), torch.zeros(1, device="meta")])
    taker.start()
    taker.stop()
    taker.wait()
