"""How the machines of the nodes are: room on the disk, and whether the clock goes right, as their agents report it.

Each node's agent reports every 5 s, with the time of its own clock; the dashboard's answer has that of the head's. So a
clock that is ahead is seen from 3 s on, one that is behind from 10 s on: until then the report may just be old.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from cluster import ray_internals
from cluster.connect import explained, job_client

AHEAD_S = 3.0
"""The head's time is told in whole seconds; what is more than 2 s besides is wrong."""
BEHIND_S = 10.0
"""A report is up to 5 s old when the next one comes; a busy machine may be late."""
FULL_SHARE, FULL_BYTES = 0.05, 1024**3
"""A disk is called full with less free than the smaller of these; Ray spills no more objects to it from 5 % on."""


@dataclass(frozen=True)
class Vitals:
    """One node's."""

    node_id: str
    age_s: float
    """How old its newest report is by the head's clock; negative for one that comes from the future."""
    disk_free_bytes: int
    disk_bytes: int
    """Of the disk of Ray's folder."""


def vitals() -> dict[str, Vitals]:
    """Return how the living nodes are, by node id. Raises UserError when the cluster does not answer."""
    client = job_client()
    with explained(client.get_address()):
        response = ray_internals.get(client, ray_internals.NODE_SUMMARY)
        response.raise_for_status()
        at = parsedate_to_datetime(response.headers["Date"]).timestamp()
        return read(ray_internals.summaries(response.json()), at)


def read(summaries: Mapping[str, Mapping[str, Any]], at: float) -> dict[str, Vitals]:
    """Read what agents have reported; of a node that has not reported yet nothing is known. Pure.

    Args:
        summaries: by node id.
        at: seconds since the epoch, by the head's clock.
    """
    found = {}
    for node_id, told in summaries.items():
        disks = [disk for disk in (told.get("disk") or {}).values() if isinstance(disk, Mapping)]
        if not told.get("now") or not disks:
            continue
        fullest = min(disks, key=lambda disk: disk["free"])
        found[node_id] = Vitals(node_id, at - told["now"], int(fullest["free"]), int(fullest["total"]))
    return found


def wrong(node: Vitals) -> list[str]:
    """Return what is wrong with a node's machine, in words that follow its name. Pure."""
    found = []
    if node.age_s < -AHEAD_S:
        found.append(f"its clock is {-node.age_s:.0f} s ahead of the head's")
    if node.age_s > BEHIND_S:
        found.append(f"its newest report is {node.age_s:.0f} s old: it is silent, or its clock is behind the head's")
    if node.disk_free_bytes < min(FULL_BYTES, FULL_SHARE * node.disk_bytes):
        free, all_of = (f"{size / 1024**3:.1f}" for size in (node.disk_free_bytes, node.disk_bytes))
        found.append(f"its disk is full: {free} of {all_of} GiB are free")
    return found
