"""Listening sockets that several gateways of a node share, and how one of them stops without losing a connection.

A closed listening socket resets the connections that the kernel has accepted for it and nobody has taken yet
(`net.ipv4.tcp_migrate_req` is 0 by default). So a leaving gateway has the kernel drop further requests to connect,
takes what waits, and then closes: a client whose SYN was dropped sends it again after a second, to another gateway.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import select
import socket
import sys

logger = logging.getLogger(__name__)
BACKLOG = 4096
MOST_UNSENT_BYTES = 64 * 1024
"""What the kernel takes of an answer beyond what it can send; it would take megabytes for a client that does not read.
Then nobody would notice that the client does not, and each would hold a text's slot to its end."""
SO_ATTACH_FILTER = 26
SETTLE_S = 0.05
"""Handshakes that had begun end meanwhile."""


class _Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("filter", ctypes.POINTER(_Instruction)))


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens there, beside others of the same user that do. Raises OSError."""
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):  # the connections that it accepts have it too
            found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, MOST_UNSENT_BYTES)
        found.bind((host, port))
        found.listen(BACKLOG)
        found.setblocking(False)
    except OSError:
        found.close()
        raise
    return found


async def until_empty(listening: socket.socket, limit_s: float = 5.0) -> None:
    """Have no further connection begun, and wait until the server has taken those that wait."""
    _drop_requests_to_connect(listening)
    loop = asyncio.get_running_loop()
    end = loop.time() + limit_s
    await asyncio.sleep(SETTLE_S)
    while select.select([listening], [], [], 0)[0] and loop.time() < end:
        await asyncio.sleep(0.01)


def _drop_requests_to_connect(listening: socket.socket) -> None:
    """Attach a filter that drops TCP segments with SYN and without ACK: byte 13 of the header has the flags."""
    if not sys.platform.startswith("linux"):
        return
    load, mask, if_equal, answer = 0x30, 0x54, 0x15, 0x06
    program = (_Instruction * 5)(
        _Instruction(load, 0, 0, 13),
        _Instruction(mask, 0, 0, 0x12),
        _Instruction(if_equal, 0, 1, 0x02),
        _Instruction(answer, 0, 0, 0),
        _Instruction(answer, 0, 0, 0xFFFFFFFF),
    )
    try:
        listening.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, bytes(_Program(len(program), program)))
    except OSError as error:  # a sandbox's kernel: connections of the very moment of closing are reset
        logger.warning("the kernel takes no filter: a connection may be lost when this ends: %s", error.strerror)


async def answers(host: str, port: int) -> bool:
    """Tell whether anybody listens there, on this node."""
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(reached, port), 2)
    except (OSError, asyncio.TimeoutError):
        return False
    writer.close()
    return True
