"""How much of an answer is taken for a client that does not read, over both event loops and over TLS: little."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serve.api.events import EventStream
from serve.front import tls
from serve.front.app import Front
from serve.front.exchange import Exchange
from serve.front.limits import Limits
from serve.front.server import Server
from tests.support import certificates
from tests.support.waiting import until

PIECE = b"data: " + b"x" * 1016 + b"\n\n"
PIECES = 2000
MOST_TAKEN = 256
"""Pieces of 1 KiB: 64 in the gateway, 64 in its kernel, and what the client's kernel has room for."""


def connected(port: int, secure: ssl.SSLContext | None) -> socket.socket:
    """Return a client's connection with little room for what comes."""
    opened = socket.socket()
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    opened.connect(("127.0.0.1", port))
    return secure.wrap_socket(opened) if secure else opened


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
@pytest.mark.parametrize("secured", [False, True])
def test_an_answer_that_is_not_read_waits_where_it_is_made(
    run: Callable[[Any], None], secured: bool, tmp_path: Path
) -> None:
    files = certificates.make(tmp_path, "localhost") if secured else None
    taken, logged = [], list[Exchange]()

    async def answer(request: Request) -> Response:
        async def pieces() -> AsyncIterator[bytes]:
            for number in range(PIECES):
                yield PIECE
                taken.append(number)

        return EventStream(pieces())

    async def scenario() -> None:
        app = Front(Starlette(routes=[Route("/", answer)]), logged.append)
        server = Server(app, "127.0.0.1", 0, Limits(reader_s=0.3), tls.context(*files) if files else None)
        await server.start()
        secure = tls.trusting(files[0]) if files else None
        client = await asyncio.to_thread(connected, server.port, secure)
        await asyncio.to_thread(client.sendall, b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
        await until(lambda: logged)
        client.close()
        await server.leave(0.1)

    run(scenario())
    assert [each.cut for each in logged] == ["gone"]
    assert 64 < len(taken) < MOST_TAKEN
