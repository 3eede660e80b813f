"""Memory that was freed goes back to the machine: glibc keeps what lies between pieces still in use."""

from __future__ import annotations

import ctypes
import gc


def trim() -> None:
    """Give freed memory back, where the C library can (glibc's malloc_trim); costs milliseconds a GiB."""
    gc.collect()
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if give_back is not None:
        give_back(0)
