"""What the front knows of a request reaches the engine, and what the routes know reaches the log and the span."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
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
from serve.wire import Chunk, GenerateCall, Identity, Opened

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
ASKED = {"model": "chat", "prompt": "a", "stream": True}


class Recording:
    """A backend that keeps what it was asked; its text has three tokens, and then waits for `gate`."""

    def __init__(self) -> None:
        self.calls: list[GenerateCall] = []
        self.closed = 0
        self.gate = asyncio.Event()

    async def generate(self, model: str, call: GenerateCall) -> AsyncGenerator[Any, None]:
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


def test_ids_and_traces_reach_the_engine_and_tokens_the_log() -> None:
    async def scenario(url: str, backend: Recording, logged: list[Exchange]) -> None:
        backend.gate.set()
        async with httpx.AsyncClient(base_url=url) as client:
            for path in ("/v1/completions", "/v1/completions/"):
                sent = {"x-request-id": "mine", "traceparent": TRACE}
                assert (await client.post(path, json=ASKED, headers=sent)).headers["x-request-id"] == "mine"
            await client.get("/v1/models/none")
            await client.get("/nothing")
        assert [call.trace for call in backend.calls] == [TRACE] * 2
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
            async with httpx.AsyncClient(base_url=url, timeout=0.2) as client:
                await client.post("/v1/completions", json={**ASKED, "stream": stream})
        for _ in range(200):
            await asyncio.sleep(0.01)
            if logged:
                break
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


def test_a_span_is_below_the_client_s_and_the_engine_s_will_be_below_it() -> None:
    kept = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    done = Exchange("mine", method="POST", trace=TRACE)
    with spans.of(done, provider):
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
    untouched = Exchange("mine", trace=TRACE)
    with spans.of(untouched):
        assert untouched.trace == TRACE, "nobody has said where spans go"
