"""The most memory that each rank has had so far, told whenever it has grown."""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch

from tracking.spool import Spool

GROWN = 1.01
"""What is less than a hundredth more is not told."""
INTERVAL_S = 1.0
"""It is looked at no more often: a look costs 20 µs on a CPU, and some 100 on a GPU."""


def peak_bytes(device: torch.device) -> int:
    """Return the most memory so far: of a GPU what torch has allocated there, else what the process had resident.

    The latter is VmHWM of proc(5), in which code and the pages of mapped files count too.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resident_peak(own_status())


def resident_peak(status: str) -> int:
    """Return the bytes of VmHWM in the text of /proc/PID/status; 0 where there is none. Pure."""
    return _bytes_of("VmHWM:", status)


def resident(status: str) -> int:
    """Return the bytes of VmRSS in the text of /proc/PID/status; 0 where there is none. Pure."""
    return _bytes_of("VmRSS:", status)


def own_status() -> str:
    """Return the text of /proc/self/status (Linux)."""
    return Path("/proc/self/status").read_text(encoding="ascii", errors="replace")


def _bytes_of(key: str, status: str) -> int:
    lines = (line.split() for line in status.splitlines() if line.startswith(key))
    return next((int(kib) * 1024 for _, kib, _ in lines), 0)


class PeakMemory:
    """One rank's, in a spool of its own: the metric `peak_memory_bytes/rank-N`."""

    def __init__(self, folder: Path, rank: int, device: torch.device) -> None:
        """Begin; `folder` is the run's spool. The first look tells whatever it finds."""
        self._spool = Spool(folder / f"memory-rank-{rank}.jsonl")
        self._name, self._device = f"peak_memory_bytes/rank-{rank}", device
        self._told, self._step, self._next = 0, 0, -math.inf

    def note(self, step: int) -> None:
        """Tell the peak after `step` if it has grown, unless it was looked at just now."""
        self._step = step
        if time.monotonic() >= self._next:
            self._look()

    def close(self) -> None:
        """Look a last time, so that what came since the last look is told too."""
        self._look()
        self._spool.close()

    def _look(self) -> None:
        self._next = time.monotonic() + INTERVAL_S
        peak = peak_bytes(self._device)
        if peak > GROWN * self._told:
            self._told = peak
            self._spool.append(self._step, {self._name: float(peak)})
