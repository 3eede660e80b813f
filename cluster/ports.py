"""Ports for what is about to listen: step over busy ones and those of other starts, or name who holds them."""

import fcntl
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

from cluster.errors import UserError

STEPS = 200


class Claims:
    """Ports that this process has chosen for what will listen in some seconds.

    Until `close`, or the end of this process, no other start of this user's on this machine chooses the same ones:
    between choosing a port and listening on it lie seconds of imports, in which it looks free to everyone.
    """

    def __init__(self) -> None:
        path = Path(tempfile.gettempdir()) / f"tandem-ports-{os.getuid()}.lock"
        self._locks = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)

    def take(self, port: int) -> bool:
        """Claim a port; False where another process has. This one may claim it again."""
        try:
            # One byte of the file stands for one port; the lock ends with this process at the latest.
            fcntl.lockf(self._locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Let go: by now they listen, or have failed to."""
        os.close(self._locks)


class Ports:
    """Choose ports for daemons, and claim them until `close`."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note
        self._taken: set[int] = set()
        self._claims = Claims()

    def choose(self, name: str, default: int, explicit: int | None = None) -> int:
        """Return a port for `name`.

        An explicit port must be free: UserError names it and, where the system tells, the process that holds it. The
        default is stepped up to the next free one, and `note` hears about it.
        """
        if explicit is not None and not self._take(explicit):
            raise UserError(f"port {explicit} for {name} is in use{held_by(explicit)}: choose another, or leave it out")
        if explicit is not None:
            return explicit
        port = next((port for port in range(default, default + STEPS) if self._take(port)), None)
        if port is None:
            raise UserError(f"no free port for {name} between {default} and {default + STEPS - 1}: name one")
        if port != default:
            self._note(f"port {default} is in use{held_by(default)}: {name} takes {port}")
        return port

    def close(self) -> None:
        """Let go: by now the daemons listen, or have failed to."""
        self._claims.close()

    def _take(self, port: int) -> bool:
        if port in self._taken or not self._claims.take(port) or not is_free(port):
            return False
        self._taken.add(port)
        return True


def is_free(port: int) -> bool:
    """Say whether nobody listens on `port`, on loopback or on all interfaces."""
    return all(_can_listen(host, port) for host in ("127.0.0.1", ""))


def held_by(port: int) -> str:
    """Name the process that listens on `port` as " by NAME (pid N)", or nothing where the system does not tell."""
    import psutil

    try:
        connections = psutil.net_connections("tcp")
        pids = [c.pid for c in connections if c.status == psutil.CONN_LISTEN and c.laddr.port == port and c.pid]
        return f" by {psutil.Process(pids[0]).name()} (pid {pids[0]})" if pids else ""
    except psutil.Error:
        return ""


def _can_listen(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As servers do: connections of a server that has just ended do not make its port busy.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError:
            return False
    return True
