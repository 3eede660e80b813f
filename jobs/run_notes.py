"""What the processes of a job tell each other in the run's folder (jobs/run_folder.py), beside plans and data. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Attempt:
    """One start of the worker group, as its first rank notes it."""

    name: str
    workers: int
    micro_batch: int
    training: bool = False
    """False while it is being set up."""
    nodes: tuple[str, ...] = ()
    """Id of each rank's node."""
    pids: tuple[int, ...] = ()
    """Process id of each rank, on its node."""
    oom_kills: tuple[int, ...] = ()
    """How often each rank's node had killed a process for memory until then."""


@dataclass(frozen=True)
class Saves:
    """How saving checkpoints went in this attempt at the job, over all starts of its group."""

    saved: int = 0
    failed: int = 0
    error: str | None = None
    """Why the last one could not be saved; None: it was."""

    def and_one(self, error: str | None) -> Saves:
        """Return the same after one more."""
        return Saves(self.saved + (error is None), self.failed + (error is not None), error)


@dataclass(frozen=True)
class Control:
    """What failures have changed about a run; its workers read it when they start."""

    skip: tuple[int, ...] = ()
    """Steps (from 0) whose batch is left out."""
    micro_batch: int | None = None
    """Rows per forward pass, where the spec's did not fit the memory."""
    excluded: tuple[str, ...] = ()
    """Ids of nodes that get no worker any more."""
