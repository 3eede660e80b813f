"""What is measured of each step on a rank, and where it goes: to rank 0's spool, the memory to one of each rank's."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

import torch

from jobs.worker.peak_memory import PeakMemory
from jobs.worker.step_times import StepTimes, clock
from tracking.spool import Spool


class Meter:
    """One rank's."""

    def __init__(self, device: torch.device, rank: int, spool: Spool | None, folder: Path) -> None:
        """Begin; `spool` is that of the steps, on rank 0, and `folder` the run's."""
        self._spool = spool
        self._times = StepTimes(clock(device))
        self._memory = PeakMemory(folder, rank, device)

    def during(self, part: str) -> AbstractContextManager[None]:
        """Count what goes on meanwhile as a part of the step, `PART_s`."""
        return self._times.during(part)

    def end_step(self, step: int, metrics: dict[str, float]) -> None:
        """Write a step's metrics down, with where its time went if that is known by now, and what memory it took."""
        known = dict(self._times.end(step))
        self._memory.note(step)
        if self._spool is None:
            return
        self._spool.append(step, {**metrics, **known.pop(step, {})})
        for earlier, parts in known.items():
            self._spool.append(earlier, parts)

    def close(self) -> None:
        """Look at the memory a last time: the steps are over."""
        self._memory.close()
