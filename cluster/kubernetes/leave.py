"""What a pod does before it ends: announce to Ray that its node will go, and wait until its work has.

    python -m cluster.kubernetes.leave --seconds 60          a worker: this node
    python -m cluster.kubernetes.leave --seconds 60 --head   the head: all nodes, for they go with it

Jobs write a checkpoint when a node of theirs is announced (jobs/driver/preemption.py), and Ray Serve moves replicas
away, whose streams end within `drain_s`. It ends early when nothing of the node is in use any more. It never fails: a
pod that cannot say goodbye has to end all the same.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterable, Mapping

POLL_S = 1.0
ADDRESS = "127.0.0.1:6379"
FIRST_LOOK_S = 5.0
"""So long work may take to hear of it: a node whose work has just begun to end looks busy, one that has none, idle."""


def main(arguments: list[str] | None = None) -> int:
    """Announce, wait, and return 0."""
    parser = argparse.ArgumentParser(prog="python -m cluster.kubernetes.leave", description="Leave the cluster.")
    parser.add_argument("--seconds", type=float, required=True, help="how long the work may take to end")
    parser.add_argument("--head", action="store_true", help="the whole cluster goes")
    options = parser.parse_args(arguments)
    try:
        leave(options.seconds, whole=options.head)
    except Exception as error:  # whatever Ray raises while it goes down
        print(f"leave: {error}", flush=True)
    return 0


def leave(seconds: float, *, whole: bool) -> None:
    """Announce the end of this pod's node, or of all, and wait until they are idle or the time is over."""
    from cluster import ray_internals

    address = gcs_address(os.environ)
    deadline = time.time() + seconds
    gone = [node for node, ip in ray_internals.alive_nodes(address).items() if whole or ip in own_addresses()]
    for node in gone:
        if refusal := ray_internals.drain(address, node, "the pod is to end", int(deadline * 1000)):
            print(f"leave: node {node[:8]}: {refusal}", flush=True)
    print(f"leave: {len(gone)} nodes announced, at most {seconds:g} s", flush=True)
    time.sleep(min(FIRST_LOOK_S, seconds))
    while time.time() < deadline and busy(ray_internals.used_by_gcs(address), gone):
        time.sleep(POLL_S)


def gcs_address(environment: Mapping[str, str]) -> str:
    """Return the GCS's address, which KubeRay tells every Ray container."""
    return environment.get("RAY_ADDRESS") or ADDRESS


def busy(used: dict[str, dict[str, float]], nodes: Iterable[str]) -> bool:
    """Tell whether anything of these nodes is in use. Pure."""
    return any(amount > 0 for node in nodes for name, amount in used.get(node, {}).items() if name in ("CPU", "GPU"))


def own_addresses() -> set[str]:
    """Return the addresses by which Ray may know this pod, whose name is in its own /etc/hosts."""
    import socket

    with contextlib.suppress(OSError):  # a name that nobody resolves
        return {str(entry[4][0]) for entry in socket.getaddrinfo(socket.gethostname(), None)}
    return set()


if __name__ == "__main__":
    sys.exit(main())
