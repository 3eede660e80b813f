"""Wait until all nodes of an allocation have joined Ray: python -m cluster.slurm.wait --nodes N --seconds S

It asks the GCS at RAY_ADDRESS (host:port), in one process: importing Ray again and again would cost more than waiting.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time

from cluster import ray_internals

POLL_S = 0.5


def main(arguments: list[str] | None = None) -> int:
    """Return 0 when all are there, 1 when the time is over; say which."""
    parser = argparse.ArgumentParser(prog="python -m cluster.slurm.wait", description="Wait for Ray's nodes.")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    options = parser.parse_args(arguments)
    address, deadline, there = os.environ["RAY_ADDRESS"], time.monotonic() + options.seconds, 0
    while there < options.nodes:
        if time.monotonic() > deadline:
            print(f"{there} of {options.nodes} nodes are there after {options.seconds:g} s", flush=True)
            return 1
        if not there:  # a client of a GCS that is not there yet would end this process
            there = 1 if _listens(address) else 0
        if there:
            there = max(there, len(ray_internals.alive_nodes(address)))
        if there < options.nodes:
            time.sleep(POLL_S)
    print(f"Ray on {there} nodes, head {address}", flush=True)
    return 0


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), 2).close()
        return True
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main())
