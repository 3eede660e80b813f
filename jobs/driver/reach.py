"""Whether all nodes reach the places that a job writes to: tried by reading and writing there, before it prepares.

    this node        writes <place>/.tandem-<token>
    every other one  reads it, and writes <place>/.tandem-<token>-<number>, by a task that is bound to the node
    this node        reads those, and removes them all

A folder of the same name on a disk of each node's own is found by it; a store behind a URI is tried by each node as the
driver tries it, with the node's own credentials and way there.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cluster import placement, stores, topology
from cluster.errors import UserError
from cluster.topology import Node
from jobs import progress
from jobs.driver import storage, warm
from jobs.spec import JobSpec

ANSWER_S = 180.0
"""A node's task begins in a second or two; in a minute where a busy machine imports for the first time."""
SAID_AFTER_S = 5.0
APPEARS_S = 5.0
"""A network file system may show another node's file so much later."""
SHOWN = 4
"""So many nodes are named in a sentence."""


class NotReached(UserError):
    """A place that the job writes to is not the same one on all nodes that may work for it."""


@dataclass(frozen=True)
class Probe:
    """What each node looks for."""

    places: Mapping[str, str]
    """By key of the spec: an absolute path, or a URI."""
    token: str
    number: int = 0
    """Tells the nodes' files apart."""

    def written(self) -> str:
        """Return the name of the driver's file, which is also what is in it."""
        return f".tandem-{self.token}"

    def answer(self) -> str:
        """Return the name of the node's own file."""
        return f"{self.written()}-{self.number}"


def check(spec: JobSpec, base: Path, placed: Mapping[str, int]) -> None:
    """Have the nodes that may take workers reach what the job writes to; nothing is done where this is the only one.

    Args:
        base: where relative paths in the spec start.
        placed: how many workers each node takes, by node id; empty where that is not known yet.

    Raises:
        NotReached: one of them does not.
    """
    import ray

    here = ray.get_runtime_context().get_node_id()
    others = [node for node in candidates(spec, placed, topology.own_nodes()) if node.node_id != here]
    if not others:
        return
    began = time.monotonic()
    found = _asked(storage.places(spec, base), others)
    if problems := [
        sentence(key, place, found[key]) for key, place in storage.places(spec, base).items() if found[key]
    ]:
        raise NotReached("\n".join(problems))
    progress.say(f"{len(others) + 1} nodes reach the storage (tried in {time.monotonic() - began:.1f} s)")


def candidates(spec: JobSpec, placed: Mapping[str, int], nodes: Sequence[Node]) -> list[Node]:
    """Return the living nodes that may take a worker of the job: those placed, or all for one that may move. Pure."""
    wanted = spec.resources
    one = placement.Request(1, wanted.cpus_per_worker, wanted.gpus_per_worker)
    able = [node for node in nodes if node.alive and placement.capacity(one, [node])]
    return [node for node in able if node.node_id in placed] if placed and wanted.fewest == wanted.most else able


def sentence(key: str, place: str, reasons: Mapping[str, str]) -> str:
    """Say which nodes do not reach a place, why, and what to do. Pure.

    Args:
        reasons: by address of the node, at least one.
    """
    by_reason: dict[str, list[str]] = {}
    for address, reason in reasons.items():
        by_reason.setdefault(reason, []).append(address)
    said = "; ".join(f"{_listed(addresses)}: {reason}" for reason, addresses in by_reason.items())
    if "://" in place:
        return f"{key}: not all nodes reach {stores.shown(place)}: {said}; mend that there, credentials included"
    return (
        f"{key}: {place} is not one folder that all nodes reach: {said}. Have it on a file system that every node "
        f"mounts there, set {key} to an object store such as s3://bucket/folder, or have all workers on one node"
    )


def _listed(addresses: Sequence[str]) -> str:
    shown = ", ".join(addresses[:SHOWN])
    more = len(addresses) - SHOWN
    return f"{'node' if len(addresses) == 1 else 'nodes'} {shown}" + (f" and {more} more" if more > 0 else "")


def _asked(places: Mapping[str, str], nodes: Sequence[Node]) -> dict[str, dict[str, str]]:
    """Return, by key of the spec, why nodes do not reach its place: by address, nothing where all do."""
    probe = Probe(places, secrets.token_hex(8))
    folders = {key: Path(place) for key, place in places.items() if "://" not in place}
    found: dict[str, dict[str, str]] = {key: {} for key in places}
    try:
        for folder in folders.values():
            (folder / probe.written()).write_text(probe.token, encoding="ascii")
        for number, (node, reasons) in enumerate(zip(nodes, _by_tasks(probe, nodes), strict=True)):
            own = Probe(places, probe.token, number)
            for key in places:
                reason = reasons.get(key)
                if reason is None and key in folders and not _appears(folders[key] / own.answer()):
                    reason = "what it writes there does not appear here"
                if reason is not None:
                    found[key][node.address] = reason
    finally:
        for folder in folders.values():
            for left in (probe.written(), *(Probe(places, probe.token, n).answer() for n in range(len(nodes)))):
                with suppress(OSError):
                    (folder / left).unlink(missing_ok=True)
    return found


def _by_tasks(probe: Probe, nodes: Sequence[Node]) -> list[dict[str, str]]:
    """Have each node look; one that does not answer reaches nothing."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def begin(number: int, node: Node) -> object:
        bound = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
        remote = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=bound)(look)
        own = Probe(probe.places, probe.token, number)
        return remote.options(runtime_env={"env_vars": warm.WORKER}).remote(own)

    begun = [begin(number, node) for number, node in enumerate(nodes)]
    done, waited_for = ray.wait(begun, num_returns=len(begun), timeout=SAID_AFTER_S)
    if waited_for:
        progress.say(f"waiting for {len(waited_for)} of {len(begun)} other nodes to try the storage")
        done, _ = ray.wait(begun, num_returns=len(begun), timeout=ANSWER_S)
    return [_answer(reference, reference in done, probe.places) for reference in begun]


def _answer(reference: object, is_done: bool, places: Mapping[str, str]) -> dict[str, str]:
    import ray

    if not is_done:
        ray.cancel(reference, force=True)
        return dict.fromkeys(places, f"it did not answer within {ANSWER_S:.0f} s")
    try:
        found: dict[str, str] = ray.get(reference)
    except ray.exceptions.RayError as error:
        return dict.fromkeys(places, f"asking it failed: {str(error).splitlines()[0]}")
    return found


def look(probe: Probe) -> dict[str, str]:
    """Look from this node; return why it does not reach a place, by key of the spec."""
    tried: dict[str, Callable[[], str | None]] = {
        key: (lambda key=key, place=place: _try_uri(key, place))  # type: ignore[misc]
        if "://" in place
        else (lambda place=place: try_folder(Path(place), probe))  # type: ignore[misc]
        for key, place in probe.places.items()
    }
    return {key: reason for key, one in tried.items() if (reason := one()) is not None}


def try_folder(folder: Path, probe: Probe) -> str | None:
    """Read the driver's file in a folder, and leave one; return why that cannot be done."""
    if not folder.is_dir():
        return "there is no such folder"
    if not _appears(folder / probe.written()):
        return "it has another folder of that name"
    try:
        if (folder / probe.written()).read_text(encoding="ascii") != probe.token:
            return "what was written is not what it reads"
        (folder / probe.answer()).write_text(probe.token, encoding="ascii")
    except OSError as error:
        return f"it cannot read and write there: {error.strerror or error}"
    return None


def _try_uri(key: str, place: str) -> str | None:
    try:
        storage.try_uri(key, place)
    except storage.NotWritable as error:
        return str(error)
    return None


def _appears(path: Path) -> bool:
    enough = time.monotonic() + APPEARS_S
    while not path.exists():
        if time.monotonic() > enough:
            return False
        time.sleep(0.1)
    return True
