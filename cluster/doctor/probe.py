"""What runs on each node: it looks around there, and takes part in what nodes do with each other. An actor of Ray's."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cluster import connect, home, interfaces
from cluster.doctor import disks, gpus, mlflow_probe, shared, versions, wire
from cluster.doctor.facts import NodeFacts

PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
Peers = Mapping[str, tuple[str, int]]
"""Node id → address and port of its listener."""


class Probe:
    """One node's eyes and hands."""

    def __init__(self, node_id: str, address: str, secret: bytes) -> None:
        """Listen; the listener ends with the process, or by `close`.

        Args:
            address: Ray's, of this node.
        """
        self._node_id, self._address, self._secret = node_id, address, secret
        self._listener = wire.Listener(secret)
        self._made: list[str] = []

    def close(self) -> None:
        """Listen no more."""
        self._listener.close()

    def first_look(self) -> tuple[NodeFacts, int]:
        """Return what is known in milliseconds, and the listener's port."""
        host = socket.gethostname()
        found = _addresses_of(host)
        choice = interfaces.choose(self._address, interfaces.here())
        facts = NodeFacts(
            node_id=self._node_id,
            address=self._address,
            host=host,
            versions=versions.installed(connect.packages()),
            resolves_to=found,
            interface=choice,
            gloo_by=interfaces.gloo_listens_on(found[0] if found else None, choice, os.environ),
            ports=_port_range(),
        )
        return facts, self._listener.port

    def second_look(self, storage: str, timed: bool) -> dict[str, Any]:
        """Return what takes longer, by the names of its fields in NodeFacts.

        Args:
            storage: where jobs leave their runs; only a folder is looked at.
            timed: whether the disks' speed is measured.
        """
        local = [] if "://" in storage else [storage]
        folders = [*local, str(home.home()), tempfile.gettempdir(), disks.MEMORY_FOLDER]
        found, by = gpus.looked_at()
        return {
            "disks": disks.looked_at(folders, timed),
            "gpus": found,
            "gpus_by": by,
            "mlflow": mlflow_probe.asked(os.environ),
        }

    def reach(self, peers: Peers, tries: int) -> dict[str, float | str]:
        """Return, by node id, the round trip to the listeners of other nodes in seconds, or why there is none."""

        def trip(address: str, port: int) -> float | str:
            for _ in range(tries):
                try:
                    return wire.asked(address, port, self._secret)[0]
                except OSError as error:
                    reason = _said(error)
            return reason

        with ThreadPoolExecutor(16) as pool:  # each that is not reached takes seconds to tell
            return dict(zip(peers, pool.map(lambda peer: trip(*peer), peers.values()), strict=True))

    def send(self, address: str, port: int) -> float:
        """Return the bytes a second that reach a listener from here.

        Raises:
            OSError: it cannot be reached.
        """
        return wire.sent(address, port, self._secret)

    def put(self, place: str, content: bytes) -> str:
        """Write this node's file into the storage; return why that failed."""
        try:
            self._made = shared.put(place, self._node_id[:12], content)
        except (OSError, ValueError, NotImplementedError) as error:
            return _said(error)
        return ""

    def get(self, place: str, writers: list[str]) -> dict[str, bytes | str]:
        """Read the other nodes' files; return by node id what was read, or why it was not."""
        found: dict[str, bytes | str] = {}
        for writer in writers:
            try:
                found[writer] = shared.get(place, writer[:12])
            except (OSError, ValueError, NotImplementedError) as error:
                found[writer] = _said(error)
        return found

    def remove(self, place: str) -> str:
        """Remove this node's file again; return why that failed."""
        try:
            shared.remove(place, self._node_id[:12])
        except (OSError, ValueError, NotImplementedError) as error:
            return _said(error)
        return ""

    def remove_folders(self) -> None:
        """Remove the folders that were made for this node's file, once no node has a file there any more."""
        shared.remove_folders(self._made)

    def free_port(self) -> int:
        """Return a port of this node on which nobody listens now."""
        with socket.create_server(("", 0)) as found:
            port: int = found.getsockname()[1]
            return port

    def allreduce(self, rank: int, world_size: int, address: str, port: int) -> tuple[int, float]:
        """Take part in sums over all nodes, by gloo; return bytes and seconds of one. Collective.

        Raises:
            RuntimeError: the group does not come up.
        """
        from cluster.doctor import collective

        interfaces.take()
        return collective.timed_sum(rank, world_size, address, port)


def _addresses_of(host: str) -> tuple[str, ...]:
    """Return the addresses to which this machine resolves a name, in the resolver's order, each once."""
    try:
        return tuple(dict.fromkeys(str(entry[4][0]) for entry in socket.getaddrinfo(host, None)))
    except OSError:
        return ()


def _port_range() -> tuple[int, int] | None:
    try:
        first, last = PORT_RANGE.read_text().split()
        return int(first), int(last)
    except (OSError, ValueError):
        return None


def _said(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
