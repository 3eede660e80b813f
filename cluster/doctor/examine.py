"""Ask the nodes: the order in which the doctor looks at a cluster, and what comes of it as facts."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster import home, stores, topology
from cluster.doctor import collective, judge_links, shared, tournament, wire
from cluster.doctor.asking import START_TIMEOUT_S, Probes
from cluster.doctor.facts import AllReduce, Clock, Facts, Link, NodeFacts, Storage
from cluster.errors import UserError
from cluster.placement import amount
from cluster.topology import Node

STORAGE = "TANDEM_STORAGE"
"""Where jobs leave their runs if their specs do not say."""
MOST_RETRIES = 12
"""Links that look slow and are measured once more, alone, at most."""
Progress = Callable[[str], None]


def examined(storage: str | None, quick: bool, progress: Progress) -> Facts:
    """Look at every living node of the cluster to which this process is connected; nothing stays on any of them.

    Args:
        storage: a folder or URI; None: where jobs leave their runs by default.

    Raises:
        UserError: the cluster has no living node.
    """
    nodes = [node for node in topology.own_nodes() if node.alive]
    if not nodes:
        raise UserError("the cluster has no living node: start one with `ray start`, or `tandem cluster up`")
    place = absolute(storage) if storage else default_storage()
    progress(f"asking {amount(len(nodes), 'node')}: versions, clocks, names, ports …")
    probes = Probes(nodes)
    try:
        facts = first_facts(nodes, probes, quick)
        progress("disks, GPUs, MLflow …")
        facts = _looked_again(facts, probes, place)
        progress(f"storage {stores.shown(place)} …")
        facts = replace(facts, storage=_storage(probes, place, storage is None and not os.environ.get(STORAGE)))
        if len(probes.answering) > 1 and not quick:
            facts = _measured(facts, probes, progress)
        return _with_errors(facts, probes.errors)
    finally:
        probes.end()


def default_storage() -> str:
    """Return where jobs leave their runs if their specs do not say."""
    named = os.environ.get(STORAGE)
    return absolute(named) if named else str(home.home() / "storage")


def absolute(place: str) -> str:
    """Return a URI as it is, and a path made absolute."""
    return place if "://" in place else str(Path(place).expanduser().absolute())


def first_facts(
    nodes: Sequence[Node], probes: Probes, quick: bool, timeout_s: float = START_TIMEOUT_S, tries: int = 1
) -> Facts:
    """Return what takes milliseconds once the probes run: versions, names, clocks, ports.

    Args:
        timeout_s: how long the probes may take to run.
        tries: how often a port that is not reached is tried.
    """
    said = probes.ask("first_look", timeout_s=timeout_s)
    peers = probes.where = {node_id: (facts.address, port) for node_id, (facts, port) in said.items()}
    others = {one: ({other: at for other, at in peers.items() if other != one}, tries) for one in peers}
    reached = probes.ask_each("reach", others)
    clocks = {node_id: _clock(*at, probes.secret) for node_id, at in peers.items()}
    found, links = [], []
    for node in nodes:
        if node.node_id not in said:
            found.append(NodeFacts(node.node_id, node.address, is_head=node.is_head))
            continue
        trips: Mapping[str, float | str] = reached.get(node.node_id, {})
        unreached = {other: trip for other, trip in trips.items() if isinstance(trip, str)}
        links += [Link(node.node_id, other, trip) for other, trip in trips.items() if isinstance(trip, float)]
        own = {"is_head": node.is_head, "ray_gpus": node.total_gpus, "clock": clocks[node.node_id]}
        found.append(replace(said[node.node_id][0], unreached=unreached, **own))
    return _with_errors(Facts(tuple(found), tuple(links), quick=quick), probes.errors)


def _clock(address: str, port: int, secret: bytes) -> Clock | None:
    try:
        return wire.asked(address, port, secret)[1]
    except OSError:  # that it cannot be reached, the other nodes say
        return None


def _looked_again(facts: Facts, probes: Probes, place: str) -> Facts:
    said = probes.ask("second_look", place, not facts.quick)
    return replace(facts, nodes=tuple(replace(node, **said.get(node.node_id, {})) for node in facts.nodes))


def _storage(probes: Probes, place: str, is_default: bool) -> Storage:
    """Have each node write a file, read those of the others, and remove its own."""
    content = {node_id: secrets.token_bytes(64) for node_id in probes.answering}
    try:
        said = probes.ask_each("put", {node_id: (place, each) for node_id, each in content.items()})
        not_written = {node_id: reason for node_id, reason in said.items() if reason}
        written = {node_id: content[node_id] for node_id, reason in said.items() if not reason}
        asked = {one: (place, [other for other in written if other != one]) for one in probes.answering}
        found = probes.ask_each("get", asked)
    finally:
        removed = probes.ask("remove", place)
        probes.ask("remove_folders")
    others = {one: {other: each for other, each in written.items() if other != one} for one in found}
    not_read = {one: wrong for one in found if (wrong := shared.unseen(others[one], found[one]))}
    left = {node_id: reason for node_id, reason in removed.items() if reason and node_id in written}
    return Storage(stores.shown(place), is_default, tuple(found), not_written, not_read, left)


def _measured(facts: Facts, probes: Probes, progress: Progress) -> Facts:
    """Measure the links' bandwidth, those that look slow once more, and a sum over all nodes."""
    where = {node_id: probes.where[node_id] for node_id in probes.answering}
    unreached = {(node.node_id, other) for node in facts.nodes for other in node.unreached}
    rounds, left_out = tournament.sampled(list(where))
    speeds: dict[tuple[str, str], float] = {}
    for number, pairs in enumerate(rounds, 1):
        progress(f"bandwidth between nodes, round {number} of {len(rounds)} …")
        for ways in (pairs, [(other, one) for one, other in pairs]):
            speeds |= _sent([way for way in ways if way not in unreached], where, probes)
    facts = replace(facts, links=_links(facts.links, speeds), pairs_left_out=left_out)
    for link in sorted(judge_links.suspects(facts.links), key=lambda link: link.bytes_per_s or 0)[:MOST_RETRIES]:
        progress("slow links once more, alone …")
        way = (link.source, link.target)
        speeds[way] = max(speeds[way], _sent([way], where, probes).get(way, 0.0))
    progress("a sum over all nodes …")
    return replace(facts, links=_links(facts.links, speeds), allreduce=_allreduce(probes, where))


def _sent(ways: Sequence[tuple[str, str]], where: Mapping[str, tuple[str, int]], probes: Probes) -> dict[Any, float]:
    """Send on some links at the same time; return bytes a second of those on which it went."""
    target = dict(ways)
    said, _ = probes.tried("send", {source: where[target[source]] for source in target})
    return {(source, target[source]): speed for source, speed in said.items()}


def _links(links: Sequence[Link], speeds: Mapping[tuple[str, str], float]) -> tuple[Link, ...]:
    return tuple(replace(link, bytes_per_s=speeds.get((link.source, link.target))) for link in links)


def _allreduce(probes: Probes, where: Mapping[str, tuple[str, int]]) -> AllReduce:
    members = [node_id for node_id in probes.answering if node_id in where]
    first = members[0]
    port = probes.ask_each("free_port", {first: ()})[first]
    arguments = {node_id: (rank, len(members), where[first][0], port) for rank, node_id in enumerate(members)}
    said, failed = probes.tried("allreduce", arguments)
    if failed:
        return AllReduce("gloo", collective.NBYTES, 0.0, 0.0, min(failed.values()))
    nbytes, seconds = max(said.values(), key=lambda answer: answer[1])
    return AllReduce("gloo", nbytes, seconds, collective.bus_bytes_per_s(nbytes, seconds, len(members)))


def _with_errors(facts: Facts, errors: Mapping[str, str]) -> Facts:
    return replace(facts, nodes=tuple(replace(node, error=errors.get(node.node_id, "")) for node in facts.nodes))
