"""Machines whose clocks are off: compared once, when a group starts. What they note would be in the wrong order."""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Sequence

from jobs.checkpoint import resume

OFF_S = 2.0
"""The moment is the same on all ranks to within the time that a collective takes to end."""
BEGIN = "the clock of "
"""How what is said begins: the post-mortem page takes it up."""


def said() -> list[str]:
    """Return which machines' clocks are off, a sentence each. Collective."""
    resume.gathered(None)  # from here on all ranks go on at the same moment
    return off(resume.gathered((socket.gethostname(), time.time())))


def off(told: Sequence[tuple[str, float]]) -> list[str]:
    """Compare machines with the lower median of all; of two, the second with the first. Pure.

    Args:
        told: by rank, the name of its machine and what its clock says, in seconds since the epoch.
    """
    clocks = dict(reversed(told))  # of each machine, what its first rank says
    first = told[0][1]
    usual, others = (statistics.median_low(clocks.values()), "the others'") if len(clocks) > 2 else (first, told[0][0])
    return [
        f"{BEGIN}{name} is {abs(at - usual):.0f} s {'ahead of' if at > usual else 'behind'} {_of(others)}: "
        "times in logs and metrics are wrong there"
        for name, at in sorted(clocks.items())
        if abs(at - usual) > OFF_S
    ]


def _of(others: str) -> str:
    return others if others.endswith("'") else f"that of {others}"
