"""One part of a parameter in one file: its bytes and no more, moved by plain reads and writes that are looked at.

They go through the kernel's cache, which takes memory that nobody else wants, and gives it back.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import torch


class Failed(OSError):
    """A file of a parameter, not one that is written for others, could not be read or written."""


def write(path: Path, part: torch.Tensor) -> None:
    """Write a tensor (N,) on the CPU.

    Raises:
        Failed: it was not, or not all of it.
    """
    _all_of(path, part, os.O_WRONLY | os.O_CREAT, os.pwrite)


def read(path: Path, part: torch.Tensor) -> None:
    """Fill a tensor (N,) on the CPU.

    Raises:
        Failed: the file cannot be read, or is too short.
    """
    _all_of(path, part, os.O_RDONLY, lambda file, into, start: os.preadv(file, [into], start))


def _all_of(path: Path, part: torch.Tensor, flags: int, move: Callable[[int, memoryview, int], int]) -> None:
    """Move all bytes of a tensor; one call moves 2 GiB at most."""
    memory = memoryview(part.view(torch.uint8).numpy())
    try:
        file = os.open(path, flags, 0o600)
        try:
            done = 0
            while done < len(memory):
                moved = move(file, memory[done:], done)
                if not moved:
                    raise OSError(errno.EIO, f"{done:,} bytes, not the {len(memory):,} of a part of a parameter")
                done += moved
        finally:
            os.close(file)
    except OSError as error:
        raise Failed(error.errno, error.strerror, str(path)) from error
