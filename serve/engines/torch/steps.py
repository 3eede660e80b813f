"""What steps were to the requests of which somebody wants to know: into their `RequestStats`."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from serve.engines.torch.scheduler import Sequence, Step


def note(step: Step, began: float, ended: float) -> None:
    """Note a step in the record of each request that has one."""
    for chunk in step.chunks:
        stats = chunk.sequence.request.stats
        if stats is not None:
            stats.ran(began, ended, chunk.start, chunk.completes)


def note_preempted(waiting: Iterable[Sequence], count: int) -> None:
    """Note that sequences gave their room back: the first `count` of those that wait."""
    for sequence in islice(waiting, count):
        if sequence.request.stats is not None:
            sequence.request.stats.preemptions += 1
