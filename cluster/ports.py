"""Ports for the daemons of the local cluster: step over busy ones, or name who holds them."""

import socket
from collections.abc import Callable

from cluster.errors import UserError

STEPS = 200


def is_free(port: int) -> bool:
    """Say whether nobody listens on `port`, on loopback or on all interfaces."""
    return all(_can_bind(host, port) for host in ("127.0.0.1", ""))


def choose(name: str, default: int, explicit: int | None, taken: set[int], note: Callable[[str], None]) -> int:
    """Return the port for `name` and add it to `taken`.

    An explicit port must be free: UserError names it and, where the system tells, the process that holds it. The
    default is stepped up to the next free one, and `note` hears about it.
    """
    if explicit is not None and (explicit in taken or not is_free(explicit)):
        raise UserError(f"port {explicit} for {name} is in use{held_by(explicit)}: choose another, or leave it out")
    first = default if explicit is None else explicit
    port = next((port for port in range(first, first + STEPS) if port not in taken and is_free(port)), None)
    if port is None:
        raise UserError(f"no free port for {name} between {first} and {first + STEPS - 1}: name one")
    if port != first:
        note(f"port {first} is in use{held_by(first)}: {name} takes {port}")
    taken.add(port)
    return port


def held_by(port: int) -> str:
    """Name the process that listens on `port` as " by NAME (pid N)", or nothing where the system does not tell."""
    import psutil

    try:
        connections = psutil.net_connections("tcp")
        pids = [c.pid for c in connections if c.status == psutil.CONN_LISTEN and c.laddr.port == port and c.pid]
        return f" by {psutil.Process(pids[0]).name()} (pid {pids[0]})" if pids else ""
    except psutil.Error:
        return ""


def _can_bind(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As servers do: connections of a server that has just ended do not make its port busy.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError:
            return False
    return True
