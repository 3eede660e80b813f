"""The doctor's own TCP: a listener on each node that echoes, tells the time and swallows bytes, and who asks it.

A connection begins with a secret and one letter: `e` for echoes, each answered by the time there, or `s` for bytes,
whose number is answered once no more come. The listener takes any free port, as gloo and NCCL do.
"""

from __future__ import annotations

import contextlib
import hmac
import socket
import struct
import threading
import time
from collections.abc import Iterable

from cluster.doctor.facts import Clock

SECRET_BYTES = 16
ROUND_TRIPS = 12
CONNECT_TIMEOUT_S = 3.0
ANSWER_TIMEOUT_S = 20.0
SEND_S = 0.5
"""So long bytes are sent, at most."""
MOST_BYTES = 512 << 20
CHUNK = bytes(1 << 20)
UNSENT_BYTES = 1 << 20
"""What the system may hold of what was sent: a slow link has to carry it before the answer comes."""


class Listener:
    """Answers on a port of all of a node's addresses, from threads of its own, until `close`."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._socket = socket.create_server(("", 0), backlog=64)
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        """Listen no more."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # else the thread that waits in accept keeps it open
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError, ConnectionError), connection:
            connection.settimeout(ANSWER_TIMEOUT_S)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if not hmac.compare_digest(_exactly(connection, SECRET_BYTES), self._secret):
                return
            if _exactly(connection, 1) == b"e":
                while connection.recv(1):
                    connection.sendall(struct.pack("d", time.time()))
            else:
                connection.sendall(struct.pack("Q", _swallowed(connection)))


def asked(address: str, port: int, secret: bytes) -> tuple[float, Clock]:
    """Return the shortest round trip to a listener in seconds, and how far its clock is from this one's.

    Raises:
        OSError: it cannot be reached.
    """
    with _connected(address, port, secret, b"e") as connection:
        trips = []
        for _ in range(ROUND_TRIPS):
            before, began = time.time(), time.perf_counter()
            connection.sendall(b".")
            (there,) = struct.unpack("d", _exactly(connection, 8))
            trips.append((before, there, time.perf_counter() - began))
    return min(took for _, _, took in trips), best_clock(trips)


def best_clock(trips: Iterable[tuple[float, float, float]]) -> Clock:
    """Return the clock by the shortest of several round trips: the answer was given halfway, give or take half. Pure.

    Args:
        trips: when it was asked here, the time there, and how long the answer took, in seconds.
    """
    before, there, took = min(trips, key=lambda trip: trip[2])
    return Clock(there - (before + took / 2), took / 2)


def sent(address: str, port: int, secret: bytes, seconds: float = SEND_S) -> float:
    """Return how many bytes a second reach a listener over one connection.

    Raises:
        OSError: it cannot be reached, or what was sent does not arrive.
    """
    with _connected(address, port, secret, b"s") as connection:
        connection.settimeout(ANSWER_TIMEOUT_S)
        began, total = time.perf_counter(), 0
        while total < MOST_BYTES and time.perf_counter() - began < seconds:
            total += connection.send(CHUNK)
        connection.shutdown(socket.SHUT_WR)
        (arrived,) = struct.unpack("Q", _exactly(connection, 8))
        took = time.perf_counter() - began
    if arrived != total:
        raise ConnectionError(f"of {total} bytes {arrived} arrived")
    return total / took


def _connected(address: str, port: int, secret: bytes, what: bytes) -> socket.socket:
    connection = socket.create_connection((address, port), CONNECT_TIMEOUT_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNSENT_BYTES)
    connection.sendall(secret + what)
    return connection


def _swallowed(connection: socket.socket) -> int:
    buffer, total = bytearray(1 << 20), 0
    while count := connection.recv_into(buffer):
        total += count
    return total


def _exactly(connection: socket.socket, count: int) -> bytes:
    got = b""
    while len(got) < count:
        part = connection.recv(count - len(got))
        if not part:
            raise ConnectionError("the other end closed the connection")
        got += part
    return got
