"""Servers for the load generator: a real gateway on a socket, and one that answers what a test writes."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from serve.api import routes
from serve.api.gateway import Gateway
from serve.engines import sampling_defaults
from serve.engines.replica import GenerativeReplica
from serve.engines.torch.torch_engine import TorchEngine
from serve.wire import Identity
from tests.support.in_process import CARD, InProcess

Write = Callable[[str], bytes | None]
"""Takes the path of a request, returns the raw answer; None closes the connection without one."""


@contextmanager
def gateway(directory: Path) -> Iterator[str]:
    """Serve the language model in `directory` as `tiny` from a thread, and yield the address."""
    started: list[uvicorn.Server] = []
    ready = threading.Event()

    async def inside() -> None:
        loaded = TorchEngine.from_directory(directory, precision="fp32", max_batch=4, threads=1)
        replica = GenerativeReplica(loaded, Identity("3", "run-1"), sampling_defaults.read(directory))
        await replica.start()
        own = Gateway(InProcess(replica), max_body_bytes=20_000, max_prompts=3)
        own.catalog = {CARD.name: CARD}
        server = uvicorn.Server(uvicorn.Config(routes.build(lambda: own), port=0, log_level="warning"))
        serving = asyncio.ensure_future(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        started.append(server)
        ready.set()
        await serving
        await replica.stop()

    thread = threading.Thread(target=asyncio.run, args=(inside(),))
    thread.start()
    try:
        assert ready.wait(60)
        port = started[0].servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        for server in started:
            server.should_exit = True
        thread.join(60)


@contextmanager
def scripted(write: Write, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """Answer each request with the bytes that `write` returns for its path and body, then close the connection."""
    ready = threading.Event()
    known: list[tuple[asyncio.AbstractEventLoop, asyncio.Event, int]] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = next((int(x.split(":")[1]) for x in head.splitlines() if x.lower().startswith("content-length")), 0)
        body = (await reader.readexactly(length)).decode()
        if raw := write(head.split()[1] + " " + body):
            writer.write(raw)
            await writer.drain()
        writer.close()

    async def inside() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=tls)
        stop = asyncio.Event()
        known.append((asyncio.get_running_loop(), stop, server.sockets[0].getsockname()[1]))
        ready.set()
        await stop.wait()
        server.close()

    thread = threading.Thread(target=asyncio.run, args=(inside(),))
    thread.start()
    try:
        assert ready.wait(10)
        loop, stop, port = known[0]
        yield f"http{'s' if tls else ''}://127.0.0.1:{port}"
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
