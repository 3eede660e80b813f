"""Memory that was freed goes back to the machine: glibc keeps what lies between pieces still in use.

A process that begins, or writes its model, makes and frees many large pieces once, and what it keeps lies in between:
then each of them is better had from the kernel and given back at once. In the steps the same sizes come again and
again, and memory that was used before is faster than new, which the kernel fills with zeros.
"""

from __future__ import annotations

import ctypes
import gc


def trim() -> None:
    """Give freed memory back, where the C library can (glibc's malloc_trim); costs milliseconds a GiB."""
    gc.collect()
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if give_back is not None:
        give_back(0)


# mallopt(3)
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGE = 4 << 20
VERSION = 2
"""Raise it when the same passes come to take other memory: what was measured before is measured again."""
_LARGEST_KEPT = 32 << 20
"""To what glibc raises the threshold by itself on 64 bits, as larger and larger pieces are freed."""


def lean() -> None:
    """From now on have pieces of 4 MiB or more go back to the machine as soon as they are freed."""
    _set(_MMAP_THRESHOLD, _LARGE)


def fast() -> None:
    """From now on keep pieces below 32 MiB for the next ones, as glibc does once such ones have been freed."""
    _set(_MMAP_THRESHOLD, _LARGEST_KEPT)
    _set(_TRIM_THRESHOLD, 2 * _LARGEST_KEPT)


def _set(parameter: int, value: int) -> None:
    change = getattr(ctypes.CDLL(None), "mallopt", None)
    if change is not None:
        change(parameter, value)
