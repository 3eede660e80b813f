"""A request's trace goes from the client through the gateway and the channel to the engine's steps, on real parts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanKind

from serve.api import routes
from serve.api.gateway import Gateway, ModelCard
from serve.channel import server as channel
from serve.deploy.backend import RayBackend
from serve.deploy.model_replica import answered, traced
from serve.engines import stats
from serve.engines.protocol import GenerationRequest, SamplingParams
from serve.engines.replica import GenerativeReplica
from serve.engines.torch.torch_engine import TorchEngine, TorchEngineOptions
from serve.front.app import Front
from serve.front.limits import Limits
from serve.front.server import Server
from serve.tracing.spans import Spans
from serve.wire import Identity, Load, ReplicaState
from tests.support import predictive, tiny_models

SECRET = b"s" * 32
TRACE, ABOVE = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
HEADERS = {"traceparent": f"00-{TRACE}-{ABOVE}-01", "tracestate": "vendor=1,other=2"}
PROMPT = "for x in range(10): print(x) # marmalade " * 2
GREEDY = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "stop": ["~marmalade~"], "ignore_eos": True}


class Site:
    """A gateway over its replicas' channels, and the spans of all of them."""

    def __init__(self, url: str, kept: InMemorySpanExporter, channels: dict[str, channel.Server]) -> None:
        self.kept, self.channels = kept, channels
        self.client = httpx.AsyncClient(base_url=url, headers=HEADERS, timeout=60)

    async def spans(self, requests: int = 1, calls: int = 1) -> dict[str, list[ReadableSpan]]:
        """Return the spans of so many requests and calls, once they are over: by name, in the order they began."""
        for _ in range(500):
            kept = self.kept.get_finished_spans()
            served = [each.name.startswith(("POST", "GET")) for each in kept if each.kind is SpanKind.SERVER]
            if (served.count(True), served.count(False)) == (requests, calls):
                break
            await asyncio.sleep(0.01)
        else:
            raise AssertionError(f"not within 5 s: {[each.name for each in kept]}")
        self.kept.clear()
        found: dict[str, list[ReadableSpan]] = {}
        for span in sorted(kept, key=lambda each: each.start_time or 0):
            found.setdefault(span.name, []).append(span)
        return found


@asynccontextmanager
async def serving(replicas: dict[str, tuple[str, Any]], sampler: Any = None) -> AsyncIterator[Site]:
    """Serve replicas, as name of the model and replica, by their ids."""
    kept = InMemorySpanExporter()
    provider = TracerProvider(sampler=sampler)
    provider.add_span_processor(SimpleSpanProcessor(kept))
    backend, channels = RayBackend("x", SECRET, patience_s=20), {}
    states = []
    for replica_id, (model, replica) in replicas.items():
        spans = Spans(provider, f"tandem.{replica_id}")
        channels[replica_id] = channel.Server(replica_id, 4, SECRET, traced(spans, model, partial(answered, replica)))
        address = await channels[replica_id].start("127.0.0.1")
        states.append(ReplicaState(model, replica_id, "3", Load(0, 0, 0.0), {}, address, 4, build="b"))
    backend._heard(states)
    gateway = Gateway(backend, max_body_bytes=20_000, max_prompts=3)
    tasks = {"tiny": "causal-lm", **predictive.TASKS}
    gateway.catalog = {
        model: ModelCard(model, tasks[model], "3", model == "tiny", 1700000000, {}) for model, _ in replicas.values()
    }
    front = Front(routes.build(lambda: gateway), lambda _: None, spans=Spans(provider, "tandem.gateway"))
    server = Server(front, "127.0.0.1", 0, Limits())
    await server.start()
    site = Site(f"http://127.0.0.1:{server.port}", kept, channels)
    try:
        yield site
    finally:
        await site.client.aclose()
        await server.leave(0.1)
        await backend.stop()
        for each in channels.values():
            await each.close()


def run_text(folder: Path, scenario: Callable[[Site], Awaitable[None]], ids: tuple[str, ...], **how: Any) -> None:
    """Run a scenario over replicas of one language model, all on one engine."""

    async def inside() -> None:
        engine = TorchEngine.from_directory(folder, precision="fp32", max_batch=4, threads=1)
        replica = GenerativeReplica(engine, Identity("3", "run-1", "b"), {})
        await replica.start()
        try:
            async with serving({each: ("tiny", replica) for each in ids}, **how) as site:
                await scenario(site)
        finally:
            await replica.stop()

    asyncio.run(inside())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.language_model(tmp_path_factory.mktemp("model"), context=512)


def below(span: ReadableSpan, parent: ReadableSpan) -> bool:
    assert span.parent is not None
    return (span.parent.trace_id, span.parent.span_id) == (parent.context.trace_id, parent.context.span_id)


def told(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def test_a_text_s_spans_reach_from_the_client_to_the_engine_s_steps(folder: Path) -> None:
    async def scenario(site: Site) -> None:
        for stream in (False, True):  # the second finds the prompt in the cache
            await site.client.post("/v1/completions", json={**GREEDY, "max_tokens": 9, "stream": stream})
        found = await site.spans(requests=2, calls=2)
        assert sorted(found) == [
            "POST /v1/completions",
            "engine.decode",
            "engine.prefill",
            "engine.queue",
            "text_completion tiny",
        ]
        asked = told(found["text_completion tiny"][0])["gen_ai.usage.input_tokens"]
        for gateway, call, *parts, cached in zip(*found.values(), (0, (asked - 1) // 32 * 32), strict=True):
            assert gateway.parent is not None
            assert (f"{gateway.parent.trace_id:032x}", f"{gateway.parent.span_id:016x}") == (TRACE, ABOVE)
            assert gateway.context.trace_state.to_header() == call.context.trace_state.to_header() == "vendor=1,other=2"
            assert below(call, gateway)
            assert all(below(part, call) for part in parts)
            about = told(call)
            assert about.pop("tandem.request_id").startswith("cmpl-")
            assert about.pop("gen_ai.request.seed", None) is None, "greedy"
            assert 0 < about.pop("gen_ai.response.time_to_first_chunk") < 60
            assert about == {
                "gen_ai.operation.name": "text_completion",
                "gen_ai.provider.name": "tandem",
                "gen_ai.request.model": "tiny",
                "gen_ai.response.model": "tiny@3",
                "gen_ai.request.max_tokens": 9,
                "gen_ai.request.temperature": 0,
                "gen_ai.usage.input_tokens": asked,
                "gen_ai.usage.output_tokens": 9,
                "gen_ai.usage.cache_read.input_tokens": cached,
                "gen_ai.response.finish_reasons": ("length",),
                "tandem.engine.steps": 9,
                "tandem.engine.preemptions": 0,
            }
            queue, prefill, decode = parts
            assert [told(part) for part in parts] == [{}, {"tandem.engine.steps": 1}, {"tandem.engine.steps": 8}]
            times = [call.start_time, queue.start_time, queue.end_time, prefill.start_time, prefill.end_time]
            times += [decode.start_time, decode.end_time, call.end_time]
            assert times == sorted(times)
            assert (queue.end_time, prefill.end_time) == (prefill.start_time, decode.start_time)
            assert told(gateway)["gen_ai.usage.output_tokens"] == 9
            assert 0 <= told(gateway)["tandem.queue_seconds"] < 60
        everything = repr([(each.name, told(each), each.events) for spans in found.values() for each in spans])
        assert "marmalade" not in everything
        assert "range" not in everything

    run_text(folder, scenario, ("r1",))


def test_vectors_refusals_and_clients_that_leave_are_told(folder: Path) -> None:
    async def scenario(site: Site) -> None:
        await site.client.post("/v1/embeddings", json={"model": "tiny", "input": ["marmalade", "b c"]})
        found = await site.spans()
        (call,), (compute,) = found["embeddings tiny"], found["engine.compute"]
        assert "engine.queue" in found
        about = told(call)
        assert (about["tandem.rows"], about["gen_ai.embeddings.dimension.count"]) == (2, 64)
        assert about["gen_ai.operation.name"] == "embeddings"
        assert about["gen_ai.usage.input_tokens"] > 2
        assert told(compute) == {"tandem.engine.steps": 2}
        assert below(compute, call)

        refused = await site.client.post("/v1/completions", json={**GREEDY, "prompt": "marmalade" * 500})
        found = await site.spans()
        assert refused.status_code == 400
        (call,) = found["text_completion tiny"]
        assert told(call)["error.type"] == "context_length_exceeded"
        assert call.status.is_unset, "the client is at fault"
        assert "engine.queue" not in found

        async with site.client.stream(
            "POST", "/v1/completions", json={**GREEDY, "max_tokens": 400, "stream": True}
        ) as answer:
            await anext(answer.aiter_lines())
        found = await site.spans()
        (gateway,), (call,) = found["POST /v1/completions"], found["text_completion tiny"]
        assert told(gateway)["tandem.cut"] == "gone"
        assert told(call)["tandem.cancelled"] is True
        assert "gen_ai.response.finish_reasons" not in told(call)

    run_text(folder, scenario, ("r1",))


def test_a_stream_that_goes_on_at_another_replica_stays_in_its_trace(folder: Path) -> None:
    async def scenario(site: Site) -> None:
        body = {**GREEDY, "max_tokens": 300, "stream": True}
        lost = None
        async with site.client.stream("POST", "/v1/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                if lost is None and '"text"' in line:
                    lost = next(name for name, each in site.channels.items() if each.running)
                    await site.channels[lost].leave(0)
        found = await site.spans(calls=2)
        first, second = found["text_completion tiny"]
        (gateway,) = found["POST /v1/completions"]
        assert below(first, gateway)
        assert below(second, gateway)
        scopes = [each.instrumentation_scope.name for each in (first, second) if each.instrumentation_scope]
        assert scopes == [f"tandem.{lost}", f"tandem.{next(iter(site.channels.keys() - {lost}))}"]
        assert told(first)["tandem.cancelled"] is True
        before = told(second)["tandem.resumed_after_tokens"]
        assert 0 < before < 300
        assert told(second)["gen_ai.usage.output_tokens"] == 300 - before
        assert told(second)["gen_ai.response.finish_reasons"] == ("length",)
        assert told(gateway)["gen_ai.usage.output_tokens"] == 300

    run_text(folder, scenario, ("r1", "r2"))


def test_a_trace_that_the_gateway_leaves_out_is_left_out_below_and_notes_nothing(folder: Path) -> None:
    async def scenario(site: Site) -> None:
        answer = await site.client.post("/v1/completions", json={**GREEDY, "max_tokens": 3})
        assert answer.status_code == 200
        assert await site.spans(requests=0, calls=0) == {}

    run_text(folder, scenario, ("r1",), sampler=ALWAYS_OFF)


def test_predictions_have_a_span_too(tmp_path: Path) -> None:
    async def scenario() -> None:
        task, model = predictive.models(tmp_path)["opinions"]
        replica = predictive.replica(task, model)
        await replica.start()
        async with serving({"r1": ("opinions", replica)}) as site:
            body = {"inputs": [{"name": "text", "shape": [2], "datatype": "BYTES", "data": ["marmalade", "b"]}]}
            answer = await site.client.post("/v2/models/opinions/infer", json=body)
            assert answer.status_code == 200, answer.text
            found = await site.spans()
        await replica.stop()
        (gateway,) = found["POST /v2/models/{name}/infer"]
        (call,), (queue,), (compute,) = (found[each] for each in ("infer opinions", "engine.queue", "engine.compute"))
        assert below(call, gateway)
        assert below(queue, call)
        assert below(compute, call)
        assert told(call)["tandem.rows"] == 2
        assert told(call)["gen_ai.operation.name"] == "infer"
        assert "marmalade" not in repr([told(each) for each in (gateway, call, queue, compute)])

    asyncio.run(scenario())


def test_an_engine_notes_who_gave_way_and_nothing_where_nobody_asks() -> None:
    async def scenario() -> None:
        tokenizer = tiny_models.tokenizer(vocabulary=300)
        model = tiny_models.decoder("llama", 0, 0.2, vocab_size=300, max_position_embeddings=128, eos_token_id=None)
        room = 2 * 2 * 2 * 32 * 16 * 4 * 7
        options = TorchEngineOptions(max_batch=4, cache_memory_bytes=room, threads=1, runner="torch")
        engine = TorchEngine(model, tokenizer, options)
        await engine.start()

        async def text(at: int, wanted: bool) -> stats.RequestStats | None:
            noted = stats.begin() if wanted else None
            params = SamplingParams(temperature=0.0, max_tokens=80, ignore_eos=True)
            prompt = tuple(range(1 + at, 21 + at))
            async for _ in engine.generate(GenerationRequest(str(at), prompt, params, stats=stats.current())):
                pass
            return noted

        every = await asyncio.gather(*(text(at, wanted=True) for at in range(4)))
        load = engine.load()
        assert 0 < load.preemptions == sum(each.preemptions for each in every if each)
        assert all(each.steps >= 80 for each in every if each)
        before = [(each.steps, each.last_output) for each in every if each]
        assert await text(9, wanted=False) is None
        assert [(each.steps, each.last_output) for each in every if each] == before
        await engine.stop()

    asyncio.run(scenario())
