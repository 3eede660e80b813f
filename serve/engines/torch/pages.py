"""Take memory that was allocated and is not written yet, beside the first steps instead of under load.

Otherwise a cache grows for as long as it takes texts to fill it: a replica's memory says little about what it will
need, and one that does not fit ends hours later, in the middle of its streams.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import mmap
import os
import sys
import threading
from collections.abc import Callable, Sequence

import torch

PIECE_BYTES = 8 << 20
"""Taken at a time; between two the engine may have ended."""
POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE of Linux 5.14: pages are there as if they had been written, and what they hold stays."""
LOWEST_PRIORITY = 19
logger = logging.getLogger(__name__)


class PageTaker:
    """A thread of lowest priority that takes the pages of tensors on CPU, one after another."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = [tensor for tensor in tensors if tensor.device.type == "cpu"]
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tandem-pages", daemon=True)

    def start(self) -> None:
        """Begin; where the kernel cannot do it, pages come as they are written."""
        if sys.platform == "linux":
            self._thread.start()

    def stop(self) -> None:
        """End after the piece it is at; blocks until then."""
        self._stopping.set()
        self.wait()

    def wait(self) -> None:
        """Wait until everything is taken, or cannot be."""
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)  # this thread's alone
        try:
            madvise = _madvise()
            for tensor in self._tensors:
                for at, size in pieces(tensor.data_ptr(), tensor.nbytes, mmap.PAGESIZE, PIECE_BYTES):
                    if self._stopping.is_set():
                        return
                    if madvise(at, size, POPULATE_WRITE):
                        code = ctypes.get_errno()
                        raise OSError(code, os.strerror(code))
        except OSError as error:
            level = logging.DEBUG if error.errno == errno.EINVAL else logging.WARNING  # an older kernel; no memory
            logger.log(level, "the cache's memory is taken as it is written: %s", error)


def pieces(address: int, size: int, page: int, piece: int) -> list[tuple[int, int]]:
    """Return (address, bytes) of pieces of whole pages that cover `size` bytes from `address`. Pure."""
    start, end = address // page * page, -(-(address + size) // page) * page
    return [(at, min(piece, end - at)) for at in range(start, end, piece)]


def _madvise() -> Callable[[int, int, int], int]:
    """Return the C library's madvise(address, bytes, advice): 0, or the reason is in errno."""
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return madvise
