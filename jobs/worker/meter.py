"""What is measured of each step on a rank, and where it goes: to rank 0's spool, the memory to one of each rank's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from jobs.tasks import Batch
from jobs.worker import energy
from jobs.worker.flops import ModelFlops
from jobs.worker.pace import PaceKeeper, own_s
from jobs.worker.peak_memory import PeakMemory
from jobs.worker.step_times import StepTimes, clock
from jobs.worker.torch_internals import listen_to_collectives
from jobs.worker.traffic import Traffic
from tracking.spool import Spool


class Meter:
    """One rank's."""

    def __init__(
        self,
        device: torch.device,
        rank: int,
        spool: Spool | None,
        folder: Path,
        peak_flops: float = math.nan,
        eager: Callable[[], AbstractContextManager[Any]] = nullcontext,
        ranks: int = 1,
        pace: PaceKeeper | None = None,
    ) -> None:
        """Begin.

        Args:
            spool: that of the steps, on rank 0.
            folder: the run's spool.
            peak_flops: what the devices of all ranks can do in a second; NaN where that is not known.
            eager: makes a context in which a model runs as it is written: compiled ones cannot be counted.
            ranks: of all; where there are several, their collectives are timed.
            pace: tells how long this rank works by itself.
        """
        self._spool, self._peak_flops, self._eager = spool, peak_flops, eager
        self._times = StepTimes(clock(device))
        self._memory = PeakMemory(folder, rank, device)
        self._energy_spool = energy.spool_of(folder, rank)
        self._energy = energy.Energy(self._energy_spool, rank, energy.reader(device))
        self._step = 0
        self._pace, self._rows, self._on_gpu = pace, 0, device.type == "cuda"
        self._flops = ModelFlops()
        self._traffic = Traffic()
        self._within = False
        """Whether a part of a step is under way: what is communicated between steps is no part of any."""
        self._forget = listen_to_collectives(self._communicates, self._has_communicated) if ranks > 1 else None

    @property
    def uncounted(self) -> set[str]:
        """Operations for whose sake no FLOPs are told."""
        return self._flops.unknown

    @contextmanager
    def during(self, part: str) -> Iterator[None]:
        """Count what goes on meanwhile as a part of the step, `PART_s`; a profile's trace shows it by that name."""
        with torch.profiler.record_function(part), self._times.during(part), self._traffic.counting():
            self._within = True
            try:
                yield
            finally:
                self._within = False

    @contextmanager
    def forward(self, batch: Batch | None) -> Iterator[None]:
        """Measure a micro-batch's forward pass; tensors (b, …), or None if its rows are no part of the step."""
        if batch is not None:
            self._rows += len(next(iter(batch.values())))
        with self.during("forward"), self._flops.forward(batch), self._as_written():
            yield

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Measure the backward pass behind it."""
        with self.during("backward"), self._flops.backward():
            yield

    def _as_written(self) -> AbstractContextManager[Any]:
        """Return what a pass runs in that may be counted: it is entered once that is known."""
        return self._eager() if self._flops.counting or self._traffic.counts else nullcontext()

    def _communicates(self) -> Any:
        return self._times.mark() if self._within else None

    def _has_communicated(self, begin: Any) -> None:
        if begin is not None:
            self._times.add("communication", begin)

    def rank_flops(self) -> float:
        """Return the model FLOPs of this rank's step, once its passes are done; NaN where they are not known."""
        return self._flops.end_step()

    def end_step(self, step: int, metrics: dict[str, float], flops: float) -> None:
        """Write a step's metrics down, with where its time went if that is known by now, and what memory it took.

        Args:
            metrics: `step_time_s` is among them.
            flops: of all ranks; NaN where they are not known.
        """
        known, traffic = dict(self._times.end(step)), self._traffic.end_step()
        self._memory.note(step)
        self._energy.note(step)
        self._step = step
        self._keep_pace(known, metrics)
        if self._spool is None:
            return
        rates = rates_of(flops, metrics["step_time_s"], self._peak_flops)
        self._spool.append(step, {**metrics, **rates, **traffic, **known.pop(step, {})})
        for earlier, parts in known.items():
            self._spool.append(earlier, parts)

    def _keep_pace(self, known: dict[int, dict[str, float]], metrics: dict[str, float]) -> None:
        rows, self._rows = self._rows, 0
        if self._pace is not None:
            step_s, data_wait_s = metrics["step_time_s"], metrics.get("data_wait_s", 0.0)
            for step, parts in known.items():
                self._pace.note(step, own_s(parts, step_s, data_wait_s, on_gpu=self._on_gpu), step_s, rows)

    def close(self) -> None:
        """Look at memory and energy a last time, and time no more collectives: the steps are over."""
        if self._forget is not None:
            self._forget()
        self._memory.close()
        self._energy.note(self._step, last=True)
        self._energy_spool.close()


def rates_of(flops: float, seconds: float, peak_flops: float) -> dict[str, float]:
    """Return the FLOPs a second of a step, and which part of the devices' peak that is; what is not known is left out.

    Pure.
    """
    rates = {"model_flops_per_second": flops / seconds, "mfu": flops / seconds / peak_flops}
    return {name: rate for name, rate in rates.items() if math.isfinite(rate) and flops > 0}
