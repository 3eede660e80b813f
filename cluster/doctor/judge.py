"""What is wrong with a cluster, by the facts alone. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from cluster.doctor import judge_links, judge_storage, versions
from cluster.doctor.facts import Disk, Facts, Finding, Gpu, NodeFacts
from cluster.interfaces import is_loopback

CLOCK_ERROR_S, CLOCK_WARNING_S = 10.0, 1.0
FREE_ERROR_BYTES, FREE_WARNING_BYTES = 256e6, 2e9
SLOW_DISK_BYTES_PER_S = 30e6
FEWEST_PORTS = 5000
ORDER = {"error": 0, "warning": 1}
EVERY = "every node"


def verdicts(facts: Facts) -> list[Finding]:
    """Return what is not as it should be, the worst first; what is the same on several nodes is said once."""
    known = [node for node in facts.nodes if not node.error]
    each: dict[str, Callable[[NodeFacts], Iterable[Finding]]] = {"clock": _clock, "disks": _disks, "gpus": _gpus}
    each |= {"mlflow": _mlflow, "ports": _port_range, **({"names": _names} if len(facts.nodes) > 1 else {})}
    found = {"silent": [_silent(node) for node in facts.nodes if node.error], "versions": _versions(known)}
    found |= {kind: [finding for node in known for finding in look(node)] for kind, look in each.items()}
    found["ports"] += _unreached(known)
    found |= {"storage": judge_storage.verdicts(facts), "network": judge_links.verdicts(facts)}
    every = [replace(finding, kind=kind) for kind, findings in found.items() for finding in findings]
    return sorted(_merged(every, len(facts.nodes)), key=lambda finding: ORDER[finding.severity])


def exit_code(findings: Iterable[Finding]) -> int:
    """Return 1 where something would make a job fail, or be wrong without a word; else 0."""
    return int(any(finding.severity == "error" for finding in findings))


def is_one_machine(nodes: Iterable[NodeFacts]) -> bool:
    """Say whether all nodes have loopback addresses, as those of `tandem cluster up --nodes` have."""
    return all(is_loopback(node.address) for node in nodes)


def _silent(node: NodeFacts) -> Finding:
    why = "a job that gets workers there would wait for them, or fail"
    return Finding("error", node.label, f"does not answer: {node.error}", why, "see Ray's logs on that node")


# -- versions --------------------------------------------------------------------------------------------------------


def _versions(nodes: Sequence[NodeFacts]) -> list[Finding]:
    found = []
    for name in dict.fromkeys(name for node in nodes for name in node.versions):
        said = {node.node_id: node.versions.get(name, "") for node in nodes}
        if name == versions.DRIVER:  # what has no GPU has no driver
            said = {node_id: version for node_id, version in said.items() if version}
        usual = Counter(said.values()).most_common(1)[0][0] if said else ""
        for node in nodes:
            version = said.get(node.node_id, usual)
            if version != usual:
                found.append(_mismatch(node, name, version, usual))
    return found


def _mismatch(node: NodeFacts, name: str, version: str, usual: str) -> Finding:
    matters = name == versions.CODE or name in versions.MUST_MATCH
    differs = versions.of(name, version) != versions.of(name, usual)
    why = "a job that spans them fails, or computes something else there"
    if not (matters and differs):
        why = "what works on one node may not on another"
    what = f"has {name} {version or 'not at all'}, most nodes have {usual or 'none'}"
    return Finding(
        "error" if matters and differs else "warning", node.label, what, why, f"install the same {name} on all nodes"
    )


# -- one node --------------------------------------------------------------------------------------------------------


def _clock(node: NodeFacts) -> Iterable[Finding]:
    clock = node.clock
    if clock is None:
        return
    surely = abs(clock.offset_s) - clock.error_s
    if surely > CLOCK_WARNING_S:
        side = "ahead of" if clock.offset_s > 0 else "behind"
        what = f"its clock is {abs(clock.offset_s):.1f} s {side} the driver's (±{clock.error_s:.3f} s)"
        why = "leases of runs, metrics and certificates go by the time"
        severity = "error" if surely > CLOCK_ERROR_S else "warning"
        yield Finding(severity, node.label, what, why, "have chrony or systemd-timesyncd set the clocks")


def _disks(node: NodeFacts) -> Iterable[Finding]:
    for disk in node.disks:
        if disk.error and not disk.total_bytes:
            why = "jobs write there"
            yield Finding("error", node.label, f"{disk.folder}: {disk.error}", why, "mend that folder on this node")
        elif disk.free_bytes < FREE_WARNING_BYTES:
            yield _full(node, disk)
        speeds = {"written": disk.write_bytes_per_s, "read": disk.read_bytes_per_s}
        for how, speed in speeds.items():
            if speed is not None and speed < SLOW_DISK_BYTES_PER_S:
                what = f"{disk.folder} is {how} at {speed / 1e6:.0f} MB/s ({disk.how})"
                why = "checkpoints and prepared data take long there"
                yield Finding("warning", node.label, what, why, "look at the disk, or keep `storage` on another one")


def _full(node: NodeFacts, disk: Disk) -> Finding:
    severity = "error" if disk.free_bytes < FREE_ERROR_BYTES else "warning"
    what = f"{disk.folder} has {disk.free_bytes / 1e9:.1f} GB free of {disk.total_bytes / 1e9:.1f} GB"
    why = "a job ends where a checkpoint, a log or Ray's object store does not fit"
    return Finding(severity, node.label, what, why, "make room there")


def _gpus(node: NodeFacts) -> Iterable[Finding]:
    if node.gpus_by and len(node.gpus) < node.ray_gpus:
        what = f"Ray offers {node.ray_gpus:g} GPUs there, and {len(node.gpus)} were found ({node.gpus_by})"
        why = "workers that are given one of the others fail"
        yield Finding("warning", node.label, what, why, "look at `nvidia-smi` there; start the node without --num-gpus")
    for number, gpu in enumerate(node.gpus):
        yield from _gpu(node, f"GPU {number} ({gpu.name})", gpu)


def _gpu(node: NodeFacts, name: str, gpu: Gpu) -> Iterable[Finding]:
    reset = "end what runs on it and reset it: nvidia-smi --gpu-reset"
    if gpu.has_repair_failed:
        what = f"{name}: a row of its memory could not be replaced"
        yield Finding("error", node.label, what, "it will fail, or be wrong", "have the GPU exchanged")
    elif gpu.is_repair_pending:
        what = f"{name}: broken memory waits to be replaced by spare rows"
        yield Finding("warning", node.label, what, "it may fail again before that", reset)
    if gpu.uncorrected_errors:
        what = f"{name}: {gpu.uncorrected_errors} uncorrected errors of its memory since its driver was loaded"
        yield Finding("warning", node.label, what, "jobs on it were ended by them", reset)
    if slowed := [reason for reason in gpu.throttled_by if reason != "power cap"]:
        hot = f" at {gpu.temperature_c} °C" if gpu.temperature_c is not None else ""
        what = f"{name} is slowed{hot}: {', '.join(slowed)}"
        yield Finding("warning", node.label, what, "the whole group waits for it", "look at its cooling and power")


def _mlflow(node: NodeFacts) -> Iterable[Finding]:
    answer = node.mlflow
    if answer is None or answer.status == 200 or answer.text.startswith("not asked"):
        return
    why = "a job there tracks nothing, and cannot register or load models by their names"
    if not answer.url:
        what = "does not know where MLflow is: MLFLOW_TRACKING_URI is not set there, and this machine's is loopback"
        way_out = "export MLFLOW_TRACKING_URI before `ray start` on every node"
    elif answer.status == 403 and "host" in answer.text.lower():
        host = answer.url.partition("://")[2].partition("/")[0]
        what = f"MLflow at {answer.url} refuses the name {host} (403: {answer.text})"
        way_out = f"start its server with --allowed-hosts and {host} among the names, or MLFLOW_SERVER_ALLOWED_HOSTS"
    elif answer.status in (401, 403):
        what = f"MLflow at {answer.url} refuses the login ({answer.status})"
        way_out = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, on every node"
    else:
        what = f"MLflow at {answer.url} does not answer as it should: {answer.status or ''} {answer.text}".replace(
            "  ", " "
        )
        way_out = "start its server with --host 0.0.0.0, open its port, or set MLFLOW_TRACKING_URI to where it is"
    yield Finding("error", node.label, what, why, way_out)


def _port_range(node: NodeFacts) -> Iterable[Finding]:
    if node.ports is not None and node.ports[1] - node.ports[0] + 1 < FEWEST_PORTS:
        what = f"the system picks ports from {node.ports[0]} to {node.ports[1]} only"
        way_out = "widen net.ipv4.ip_local_port_range"
        yield Finding("warning", node.label, what, "Ray, gloo and NCCL may find none free", way_out)


def _names(node: NodeFacts) -> Iterable[Finding]:
    """Judge by what gloo would listen on: that of the host's name where no interface is chosen or set."""
    if is_loopback(node.address) or not node.gloo_by:
        return
    first = node.resolves_to[0] if node.resolves_to else ""
    resolved = (
        f"its name {node.host} resolves to {first} there" if first else f"its name {node.host} does not resolve there"
    )
    by_name = node.gloo_by in ("nothing", first)
    if by_name and first != node.address:
        unclear = node.interface.why if node.interface else ""
        way_out = (
            f"set GLOO_SOCKET_IFNAME for `ray start` there, or map {node.host} to {node.address} in its /etc/hosts"
        )
        what = f"{resolved}, and which interface to take instead is not clear: {unclear}"
        yield Finding("error", node.label, what, "gloo listens where no other node reaches it", way_out)
    elif not first or is_loopback(first):
        why = f"Tandem's jobs are not affected: gloo takes {node.gloo_by} there; other programs may be"
        yield Finding("warning", node.label, resolved, why, f"map {node.host} to {node.address} in its /etc/hosts")


# -- all nodes -------------------------------------------------------------------------------------------------------


def _unreached(known: Sequence[NodeFacts]) -> list[Finding]:
    """Name the nodes that others cannot reach on a port that was just opened there."""
    found = []
    for target in known:
        deaf = {node.label: node.unreached[target.node_id] for node in known if target.node_id in node.unreached}
        if deaf:
            whom = "any other node" if 1 < len(deaf) == len(known) - 1 else ", ".join(deaf)
            what = f"a port opened there is not reached from {whom}: {min(deaf.values())}"
            way_out = "let the nodes reach each other on all ports from 1024 up"
            why = "gloo, NCCL and Ray's workers take ports that the system picks"
            found.append(Finding("error", target.label, what, why, way_out))
    return found


def _merged(findings: Iterable[Finding], nodes: int) -> list[Finding]:
    """Say once what is the same on several nodes."""
    whose: dict[Finding, list[str]] = {}
    for finding in findings:
        whose.setdefault(replace(finding, node=""), []).append(finding.node)
    return [
        replace(finding, node=EVERY if len(labels) == nodes and nodes > 1 else ", ".join(filter(None, labels)))
        for finding, labels in whose.items()
    ]
