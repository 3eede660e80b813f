"""Which links, and which nodes by all of their links, are slow. Pure.

A node's best link tells what its own network can do: with one slow node in three, four of six links are slow, so that
the median link would be a slow one, while two of three nodes have a fast one. A node is slow where its best link is far
below the median node's best; a link between nodes that are not slow, where it is far below that too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median

from cluster.doctor.facts import Facts, Finding, Link
from cluster.interfaces import is_loopback

FAR_BELOW, BELOW = 1 / 4, 1 / 2
"""Of the usual bandwidth: an error, and a warning."""
FLOOR_BYTES_PER_S = 30e6
"""A quarter of Gigabit Ethernet: what is slower is named whatever the others are, and an error between two nodes."""
LATE_S = 0.010
WAY_OUT = "look at its cable, port and speed (`ethtool`), at limits of the machine's type, and at who else sends there"


def verdicts(facts: Facts) -> list[Finding]:
    """Name the slow nodes and links; nothing where all nodes are on one machine, whose links are memory."""
    if all(is_loopback(node.address) for node in facts.nodes):
        return []
    return [*_bandwidth(facts), *_latency(facts), *_allreduce(facts)]


def usual(links: Iterable[Link]) -> float:
    """Return the median over nodes of each node's best link, in bytes a second; 0 where nothing was measured."""
    return median(_best(links).values() or [0.0])


def slow_nodes(links: Sequence[Link], below: float = BELOW) -> dict[str, float]:
    """Return the nodes whose best link is below so much of the usual, with that link's bytes a second."""
    level = usual(links) * below
    return {node: best for node, best in _best(links).items() if best < level}


def slow_links(links: Sequence[Link], below: float = BELOW) -> list[Link]:
    """Return the links below so much of the usual, between nodes that are not slow themselves."""
    level, slow = usual(links) * below, slow_nodes(links, below)
    measured = [link for link in links if link.bytes_per_s is not None and not {link.source, link.target} & set(slow)]
    return [link for link in measured if link.bytes_per_s < level]  # type: ignore[operator]


def suspects(links: Sequence[Link]) -> list[Link]:
    """Return the links to measure once more, alone, before anything is said of them: all that look slow."""
    level = max(usual(links) * BELOW, FLOOR_BYTES_PER_S)
    return [link for link in links if link.bytes_per_s is not None and link.bytes_per_s < level]


def _best(links: Iterable[Link]) -> dict[str, float]:
    best: dict[str, float] = {}
    for link in links:
        for node in (link.source, link.target):
            if link.bytes_per_s is not None:
                best[node] = max(best.get(node, 0.0), link.bytes_per_s)
    return best


def _bandwidth(facts: Facts) -> Iterable[Finding]:
    links, level = facts.links, usual(facts.links)
    why = "every step of a group waits for its slowest link"
    named = slow_nodes(links)
    for node, best in named.items():
        severity = "error" if best < level * FAR_BELOW else "warning"
        what = f"slow network: its fastest link carries {megabytes(best)}, the nodes' usual one {megabytes(level)}"
        yield Finding(severity, facts.node(node).label, what, why, WAY_OUT)
    for link in slow_links(links):
        assert link.bytes_per_s is not None
        severity = "error" if link.bytes_per_s < level * FAR_BELOW else "warning"
        label = f"{facts.node(link.source).label} → {facts.node(link.target).label}"
        what = f"slow link: {megabytes(link.bytes_per_s)}, where {megabytes(level)} are usual"
        yield Finding(severity, label, what, why, WAY_OUT)
    if 0 < level < FLOOR_BYTES_PER_S:
        floor = f"less than a quarter of Gigabit Ethernet ({megabytes(FLOOR_BYTES_PER_S)})"
        severity = "error" if len(facts.nodes) == 2 else "warning"
        yield Finding(severity, "", f"slow network: links carry {megabytes(level)}, {floor}", why, WAY_OUT)


def _latency(facts: Facts) -> Iterable[Finding]:
    trips: dict[str, float] = {}
    for link in facts.links:
        for node in (link.source, link.target):
            trips[node] = min(trips.get(node, float("inf")), link.round_trip_s)
    for node, trip in trips.items():
        if trip > LATE_S and (len(trips) == 2 or trip > 4 * median(trips.values())):
            what = f"its shortest round trip to another node takes {trip * 1000:.1f} ms"
            why = "each collective of a group makes many of them"
            yield Finding("warning", facts.node(node).label, what, why, "keep the nodes of a job in one place")


def _allreduce(facts: Facts) -> Iterable[Finding]:
    result = facts.allreduce
    if result is not None and result.error:
        what = f"a sum over all nodes by {result.backend} failed: {result.error}"
        way_out = "see what else is said above; GLOO_SOCKET_IFNAME names the interface to take"
        yield Finding("error", "", what, "training over several nodes would fail the same way", way_out)


def megabytes(bytes_per_s: float) -> str:
    """Say a bandwidth."""
    return f"{bytes_per_s / 1e6:.{0 if bytes_per_s >= 10e6 else 1}f} MB/s"
