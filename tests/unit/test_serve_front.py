"""The gateway's server over real sockets: slow clients, large heads, drains, shared ports, TLS, ids and the log."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from serve.api.events import EventStream
from serve.front import client, listening
from serve.front.access_log import AccessLog
from serve.front.app import Front
from serve.front.exchange import LEAST_WAIT_S, Exchange
from serve.front.limits import Limits
from serve.front.server import Server
from tests.support import certificates
from tests.support.waiting import until

LIMITS = Limits(head_s=0.3, body_s=0.3, reader_s=0.3, body_bytes_per_s=1000)
POST = b"POST /echo HTTP/1.1\r\nhost: a\r\ncontent-length: 100\r\n\r\n"
STREAM = b"GET /stream HTTP/1.1\r\nhost: a\r\n\r\n"


class Site:
    """A server with a few routes, and what became of their requests."""

    def __init__(self, server: Server, logged: list[Exchange], ended: list[str]) -> None:
        self.server, self.logged, self.ended = server, logged, ended

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.port}"

    async def exchange(self, sent: bytes, limit_s: float = 5) -> bytes:
        """Send, and return all that comes until the connection is closed."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.server.port)
        writer.write(sent)
        try:
            return await asyncio.wait_for(reader.read(), limit_s)
        finally:
            writer.close()


def routes(ended: list[str], gate: asyncio.Event) -> Starlette:
    async def echo(request: Request) -> Response:
        return Response(await request.body())

    async def held(request: Request) -> Response:
        try:
            await gate.wait()
        except asyncio.CancelledError:
            ended.append("held")
            raise
        return JSONResponse({})

    async def stream(request: Request) -> Response:
        async def pieces() -> AsyncIterator[bytes]:
            try:
                yield b"data: 1\n\n"
                await gate.wait()
                yield b"data: 2\n\n"
            finally:
                ended.append("stream")

        return EventStream(pieces())

    async def large(request: Request) -> Response:
        async def pieces() -> AsyncIterator[bytes]:
            try:
                while True:
                    yield b"x" * 65536
            finally:
                ended.append("large")

        return EventStream(pieces())

    paths = {"/echo": echo, "/held": held, "/stream": stream, "/large": large}
    return Starlette(routes=[Route(path, handler, methods=["GET", "POST"]) for path, handler in paths.items()])


@asynccontextmanager
async def serving(
    limits: Limits = LIMITS,
    port: int = 0,
    gate: asyncio.Event | None = None,
    tls: Any = None,
    origins: tuple[str, ...] = (),
) -> AsyncIterator[Site]:
    logged: list[Exchange] = []
    ended: list[str] = []
    app = Front(routes(ended, gate or asyncio.Event()), logged.append, origins=lambda: origins)
    server = Server(app, "127.0.0.1", port, limits, tls, logged.append)
    await server.start()
    try:
        yield Site(server, logged, ended)
    finally:
        await server.leave(0.1)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(scenario())  # type: ignore[arg-type]


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def error(answer: bytes) -> str:
    """Return the code of an answer in OpenAI's shape that ends its connection."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in head
    assert f"content-length: {len(body)}".encode() in head
    code: str = json.loads(body)["error"]["code"]
    return code


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (b"", None),
        (b"GET /ec", "request_timeout"),
        (b"\r\n", "request_timeout"),
        (b"GET /echo HTTP/1.1\r\nhost: a\r\nx: ", "request_timeout"),
        (POST + b"a", "request_timeout"),
        (POST[:-4] + b"\r\nexpect: 100-continue\r\n\r\n", "request_timeout"),
    ],
)
def test_a_request_that_does_not_come_to_its_end_is_ended(sent: bytes, expected: str | None) -> None:
    async def scenario() -> None:
        async with serving() as site:
            answer = (await site.exchange(sent)).removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
            assert (error(answer) if answer else None) == expected
            assert [each.status for each in site.logged] == ([408] if expected else [])
            await until(lambda: site.server.connections == site.server.open_requests == 0)

    run(scenario)


def test_a_body_that_drips_is_ended_and_one_that_is_held_back_is_not() -> None:
    async def drips(site: Site) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", site.server.port)
        writer.write(POST)
        for _ in range(100):
            writer.write(b"a")
            await asyncio.sleep(0.02)
            if site.logged:
                break
        answer = await asyncio.wait_for(reader.read(), 5)
        writer.close()
        return answer

    async def scenario() -> None:
        gate = asyncio.Event()
        async with serving() as site:
            assert error(await drips(site)) == "request_timeout"
        async with serving(replace(LIMITS, body_s=1), gate=gate) as site:
            large = httpx.AsyncClient(base_url=site.url, timeout=20)
            asked = asyncio.create_task(large.post("/held", content=b"a" * 10_000_000))  # which nobody reads
            await asyncio.sleep(1.8)
            gate.set()
            assert (await asked).status_code == 200
            await large.aclose()

    run(scenario)


def test_what_is_no_request_or_too_large_is_said() -> None:
    cases = {
        b"nonsense\r\n\r\n": (400, "invalid_request"),
        b"GET /echo?" + b"a" * 9000 + b" HTTP/1.1\r\n\r\n": (414, "url_too_long"),
        b"GET /echo HTTP/1.1\r\nx: " + b"a" * 40_000 + b"\r\n\r\n": (431, "headers_too_large"),
        b"GET /echo HTTP/1.1\r\n" + b"x: a\r\n" * 101 + b"\r\n": (431, "headers_too_large"),
        b"GET /echo HTTP/1.1\r\nx: " + b"a" * 50_000: (431, "headers_too_large"),  # and its end never comes
        b"POST /echo HTTP/1.1\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n": (400, "invalid_request"),
    }

    async def scenario() -> None:
        async with serving() as site:
            for sent, expected in cases.items():
                answer = await site.exchange(sent)
                assert (status(answer), error(answer)) == expected
            assert [each.status for each in site.logged] == [each for each, _ in cases.values()]

    run(scenario)


def test_a_head_in_small_parts_is_counted_once() -> None:
    async def scenario() -> None:
        async with serving(replace(LIMITS, head_s=5)) as site:
            reader, writer = await asyncio.open_connection("127.0.0.1", site.server.port)
            for part in (
                b"GET /echo HTTP/1.1\r\nconnection: close\r\n",
                *[b"x: " + b"a" * 1000 + b"\r\n"] * 30,
                b"\r\n",
            ):
                writer.write(part)
                await asyncio.sleep(0.002)
            assert status(await reader.read()) == 200
            writer.close()

    run(scenario)


def test_an_idle_connection_ends_and_one_in_use_goes_on() -> None:
    async def scenario() -> None:
        idle_s, now = 0.7, asyncio.get_running_loop().time
        async with serving(replace(LIMITS, idle_s=idle_s)) as site:
            reader, writer = await asyncio.open_connection("127.0.0.1", site.server.port)
            began = now()
            while now() < began + 2 * idle_s:
                writer.write(b"GET /echo HTTP/1.1\r\nhost: a\r\n\r\n")
                assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
                await asyncio.sleep(0.02)
            assert await asyncio.wait_for(reader.read(), 30) == b""
            writer.close()

    run(scenario)


def test_a_client_that_does_not_read_is_cut_and_what_it_held_is_freed() -> None:
    async def scenario() -> None:
        async with serving() as site:
            _, writer = await asyncio.open_connection("127.0.0.1", site.server.port, limit=1)
            writer.write(b"GET /large HTTP/1.1\r\nhost: a\r\n\r\n")
            await until(lambda: site.ended == ["large"])
            assert site.logged[0].cut == "gone"
            assert site.server.connections == 0
            writer.transport.abort()

    run(scenario)


def test_a_client_that_leaves_ends_its_work() -> None:
    async def scenario() -> None:
        async with serving() as site:
            for path in ("/held", "/stream"):
                with pytest.raises(httpx.ReadTimeout):
                    async with httpx.AsyncClient(base_url=site.url, timeout=httpx.Timeout(60, read=0.5)) as impatient:
                        await impatient.get(path)
            await until(lambda: site.ended == ["held", "stream"])
            await until(lambda: [each.cut for each in site.logged] == ["gone", "gone"])

    run(scenario)


def test_requests_that_are_sent_ahead_are_answered_in_turn_and_all_end_with_the_connection() -> None:
    async def scenario() -> None:
        gate = asyncio.Event()
        gate.set()
        async with serving(gate=gate) as site:
            ahead = b"GET /held HTTP/1.1\r\nhost: a\r\n\r\nGET /echo HTTP/1.1\r\nconnection: close\r\n\r\n"
            assert (await site.exchange(ahead)).count(b"HTTP/1.1 200 OK") == 2
            gate.clear()
            with pytest.raises(asyncio.TimeoutError):
                await site.exchange(ahead, 0.2)
            await until(lambda: [each.cut for each in site.logged] == [None, None, "gone"])
            assert site.ended == ["held"]
            reader, writer = await asyncio.open_connection("127.0.0.1", site.server.port)
            writer.write(STREAM)
            assert b"data: 1" in await reader.readuntil(b"data: 1\n\n")
            writer.write(b"nonsense\r\n\r\n")
            assert b"invalid_request" not in await reader.read(), "not in the middle of another answer"
            writer.close()

    run(scenario)


def test_a_request_s_time_ends_it_in_words() -> None:
    async def scenario() -> None:
        async with serving() as site, httpx.AsyncClient(base_url=site.url) as asking:
            late = await asking.get("/held", headers={"x-tandem-timeout-s": "0.1"})
            assert (late.status_code, late.json()["error"]["code"]) == (408, "deadline_exceeded")
            assert late.headers["retry-after"] == "1"
            streamed = (await asking.get("/stream", headers={"x-tandem-timeout-s": "0.1"})).text.split("\n\n")
            assert streamed[0] == "data: 1"
            assert json.loads(streamed[1].removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
            assert site.ended == ["held", "stream"]
            wrong = await asking.get("/held", headers={"x-tandem-timeout-s": "soon"})
            assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "x-tandem-timeout-s")
            assert (await asking.get("/echo", headers={"x-tandem-timeout-s": "5"})).status_code == 200

    run(scenario)


def test_more_connections_than_the_limit_are_told_so() -> None:
    async def scenario() -> None:
        async with serving(replace(LIMITS, connections=2, head_s=5)) as site:
            first = [await asyncio.open_connection("127.0.0.1", site.server.port) for _ in range(2)]
            refused = await site.exchange(b"GET /echo HTTP/1.1\r\nhost: a\r\n\r\n")
            assert (status(refused), error(refused)) == (503, "too_many_connections")
            assert b"retry-after: 1\r\n" in refused
            first[0][1].close()
            await until(lambda: site.server.connections == 1)
            assert status(await site.exchange(b"GET /echo HTTP/1.1\r\nconnection: close\r\n\r\n")) == 200
            first[1][1].close()

    run(scenario)


def test_every_answer_has_the_request_s_id() -> None:
    async def scenario() -> None:
        async with serving() as site, httpx.AsyncClient(base_url=site.url) as asking:
            mine = await asking.get("/echo", headers={"x-request-id": "mine-1"})
            assert mine.headers["x-request-id"] == "mine-1"
            other = await asking.get("/nothing", headers={"x-request-id": "<b>"})
            assert other.headers["x-request-id"].startswith("req-")
            assert b"\r\nx-request-id: req-" in await site.exchange(b"nonsense\r\n\r\n")
            assert [each.request_id for each in site.logged][:2] == ["mine-1", other.headers["x-request-id"]]
            assert (site.logged[0].status, site.logged[0].client) == (200, "127.0.0.1")

    run(scenario)


def test_a_server_that_leaves_loses_nothing() -> None:
    """Two share a port. One leaves under load: no request fails, its stream ends whole, its connections close."""

    async def scenario() -> None:
        gate = asyncio.Event()
        async with serving(Limits(), gate=gate) as old:
            streaming = asyncio.create_task(old.exchange(STREAM, 20))
            await until(lambda: old.server.open_requests == 1)
            kept = httpx.AsyncClient(base_url=old.url)
            await kept.get("/echo")
            async with serving(Limits(), port=old.server.port) as new:
                answers: list[int] = []

                async def ask() -> None:
                    while not leaving.done() or len(new.logged) <= 10:
                        async with httpx.AsyncClient(base_url=old.url) as each:
                            answers.append((await each.get("/echo")).status_code)

                leaving = asyncio.create_task(old.server.leave(10))
                asking = [asyncio.create_task(ask()) for _ in range(8)]
                await until(lambda: not old.server.is_listening)
                assert (await kept.get("/echo")).headers["connection"] == "close"
                gate.set()
                assert b"data: 2" in await streaming
                await asyncio.gather(leaving, *asking)
                assert set(answers) == {200}
                assert old.server.connections == 0
            await kept.aclose()

    run(scenario)


def test_what_is_not_done_in_time_is_cut_by_a_server_that_leaves() -> None:
    async def scenario() -> None:
        async with serving() as site:
            streaming = asyncio.create_task(site.exchange(STREAM))
            await until(lambda: site.server.open_requests == 1)
            await site.server.leave(0.3)
            _, _, said = (await streaming).partition(b"data: 1\n\n")
            assert b'"code": "gateway_leaving"' in said
            assert site.ended == ["stream"]
            assert site.logged[0].cut == "leaving"

    run(scenario)


def test_a_socket_that_leaves_takes_what_waits_and_resets_nothing() -> None:
    async def scenario() -> None:
        with listening.listen("127.0.0.1", 0) as leaving:
            port = leaving.getsockname()[1]
            with socket.create_connection(("127.0.0.1", port)) as waiting:
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(listening.until_empty(leaving), 0.3)
                accepted, _ = leaving.accept()
                await asyncio.wait_for(listening.until_empty(leaving), 1)
                with socket.socket() as late:
                    late.settimeout(0.2)
                    with pytest.raises(TimeoutError):
                        late.connect(("127.0.0.1", port))
                accepted.sendall(b"x")
                assert waiting.recv(1) == b"x"
                accepted.close()

    run(scenario)


def test_tls(tmp_path: Path) -> None:
    from serve.front import tls

    certificate, key = certificates.make(tmp_path, "elsewhere.example")
    (tmp_path / "other").mkdir()
    other, _ = certificates.make(tmp_path / "other", "elsewhere.example")

    async def scenario() -> None:
        async with serving(tls=tls.context(certificate, key)) as site:
            url = f"https://127.0.0.1:{site.server.port}/echo"
            assert await asyncio.to_thread(client.get, url, certificate) == b""
            assert await asyncio.to_thread(client.get, url, other) is None
            assert await asyncio.to_thread(client.get, url) is None
            assert await asyncio.to_thread(client.answers, f"127.0.0.1:{site.server.port}", certificate)
            reader, writer = await asyncio.open_connection("127.0.0.1", site.server.port)
            assert await asyncio.wait_for(reader.read(), 5) == b""  # whoever does not shake hands
            writer.close()

    run(scenario)


def test_the_log_is_a_line_of_json_for_each_request(tmp_path: Path) -> None:
    async def scenario() -> None:
        log = AccessLog(tmp_path / "serve" / "access.jsonl")
        done = Exchange("mine", method="POST", client="10.0.0.1", template="/v1/completions", status=200, key="ada")
        done.prompt_tokens = 7
        done.generated(3)
        log.add(done)
        await log.stop()
        (line,) = [json.loads(each) for each in log.path.read_text().splitlines()]
        assert {line.pop(name) >= 0 for name in ("time", "duration_ms", "ttft_ms")} == {True}
        assert line == {
            "request_id": "mine", "client": "10.0.0.1", "method": "POST", "path": "/v1/completions", "status": 200,
            "key": "ada", "prompt_tokens": 7, "generated_tokens": 3,
        }  # fmt: skip

    run(scenario)


def test_full_logs_are_kept_up_to_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.front.access_log.MOST_BYTES", 10)

    async def scenario() -> None:
        log = AccessLog(tmp_path / "access.jsonl")
        for number in range(8):
            log.add(Exchange(f"r{number}"))
            await log.stop()
        kept = {path.name: json.loads(path.read_text())["request_id"] for path in tmp_path.iterdir()}
        assert kept == {f"access.jsonl.{age}": f"r{8 - age}" for age in range(1, 6)}

    run(scenario)


@pytest.mark.parametrize(
    ("origins", "asking", "expected"),
    [
        (("https://a.example",), "https://a.example", "https://a.example"),
        (("*",), "https://a.example", "*"),
        (("https://a.example",), "https://b.example", None),
        ((), "https://a.example", None),
    ],
)
def test_pages_that_may_ask_read_what_the_front_says(
    origins: tuple[str, ...], asking: str, expected: str | None
) -> None:
    async def scenario() -> None:
        async with serving(origins=origins) as site, httpx.AsyncClient(base_url=site.url) as client:
            for wanted, status in (("0.1", 408), ("soon", 400)):
                sent = {"origin": asking, "x-tandem-timeout-s": wanted}
                answer = await client.get("/held", headers=sent)
                assert (answer.status_code, answer.headers["content-type"]) == (status, "application/json")
                assert answer.headers.get("access-control-allow-origin") == expected
                told = answer.headers.get("access-control-expose-headers", "")
                assert expected is None or "retry-after" in told.split(", ")

    run(scenario)


def test_a_request_waits_for_its_turn_and_for_a_replica_within_one_time() -> None:
    exchange = Exchange()
    assert exchange.patience_s(60) == 60
    exchange.waited_s = 45.0
    assert exchange.patience_s(60) == 15
    exchange.waited_s = 59.9
    assert exchange.patience_s(60) == LEAST_WAIT_S
    assert exchange.patience_s(0.5) == 0.5
    exchange.expires = time.monotonic() - 1
    assert exchange.patience_s(60) == 0
