"""What the front knows of a request reaches the engine, and what the routes know reaches the log and the span."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from functools import partial
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from serve.api import routes
from serve.api.gateway import Gateway, ModelCard
from serve.front import spans
from serve.front.app import Front
from serve.front.exchange import Exchange
from serve.front.limits import Limits
from serve.front.server import Server
from serve.metrics import watch
from serve.tracing.spans import Spans
from serve.wire import Chunk, GenerateCall, Identity, Opened
from tests.support.waiting import until

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
ASKED = {"model": "chat", "prompt": "a", "stream": True}


class Recording:
    """A backend that keeps what it was asked; its text has three tokens, and then waits for `gate`."""

    def __init__(self) -> None:
        self.calls: list[GenerateCall] = []
        self.closed = 0
        self.gate = asyncio.Event()

    async def generate(self, model: str, call: GenerateCall, build: str | None = None) -> AsyncGenerator[Any, None]:
        self.calls.append(call)
        try:
            yield Opened(Identity("1", None), 7)
            yield Chunk("abc", 3)
            await self.gate.wait()
            yield Chunk("", 3, "stop")
        finally:
            self.closed += 1

    async def states(self) -> Any:
        return [], Counter()


Scenario = Callable[[str, Recording, list[Exchange]], Awaitable[None]]


def run(scenario: Scenario) -> None:
    async def inside() -> None:
        backend, logged = Recording(), list[Exchange]()
        gateway = Gateway(backend, max_body_bytes=1000, max_prompts=2)  # type: ignore[arg-type]  # generates alone
        gateway.catalog = {"chat": ModelCard("chat", "causal-lm", "1", True, 0, {})}
        server = Server(Front(routes.build(lambda: gateway), logged.append), "127.0.0.1", 0, Limits())
        await server.start()
        try:
            await scenario(f"http://127.0.0.1:{server.port}", backend, logged)
        finally:
            await server.leave(0.1)

    asyncio.run(inside())


def test_what_the_server_refuses_is_counted() -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n"
    refused = {
        b"nonsense\r\n\r\n": ("other", 400, "invalid_request"),
        b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n\r\n": ("other", 414, "url_too_long"),
        b"GET / HTTP/1.1\r\nx: " + b"a" * 50_000: ("other", 431, "headers_too_large"),
        b"GET / HT": ("other", 408, "request_timeout"),
        head + b"\r\n{": ("/v1/completions", 408, "request_timeout"),
        head + b"x-tandem-timeout-s: x\r\n\r\n": ("other", 400, "invalid_value"),
    }

    async def answer(port: int, sent: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(sent)
        answered = await asyncio.wait_for(reader.readline(), 5)
        writer.close()
        await writer.wait_closed()
        return answered

    async def scenario() -> None:
        gateway = Gateway(Recording(), max_body_bytes=1000, max_prompts=2)  # type: ignore[arg-type]  # generates alone
        count = partial(watch.count_refused, gateway.metrics.record)
        limits = Limits(head_s=0.3, body_s=0.3, connections=1)
        server = Server(Front(routes.build(lambda: gateway), count), "127.0.0.1", 0, limits, log=count)
        await server.start()
        for sent, (_, status, _) in refused.items():
            assert (await answer(server.port, sent)).split()[1] == str(status).encode(), sent
            while server.connections:
                await asyncio.sleep(0.01)
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        assert b" 503 " in await answer(server.port, b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        writer.write(b"GET /v2/health/live HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert b" 200 " in await reader.readline()
        writer.close()
        await server.leave(0.1)
        counted = gateway.metrics.record.snapshot(())["counters"]
        told = [(route, status) for route, status, _ in refused.values()]
        told += [("other", 503), ("/v2/health/live", 200)]
        requests = {(route, int(status)): count for (_, route, status), count in counted["tandem_requests_total"]}
        assert requests == Counter(told)
        errors = {kind: count for (_, kind), count in counted["tandem_errors_total"]}
        assert errors == Counter([*(code for *_, code in refused.values()), "too_many_connections"])

    asyncio.run(scenario())


def test_ids_and_traces_reach_the_engine_and_tokens_the_log() -> None:
    async def scenario(url: str, backend: Recording, logged: list[Exchange]) -> None:
        backend.gate.set()
        async with httpx.AsyncClient(base_url=url) as client:
            for path in ("/v1/completions", "/v1/completions/"):
                sent = {"x-request-id": "mine", "traceparent": TRACE, "tracestate": "a=1"}
                assert (await client.post(path, json=ASKED, headers=sent)).headers["x-request-id"] == "mine"
            await client.get("/v1/models/none")
            await client.get("/nothing")
        assert [(call.trace, call.trace_state) for call in backend.calls] == [(TRACE, "a=1")] * 2
        first, second = (call.request_id for call in backend.calls)
        assert first.startswith("cmpl-mine.")
        assert first != second, "two at the same time would be one to the engine"
        told = [(each.template, each.status, each.model, each.prompt_tokens, each.generated_tokens) for each in logged]
        answered = ("/v1/completions", 200, "chat", 7, 3)
        assert told == [
            answered,
            answered,
            ("/v1/models/{name:path}", 404, None, None, None),
            (None, 404) + (None,) * 3,
        ]

    run(scenario)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slots(stream: bool) -> None:
    async def scenario(url: str, backend: Recording, logged: list[Exchange]) -> None:
        with pytest.raises(httpx.ReadTimeout):
            async with httpx.AsyncClient(base_url=url, timeout=httpx.Timeout(60, read=0.5)) as client:
                await client.post("/v1/completions", json={**ASKED, "stream": stream})
        await until(lambda: logged)
        assert (backend.closed, logged[0].cut) == (1, "gone")

    run(scenario)


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_whose_time_is_over_frees_its_slots(stream: bool) -> None:
    async def scenario(url: str, backend: Recording, logged: list[Exchange]) -> None:
        async with httpx.AsyncClient(base_url=url) as client:
            limit = {"x-tandem-timeout-s": "0.2"}
            answer = await client.post("/v1/completions", json={**ASKED, "stream": stream}, headers=limit)
        assert backend.closed == 1
        last = answer.text.strip().split("\n\n")[-1].removeprefix("data: ")
        assert json.loads(last)["error"]["code"] == "deadline_exceeded"
        assert answer.status_code == (200 if stream else 408)

    run(scenario)


def test_a_response_whose_time_is_over_ends_in_its_own_form() -> None:
    async def scenario(url: str, backend: Recording, logged: list[Exchange]) -> None:
        async with httpx.AsyncClient(base_url=url) as client:
            body = {"model": "chat", "input": "a", "stream": True}
            answer = await client.post("/v1/responses", json=body, headers={"x-tandem-timeout-s": "0.2"})
        assert backend.closed == 1
        assert [line for line in answer.text.splitlines() if line.startswith("event: ")][-2:] == [
            "event: response.failed",
            "event: error",
        ]

    run(scenario)


def test_a_span_is_below_the_client_s_and_tells_nothing_of_the_prompt() -> None:
    kept = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    done = Exchange("mine", method="POST", trace=TRACE)
    with spans.of(Spans(provider, "tandem.gateway"), done):
        done.template, done.status, done.model, done.prompt_tokens = "/v1/completions", 200, "chat", 7
    (span,) = kept.get_finished_spans()
    assert span.name == "POST /v1/completions"
    assert span.parent is not None
    assert f"{span.parent.trace_id:032x}-{span.parent.span_id:016x}" == TRACE[3:-3]
    assert done.trace == f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}-01"
    assert dict(span.attributes or {}) == {
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
        "gen_ai.request.model": "chat",
        "gen_ai.usage.input_tokens": 7,
        "tandem.request_id": "mine",
    }
    kept.clear()
    failed = Exchange("mine", method="POST")
    with pytest.raises(ValueError, match="words"), spans.of(Spans(provider, "tandem.gateway"), failed):
        raise ValueError("words of the prompt")
    (span,) = kept.get_finished_spans()
    assert (dict(span.attributes or {})["error.type"], span.status.is_ok) == ("ValueError", False)
    assert "words" not in span.to_json()
