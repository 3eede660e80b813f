"""How much memory a rank takes for a while, beyond what it had before, and how much more there is."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

from cluster import memory
from jobs.plan.memory import FREE
from jobs.worker import heap

INTERVAL_S = 0.001
"""A CPU's memory is looked at so often; what comes and goes in between is missed, and is small."""


def free_bytes(device: torch.device, sharing: float) -> int:
    """Return what this rank may take on top of what it has; a tenth of all memory is left free, as a plan does.

    Args:
        sharing: how many ranks share the node's memory, or the GPU's, and begin to take theirs now.
    """
    if device.type != "cuda":
        found = memory.of_node()
        return int((found.available - FREE * found.total) / sharing)
    free, total = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int((free - FREE * total) / sharing) + cached


def kind(device: torch.device) -> str:
    """Say what computes, and with how much memory, as it matters for what fits."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {torch.cuda.mem_get_info(device)[1] >> 20} MiB"
    return f"CPU, {memory.of_node().total >> 20} MiB"


class Growth:
    """Of one rank, beyond what it had when this was made; what is made once and stays counts each time."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._process = device, psutil.Process()
        self.settle()
        self._before = self._all()

    def held(self) -> int:
        """Return the bytes beyond those at the beginning that are held now, when what is free was given back."""
        if self._device.type != "cuda":
            heap.trim()
        return self.now()

    def now(self) -> int:
        """Return the bytes beyond those at the beginning."""
        return max(0, self._all() - self._before)

    @contextmanager
    def measured(self, found: list[int]) -> Iterator[None]:
        """Append the most bytes beyond those at the beginning that were held meanwhile."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            yield
            found.append(torch.cuda.max_memory_allocated(self._device) - self._before)
            return
        peak, over = [self._all()], threading.Event()
        thread = threading.Thread(target=self._watch, args=(peak, over), name="tandem-growth", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
        found.append(max(0, max(peak[0], self._all()) - self._before))

    def settle(self) -> None:
        """Give what is free back, so that the next one finds it, and forget the peak."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            heap.trim()

    def _all(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device)
        return int(self._process.memory_info().rss)

    def _watch(self, peak: list[int], over: threading.Event) -> None:
        while not over.wait(INTERVAL_S):
            peak[0] = max(peak[0], self._all())
