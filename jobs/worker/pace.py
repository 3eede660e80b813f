"""A rank's own time per step: what it works, without what it waits for other ranks. No rank asks another for it.

Ranks wait for each other in every step, so a step takes equally long on all of them, however slow one is. What differs:

    on a CPU    the step less what the rank spent in collectives, in which it waits for the others
    on a GPU    the forward passes and the wait for data: at ZeRO stages 0 to 2 no collective is in them. At stage 3 the
                weights are gathered within them, which waits for the slowest: there nothing is told

So on a GPU a rank that is slow in the backward pass or the optimizer alone is not seen; one whose device or host is
slow as a whole is. A link that is slow is nobody's own time, and is not seen either.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

from jobs.checkpoint import resume
from jobs.paces import Pace, Paces
from jobs.run_folder import RunFolder

Clock = Callable[[], float]
"""Returns seconds."""
WINDOW_S = 5.0
"""So often at most a rank tells."""
FEWEST_STEPS = 5
"""An average of fewer says little."""


def own_s(parts: Mapping[str, float], step_time_s: float, data_wait_s: float, *, on_gpu: bool) -> float:
    """Return the seconds of a step in which a rank waited for no other. Pure.

    Args:
        parts: seconds of the step's parts, `forward_s`, `communication_s`, … (jobs/worker/step_times.py).
        step_time_s: of the whole step, the wait for data included.
    """
    if on_gpu:
        return parts.get("forward_s", 0.0) + data_wait_s
    return max(0.0, step_time_s - parts.get("communication_s", 0.0))


def keeper(folder: RunFolder, rank: int, ranks: int, *, on_gpu: bool, zero_stage: int) -> PaceKeeper | None:
    """Return what keeps a rank's pace; None where there is nobody to compare it with, or nothing to compare."""
    import ray

    if ranks < 2 or (on_gpu and zero_stage == 3) or not ray.is_initialized():
        return None
    return PaceKeeper(folder.paces, resume.attempt_name(), rank, ray.get_runtime_context().get_node_id())


class PaceKeeper:
    """Collects one rank's steps, and tells their averages every WINDOW_S."""

    def __init__(
        self,
        paces: Paces,
        attempt: str,
        rank: int,
        node: str,
        window_s: float = WINDOW_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin; `node` is the id of the rank's node, `clock` returns seconds."""
        self._paces, self._attempt, self._rank, self._node = paces, attempt, rank, node
        self._window_s, self._windows, self._clock, self._since = window_s, 0, clock, clock()
        self._steps: list[tuple[float, float, float]] = []

    def note(self, step: int, own_s: float, step_s: float, rows: int) -> None:
        """Take a step; at the end of a window, tell it. A storage that does not take it costs the window."""
        self._steps.append((own_s, step_s, float(rows)))
        now = self._clock()
        if len(self._steps) < FEWEST_STEPS or now - self._since < self._window_s:
            return
        own, whole, done = (statistics.fmean(column) for column in zip(*self._steps, strict=True))
        self._windows, self._since, self._steps = self._windows + 1, now, []
        with suppress(OSError):
            self._paces.write(self._attempt, self._rank, Pace(self._node, self._windows, step, own, whole, done))
