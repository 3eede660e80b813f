"""Whether a checkpoint is written from a copy, so that no step waits for the disk, or from the state itself.

A copy of a rank's part takes 12 bytes a trained parameter over the ranks. Where a machine has no room for the copies of
its ranks, all ranks write from the state, which must not change meanwhile: the next update waits.
"""

from __future__ import annotations

import socket
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from cluster import memory
from jobs.worker.peak_memory import own_status, resident, resident_peak

SPARE_PERCENT = 6
"""So much of a machine's memory stays free: Ray ends workers when less than 5 % of it are left."""
ALWAYS = 64 << 20
"""Copies of no more bytes on a machine are made whatever is left."""


@dataclass(frozen=True)
class Room:
    """What one rank knows of its machine when it is to save, in bytes."""

    node: str
    """The machine's name: several nodes of Ray on one share its memory."""
    copy: int
    """What it would copy."""
    held: int
    """The memory it has for that already."""
    growth: int
    """How much more the process had at its peak than now: it will have it again."""
    available: int
    total: int


@dataclass(frozen=True)
class Shortage:
    """A machine that has no room."""

    node: str
    copy: int
    """What its ranks would copy, in bytes."""
    room: int
    """What is left for that, in bytes."""

    def said(self) -> str:
        """Return what the job says."""
        return (
            f"checkpoints are written from the training state, and the next update waits for that: on the node "
            f"{self.node} a copy of {self.copy / 2**30:.1f} GiB has {max(0, self.room) / 2**30:.1f} GiB of room "
            "(`checkpoint_stall_s`)"
        )


def shortage(ranks: Sequence[Room]) -> Shortage | None:
    """Return the machine that lacks most for the copies of its ranks; None where each has room. Pure."""
    nodes: dict[str, list[Room]] = defaultdict(list)
    for rank in ranks:
        nodes[rank.node].append(rank)
    short = []
    for node, those in nodes.items():
        copy, spare = sum(each.copy for each in those), max(each.total for each in those) * SPARE_PERCENT // 100
        free = min(each.available for each in those) + sum(each.held for each in those)
        room = free - spare - sum(each.growth for each in those)
        if copy > max(room, ALWAYS):
            short.append(Shortage(node, copy, room))
    return max(short, key=lambda each: each.copy - each.room, default=None)


def look(copy: int, held: int) -> Room:
    """Return this rank's, of now; what it would copy, and what it has for that, in bytes."""
    node, status = memory.of_node(), own_status()
    growth = max(0, resident_peak(status) - resident(status))
    return Room(socket.gethostname(), copy, held, growth, node.available, node.total)
