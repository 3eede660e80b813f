"""The energy that a rank's GPU has taken, where NVML tells: the metric `energy_joules/rank-N`."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from tracking.spool import Spool

INTERVAL_S = 60.0
"""It is told no more often, and when the steps are over."""


class Energy:
    """One rank's, from its beginning on; what others do on the same GPU meanwhile is in it."""

    def __init__(self, spool: Spool, rank: int, read: Callable[[], float] | None) -> None:
        """Begin.

        Args:
            read: returns the joules that the GPU has taken since some moment; None: nobody knows.
        """
        self._spool, self._name, self._read = spool, f"energy_joules/rank-{rank}", read
        self._began = read() if read else 0.0
        self._next = time.monotonic() + INTERVAL_S

    def note(self, step: int, last: bool = False) -> None:
        """Tell the energy after `step`, unless it was told just now."""
        if self._read is not None and (last or time.monotonic() >= self._next):
            self._next = time.monotonic() + INTERVAL_S
            self._spool.append(step, {self._name: self._read() - self._began})


def reader(device: torch.device) -> Callable[[], float] | None:
    """Return what reads a GPU's counter, in joules; None without NVML, or of a GPU that has none (before Volta)."""
    if device.type != "cuda":
        return None
    try:
        pynvml: Any = importlib.import_module("pynvml")
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # it is not installed, has no driver, or the device is a slice (MIG), which has no counter
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000


def spool_of(folder: Path, rank: int) -> Spool:
    """Return where a rank's energy goes; `folder` is the run's spool."""
    return Spool(folder / f"energy-rank-{rank}.jsonl")


def total(joules: Sequence[float]) -> float:
    """Return the sum over all starts of a rank, whose counter begins anew with each. Pure.

    Args:
        joules: as they were told, in order.
    """
    ends = [now for now, after in pairwise([*joules, -1.0]) if after < now]
    return sum(ends)
