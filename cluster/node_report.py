"""What `tandem cluster status` shows: addresses, each node with what is wrong with it, and what runs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster import supervisor
from cluster.placement import amount
from cluster.record import LocalCluster
from cluster.topology import Node
from cluster.vitals import Vitals, wrong

MOST_DEATHS = 5
"""So many dead nodes are told of in full; Ray remembers a thousand."""


@dataclass(frozen=True)
class Kept:
    """A node besides the head of the embedded cluster, as its supervisor notes it."""

    number: int
    state: str
    returns: int
    reason: str
    at: float
    """When it has died last, ended, or come back, in seconds since the epoch."""
    log: str


def kept(cluster: LocalCluster | None) -> list[Kept]:
    """Read what the supervisors of the local cluster's nodes have noted."""
    found = []
    for number in range(1, len(cluster.raylets) + 1) if cluster else ():
        assert cluster is not None
        state = supervisor.read(cluster.node_folder(number))
        if state is not None:
            told = state.state if state.lives or state.state == "ended" else "left alone"
            found.append(Kept(number, told, state.returns, state.reason, state.at, str(cluster.node_log(number))))
    return found


def state_of(node: Node, now: float) -> str:
    """Say how a node is. Pure.

    Args:
        now: seconds since the epoch.
    """
    if node.alive:
        return f"alive, has joined again {amount(node.returns, 'time')}" if node.returns else "alive"
    since = f" for {_length(now - node.ended_at)}" if node.ended_at else ""
    return f"dead{since}"


def told_of(node: Kept, now: float) -> str | None:
    """Say what a supervisor had to do, with where to read more; None where that is nothing. Pure."""
    if node.state == "up" and not node.returns:
        return None
    happened = {
        "starting": "is being started",
        "up": f"has joined again ({amount(node.returns, 'time')} in all)",
        "down": "is being started again",
        "ended": "is started no more",
    }.get(node.state, "has no supervisor any more: its death would be final")
    reason = f": {node.reason}" if node.reason else ""
    return f"node {node.number} {happened}, {_length(now - node.at)} ago{reason}; log: {node.log}"


def show(
    report: dict[str, Any],
    nodes: Sequence[Node],
    vitals: Mapping[str, Vitals],
    jobs: list[Any],
    applications: list[Any],
    kept: Sequence[Kept],
) -> None:
    """Print it all."""
    console = Console()
    console.print(f"Ray        {report['ray_address']}", highlight=False)
    console.print(f"Dashboard  {report['dashboard_url']}", highlight=False)
    silent = "" if report["mlflow_answers"] else "  [red]does not answer[/red]"
    if report["mlflow_refuses_name"]:
        silent = "  [red]does not answer to this name (403): name it in TANDEM_MLFLOW_HOSTS where it is started[/red]"
    console.print(f"MLflow     {report['mlflow_url']}{silent}", highlight=False)
    now = time.time()
    console.print(_table(nodes, now))
    for line in trouble(nodes, vitals, kept, now):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for job in jobs:
        console.print(f"job {job.submission_id}  {job.status}", highlight=False)
    for application in applications:
        replicas = amount(application.replicas, "replica")
        console.print(f"serving {application.name}  {application.status}  {replicas}", highlight=False)
    if not jobs and not applications:
        console.print("no job runs, nothing is served")


def trouble(nodes: Sequence[Node], vitals: Mapping[str, Vitals], kept: Sequence[Kept], now: float) -> list[str]:
    """Say what is wrong with living nodes, and why nodes died and came back, the newest deaths first. Pure.

    Args:
        vitals: by node id.
    """
    sick = [
        f"{n.address}: {what}" for n in nodes if n.alive and n.node_id in vitals for what in wrong(vitals[n.node_id])
    ]
    dead = sorted((node for node in nodes if not node.alive), key=lambda node: -node.ended_at)
    told = [f"{node.address} died: {' '.join(node.reason.split()) or 'Ray does not say why'}" for node in dead]
    more = [f"{amount(len(told) - MOST_DEATHS, 'earlier death')}: `--json` has them"] if len(told) > MOST_DEATHS else []
    return [*sick, *told[:MOST_DEATHS], *more, *(line for node in kept if (line := told_of(node, now)))]


def _table(nodes: Sequence[Node], now: float) -> Table:
    table = Table("node", "state", "CPUs used", "GPUs used", "accelerator", "memory", box=None)
    for node in nodes:
        state = state_of(node, now)
        table.add_row(
            f"{node.address}{' (head)' if node.is_head else ''}",
            state if node.alive else f"[red]{state}[/red]",
            _usage(node.total_cpus, node.free_cpus) if node.alive else "",
            _usage(node.total_gpus, node.free_gpus) if node.alive else "",
            node.accelerator_type or "",
            f"{node.memory_bytes / 1024**3:.1f} GiB" if node.alive else "",
        )
    return table


def _usage(total: float, free: float) -> str:
    return f"{total - free:g} of {total:g}"


def _length(seconds: float) -> str:
    """Say a length of time roughly."""
    for unit, length_s in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length_s:
            return amount(int(seconds // length_s), unit)
    return amount(max(0, int(seconds)), "second")
