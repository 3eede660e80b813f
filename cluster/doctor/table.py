"""How a cluster's facts and findings are shown to people. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING

from cluster.doctor import judge, judge_links
from cluster.doctor.facts import Facts, Finding, NodeFacts
from cluster.placement import amount

if TYPE_CHECKING:
    from rich.console import RenderableType

COLOURS = {"error": "red", "warning": "yellow"}
HEADINGS = (
    "node",
    "clock",
    "interface",
    "free disk",
    "written / read",
    "MLflow",
    "storage",
    "GPUs",
    "round trip",
    "network",
)


def rendered(facts: Facts, findings: Sequence[Finding]) -> list[RenderableType]:
    """Return the table of the nodes, the lines below it, and what was found, the worst first."""
    from rich.table import Table
    from rich.text import Text

    rows = [_row(facts, node) for node in facts.nodes]
    shown = [index for index in range(len(HEADINGS)) if index == 0 or any(row[index] for row in rows)]
    table = Table(*(HEADINGS[index] for index in shown), box=None)
    for row in rows:
        table.add_row(*(Text(row[index]) for index in shown))
    lines: list[RenderableType] = [Text(line) for line in remarks(facts)]
    told = [
        Text.assemble((f"{finding.severity:<8}", COLOURS[finding.severity]), sentence(finding)) for finding in findings
    ]
    return [table, *lines, *told, Text(summary(facts, findings))]


def sentence(finding: Finding) -> str:
    """Say a finding on one line."""
    whose = f"{finding.node}: " if finding.node else ""
    return f"{whose}{finding.what}; {finding.why}. Way out: {finding.way_out}"


def summary(facts: Facts, findings: Sequence[Finding]) -> str:
    """Count what was found."""
    counts = [
        amount(count, severity)
        for severity in ("error", "warning")
        if (count := sum(finding.severity == severity for finding in findings))
    ]
    return f"{amount(len(facts.nodes), 'node')}: {' and '.join(counts) if counts else 'nothing to mend'}"


def remarks(facts: Facts) -> list[str]:
    """Say what is the same on all nodes, what was measured between them, and what was left out."""
    lines = [f"the same on all nodes: {same}"] if (same := _same_versions(facts.nodes)) else []
    storage = facts.storage
    if storage is not None and not (storage.not_read or storage.not_written) and len(storage.asked) > 1:
        lines.append(f"storage {storage.place}: each node wrote a file there and read those of the others")
    if (result := facts.allreduce) and not result.error:
        size, speed = f"{result.nbytes / 1e6:.1f} MB", judge_links.megabytes(result.bus_bytes_per_s)
        lines.append(
            f"sum over all nodes by {result.backend}: {size} in {result.seconds * 1000:.0f} ms, {speed} a node"
        )
    if not any(node.gpus for node in facts.nodes) and any(node.gpus_by for node in facts.nodes):
        lines.append("GPUs: none on any node")
    if any(link.bytes_per_s for link in facts.links) and judge.is_one_machine(facts.nodes):
        lines.append("all nodes are on this machine: what is measured between them is its memory, and not judged")
    if facts.pairs_left_out:
        lines.append(f"network: {amount(facts.pairs_left_out, 'pair')} of nodes left out; each node met 31 others")
    if facts.quick:
        lines.append("left out by --quick: bandwidth, the sum over all nodes, and the disks' speed")
    return lines


def _same_versions(nodes: Sequence[NodeFacts]) -> str:
    known = [node for node in nodes if not node.error]
    names = list(dict.fromkeys(name for node in known for name in node.versions))
    same = [name for name in names if len({node.versions.get(name) for node in known}) == 1]
    return ", ".join(f"{name} {known[0].versions[name]}" for name in same if known[0].versions[name])


def _row(facts: Facts, node: NodeFacts) -> list[str]:
    name = f"{node.label}{' head' if node.is_head else ''}"
    if node.error:
        return [name, "no answer", *[""] * (len(HEADINGS) - 2)]
    return [
        name,
        f"{node.clock.offset_s * 1000:+.1f} ms ±{node.clock.error_s * 1000:.1f}" if node.clock else "",
        node.gloo_by,
        _free(node),
        _speeds(node),
        _mlflow(node),
        _storage(facts, node),
        _gpus(node),
        *_network(facts, node),
    ]


def _free(node: NodeFacts) -> str:
    smallest = min(node.disks, key=lambda disk: disk.free_bytes, default=None)
    return f"{smallest.free_bytes / 1e9:.0f} GB in {smallest.folder}" if smallest else ""


def _speeds(node: NodeFacts) -> str:
    measured = [disk for disk in node.disks if disk.write_bytes_per_s and disk.read_bytes_per_s]
    slowest = min(measured, key=lambda disk: disk.write_bytes_per_s or 0, default=None)
    if slowest is None or slowest.write_bytes_per_s is None or slowest.read_bytes_per_s is None:
        return ""
    speeds = f"{slowest.write_bytes_per_s / 1e6:.0f} / {slowest.read_bytes_per_s / 1e6:.0f} MB/s"
    return f"{speeds} ({slowest.how.partition(',')[0]})"


def _mlflow(node: NodeFacts) -> str:
    if node.mlflow is None:
        return ""
    if node.mlflow.text.startswith("not asked"):
        return "not asked"
    return "answers" if node.mlflow.status == 200 else str(node.mlflow.status or "no answer")


def _storage(facts: Facts, node: NodeFacts) -> str:
    storage = facts.storage
    if storage is None:
        return ""
    if node.node_id in storage.not_written:
        return "not writable"
    if node.node_id in storage.not_read:
        return "not shared"
    return "shared" if len(storage.asked) > 1 else "writable"


def _gpus(node: NodeFacts) -> str:
    names = dict.fromkeys(gpu.name for gpu in node.gpus)
    return f"{len(node.gpus)} {', '.join(names)}" if names else ""


def _network(facts: Facts, node: NodeFacts) -> tuple[str, str]:
    """Return the median round trip to the others, and the bandwidth of the slowest and the fastest link."""
    own = [link for link in facts.links if node.node_id in (link.source, link.target)]
    if not own:
        return "", ""
    trip = f"{median(link.round_trip_s for link in own) * 1000:.2f} ms"
    speeds = [link.bytes_per_s for link in own if link.bytes_per_s is not None]
    if not speeds:
        return trip, ""
    return trip, f"{judge_links.megabytes(min(speeds))} to {judge_links.megabytes(max(speeds))}"
