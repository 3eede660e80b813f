"""Whether this machine's link to the head looks cut, and whether the head has given its node up meanwhile.

    python -m cluster.link HEAD:6379 NODE_ID     # exit code 0: the node is alive there, 3: it is not, else: not known

A cut link breaks no connection. The kernel sends again what was not acknowledged, after 0.2 s and then after twice as
long each time (RFC 6298), so a process that waits for its answer learns of a mended link up to a minute late.
"""

from __future__ import annotations

import functools
import socket
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
ESTABLISHED = "01"
ASK_S = 20.0
GIVEN_UP = 3
CUT = 4
"""So often in a row something was sent again and not acknowledged: for three seconds."""


def looks_cut(address: str, tables: Iterable[Path] = TABLES) -> bool:
    """Say whether an open connection to `address`, a `host:port`, gets no answers; no where the kernel tells none."""
    with suppress(OSError, ValueError):
        ends = _ends(address)
        return max((sent_again(_read(table), ends) for table in tables), default=0) >= CUT
    return False


def given_up(address: str, node_id: str) -> bool:
    """Ask the head whether it takes the node for dead; False too where it does not say. In a process of its own.

    Args:
        node_id: in hexadecimal, as the raylet's command line has it.
    """
    command = [sys.executable, "-m", "cluster.link", address, node_id]
    with suppress(OSError, subprocess.TimeoutExpired):
        asked = subprocess.run(command, timeout=ASK_S, capture_output=True, check=False)
        return asked.returncode == GIVEN_UP
    return False


def sent_again(table: str, ends: set[str]) -> int:
    """Return how often in a row an open connection to one of `ends` has sent again; the most of all of them. Pure.

    Args:
        table: as /proc/net/tcp or tcp6 has it; of the latter, IPv4 addresses that are mapped count.
        ends: address:port in the kernel's hexadecimal.
    """
    most = 0
    for line in table.splitlines()[1:]:
        fields = line.split()
        if len(fields) > 6 and fields[3] == ESTABLISHED and fields[2][-13:] in ends:
            most = max(most, int(fields[6], 16))
    return most


def as_hex(address: str) -> str:
    """Return an IPv4 address as the kernel's table has it: a number in the machine's own order of bytes. Pure."""
    return f"{int.from_bytes(socket.inet_aton(address), sys.byteorder):08X}"


@functools.cache
def _ends(address: str) -> set[str]:
    """Resolve a name once: this is asked twice a second, and an open connection stays where it is."""
    host, _, port = address.rpartition(":")
    numbers = {info[4][0] for info in socket.getaddrinfo(host.strip("[]"), None, socket.AF_INET)}
    return {f"{as_hex(str(number))}:{int(port):04X}" for number in numbers}


def _read(table: Path) -> str:
    try:
        return table.read_text(encoding="ascii")
    except OSError:  # no such protocol, or not Linux
        return ""


def main(arguments: list[str]) -> int:
    """Say by the exit code whether a node is alive."""
    from cluster import ray_internals

    address, node_id = arguments
    return 0 if node_id in ray_internals.alive_nodes(address) else GIVEN_UP


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
