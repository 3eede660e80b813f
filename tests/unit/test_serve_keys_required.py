"""An endpoint with keys, over a real engine and a real store: who is let in, how much, and what is counted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import openai
import pytest

from serve.api import routes
from serve.api.admission import Admission
from serve.api.doorkeeper import KeyDoorkeeper
from serve.api.own_rates import OwnRates
from serve.fair.turns import Turns
from serve.keys.directory import Directory
from serve.keys.limits import Limits
from serve.keys.meter import Meter, today
from serve.keys.store import Store
from tests.support import in_process
from tests.support.in_process import CARD

HELLO = {"model": "tiny", "prompt": "def add", "max_tokens": 5, "temperature": 0, "ignore_eos": True}


class Endpoint:
    """The gateway with keys, and what it stands on."""

    def __init__(
        self, client: httpx.AsyncClient, store: Store, meter: Meter, turns: Turns, backend: in_process.InProcess
    ) -> None:
        self.client, self.store, self.meter, self.turns, self.backend = client, store, meter, turns, backend

    def key(self, name: str = "alice", **limits) -> dict[str, str]:
        """Make a key and return the header that carries it."""
        return {"authorization": f"Bearer {self.store.create(name, Limits(**limits)).text}"}

    async def complete(self, key: dict[str, str], **changes) -> httpx.Response:
        return await self.client.post("/v1/completions", json={**HELLO, **changes}, headers=key)

    async def used(self, name: str = "alice") -> tuple[int, int, int]:
        await self.meter._exchange([])
        used = self.store.usage(name, today(), today())
        return tuple(sum(getattr(u, n) for u in used) for n in ("requests", "prompt_tokens", "generated_tokens"))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support import tiny_models

    fast = tiny_models.tokenizer(300)
    return tiny_models.export(tmp_path_factory.mktemp("model"), fast, tiny_models.decoder("llama", vocab_size=300))


@pytest.fixture
def with_keys(directory: Path, tmp_path: Path) -> Callable[[Callable[[Endpoint], Awaitable[None]]], None]:
    def run(scenario: Callable[[Endpoint], Awaitable[None]]) -> None:
        async def inside(_: httpx.AsyncClient, backend: in_process.InProcess) -> None:
            store = Store(f"sqlite:///{tmp_path / 'keys.db'}")
            meter = Meter(store, tmp_path / "usage")
            turns = Turns(4, 100, 100)
            gateway = in_process.Gateway(
                backend,
                20_000,
                3,
                admission=Admission(OwnRates(), meter, lambda model: turns, 5.0),
                doorkeeper=KeyDoorkeeper(Directory(store.find)),
            )
            gateway.catalog = {CARD.name: CARD, "digits": in_process.DIGITS}
            transport = httpx.ASGITransport(routes.build(lambda: gateway), raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
                await scenario(Endpoint(client, store, meter, turns, backend))
            await meter.stop()
            assert turns.running == turns.waiting == 0, "every turn was given back"

        in_process.run(directory, inside)

    return run


def test_every_route_but_health_and_static_files_asks_for_a_key(with_keys) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        app = routes.build(lambda: None)  # type: ignore[arg-type, return-value]
        paths = {(method, route.path) for route in app.routes for method in getattr(route, "methods", ())}
        assert len(paths) > 15
        for method, path in paths:
            for other in ({}, {"host": "x/health?"}):
                answer = await endpoint.client.request(method, path.replace("{name}", "tiny"), headers=other)
                assert (answer.status_code == 401) == (path not in ("/health", "/-/healthz", "/")), (method, path)
        for path in ("/nothing", "/page/nothing.js", "/page/app.js/x", "/page"):
            assert (await endpoint.client.get(path)).status_code == 401
        assert (await endpoint.client.get("/page/app.js")).status_code == 200
        assert (await endpoint.client.get("/health/")).status_code == 200

    with_keys(scenario)


def test_health_names_no_model_to_whom_has_no_key(with_keys) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        answer = await endpoint.client.get("/health")
        assert (answer.status_code, answer.json()) == (200, {"status": "ok", "served": 2, "ready": 2})
        endpoint.backend.ready = False
        answer = await endpoint.client.get("/health")
        assert (answer.status_code, answer.json()) == (503, {"status": "starting", "served": 2, "ready": 0})

    with_keys(scenario)


def test_what_is_no_valid_key_gets_one_answer(with_keys) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        good = endpoint.key()["authorization"]
        revoked = endpoint.key("bob")["authorization"]
        endpoint.store.revoke("bob")
        wrong = [
            None, revoked, good.lower(), good.upper(), good + "x", good[:-1], "Bearer", "Bearer  " + good[7:],
            good.replace("Bearer", "Basic"), good[7:], "Bearer tandem-000000000000-" + "A" * 43,
        ]  # fmt: skip
        answers = [await endpoint.complete({"authorization": text} if text else {}) for text in wrong]
        assert {answer.status_code for answer in answers} == {401}
        assert len({answer.content for answer in answers}) == 1
        assert answers[0].json()["error"]["code"] == "invalid_api_key"
        assert (await endpoint.complete({"authorization": good})).status_code == 200
        assert (await endpoint.client.post("/v2/models/tiny/infer")).json().keys() == {"error"}

    with_keys(scenario)


def test_a_key_sees_and_calls_its_models_only(with_keys) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        key = endpoint.key(models=("digits",))
        listed = (await endpoint.client.get("/v1/models", headers=key)).json()["data"]
        assert [model["id"] for model in listed] == ["digits"]
        for answer in (
            await endpoint.complete(key),
            await endpoint.client.get("/v1/models/tiny", headers=key),
            await endpoint.client.get("/v2/models/tiny", headers=key),
            await endpoint.client.post("/v2/models/tiny/infer", headers=key, content=b"{}"),
        ):
            assert answer.status_code == 404
            assert "tiny" not in answer.text.replace("the model 'tiny'", "")
        assert list((await endpoint.client.get("/status", headers=key)).json()) == ["digits"]

    with_keys(scenario)


def test_tokens_are_counted_of_whole_answers_and_of_streams(with_keys) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        key = endpoint.key()
        told = (await endpoint.complete(key)).json()["usage"]
        assert await endpoint.used() == (1, told["prompt_tokens"], 5)
        streamed = await endpoint.complete(key, stream=True, n=2)
        assert streamed.text.rstrip().endswith("[DONE]")
        assert await endpoint.used() == (2, 2 * told["prompt_tokens"], 15)
        assert (await endpoint.complete(key, max_tokens=-1)).status_code == 400
        assert await endpoint.used() == (2, 2 * told["prompt_tokens"], 15), "what is refused is not counted"

    with_keys(scenario)


def test_predictions_count_a_token_a_row(with_keys) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        key = endpoint.key(tokens_per_minute=100, tokens_per_day=100)
        tensor = {"name": "image", "shape": [3, 2], "datatype": "FP32", "data": [[0.123456789] * 2] * 3}
        ask = {"inputs": [tensor], "id": "x" * 1_000}
        answer = await endpoint.client.post("/v2/models/digits/infer", json=ask, headers=key)
        assert answer.status_code == 200
        assert answer.headers["x-ratelimit-remaining-tokens"] == "97"
        assert await endpoint.used() == (1, 3, 0)

    with_keys(scenario)


def test_rates_are_refused_with_a_time_and_told_in_headers(with_keys) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        key = endpoint.key(requests_per_minute=2, tokens_per_minute=10_000)
        first = await endpoint.complete(key)
        assert first.headers["x-ratelimit-limit-requests"] == "2"
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        assert int(first.headers["x-ratelimit-remaining-tokens"]) < 10_000
        await endpoint.complete(key)
        third = await endpoint.complete(key)
        assert third.status_code == 429
        assert third.json()["error"]["code"] == "rate_limit_exceeded"
        assert 20 <= int(third.headers["retry-after"]) <= 30
        assert (await endpoint.complete(endpoint.key("bob"))).status_code == 200

    with_keys(scenario)


def test_concurrency_is_that_of_the_key(with_keys) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        key = endpoint.key(concurrency=1)
        answers = await asyncio.gather(*(endpoint.complete(key, max_tokens=30) for _ in range(3)))
        assert sorted(answer.status_code for answer in answers) == [200, 429, 429]
        assert (await endpoint.complete(key)).status_code == 200

    with_keys(scenario)


def test_concurrency_counts_texts_and_more_than_it_allows_is_no_429(with_keys) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        key = endpoint.key(concurrency=3)
        answers = await asyncio.gather(*(endpoint.complete(key, max_tokens=30, n=2) for _ in range(2)))
        assert sorted(answer.status_code for answer in answers) == [200, 429]
        assert (await endpoint.complete(key, n=3)).status_code == 200, "what the first held came back whole"
        never = await endpoint.complete(endpoint.key("bob", concurrency=2), n=3)
        assert never.status_code == 400
        assert (never.json()["error"]["param"], never.json()["error"]["code"]) == ("n", "invalid_value")
        assert "3 texts" in never.json()["error"]["message"]
        assert "limit is 2 texts at the same time" in never.json()["error"]["message"]
        assert "retry-after" not in never.headers

    with_keys(scenario)


def test_a_budget_ends_a_stream_in_the_middle_and_what_comes_after(with_keys) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        key = endpoint.key(tokens_per_day=20)
        streamed = await endpoint.complete(key, stream=True, max_tokens=100)
        events = [line[6:] for line in streamed.text.splitlines() if line.startswith("data: ")]
        assert "[DONE]" not in events
        assert json.loads(events[-1])["error"]["code"] == "insufficient_quota"
        requests, prompt, generated = await endpoint.used()
        assert requests == 1
        # a chunk may be above the budget; on a busy machine it has many tokens
        assert 20 <= prompt + generated < 20 + 80
        after = await endpoint.complete(key)
        assert (after.status_code, after.headers["x-should-retry"]) == (429, "false")

    with_keys(scenario)


def test_responses_are_admitted_and_counted_the_same_way(with_keys) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        hello = {"model": "tiny", "input": "def add", "temperature": 0, "ignore_eos": True}
        key = endpoint.key(concurrency=1, tokens_per_day=80)
        whole = await endpoint.client.post("/v1/responses", json={**hello, "max_output_tokens": 5}, headers=key)
        told = whole.json()["usage"]
        assert await endpoint.used() == (1, told["input_tokens"], 5)
        streamed = await endpoint.client.post(
            "/v1/responses", json={**hello, "stream": True, "max_output_tokens": 100}, headers=key
        )
        assert "x-tandem-model-version" in streamed.headers
        names = [line[7:] for line in streamed.text.splitlines() if line.startswith("event: ")]
        assert names[0] == "response.created"
        assert names[-2:] == ["response.failed", "error"]
        assert '"code":"insufficient_quota"' in streamed.text
        requests, prompt, generated = await endpoint.used()
        assert (requests, prompt) == (2, 2 * told["input_tokens"])
        assert 80 <= prompt + generated < 80 + 80  # a chunk, which on a busy machine has many tokens
        assert (await endpoint.client.post("/v1/responses", json=hello, headers=key)).status_code == 429
        none = await endpoint.client.post("/v1/responses", json=hello, headers=endpoint.key("bob", models=("digits",)))
        assert none.status_code == 404

    with_keys(scenario)


def test_a_client_that_leaves_gives_everything_back(with_keys) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        key = endpoint.key(concurrency=1)
        task = asyncio.create_task(endpoint.complete(key, max_tokens=200))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.sleep(0.05)
        assert (await endpoint.complete(key)).status_code == 200

    with_keys(scenario)


def test_openais_client_understands_it(with_keys) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        text = endpoint.key(tokens_per_day=1)["authorization"][7:]
        own = openai.AsyncOpenAI(api_key=text, base_url="http://test/v1", http_client=endpoint.client, max_retries=2)
        with pytest.raises(openai.RateLimitError, match="spent"):  # in the middle
            await own.completions.create(model="tiny", prompt="def add", max_tokens=5)
        with pytest.raises(openai.RateLimitError, match="spent"):
            await own.completions.create(model="tiny", prompt="x")
        other = openai.AsyncOpenAI(api_key="wrong", base_url="http://test/v1", http_client=endpoint.client)
        with pytest.raises(openai.AuthenticationError):
            await other.models.list()

    with_keys(scenario)


def test_each_text_that_a_request_asks_for_takes_a_place(with_keys) -> None:
    async def scenario(endpoint: Endpoint) -> None:
        for changes, texts in (({}, 1), ({"n": 2}, 2), ({"prompt": ["def add"] * 3}, 3)):
            request = asyncio.create_task(endpoint.complete(endpoint.key(f"k{texts}"), **changes))
            seen = set()
            while not request.done():
                seen.add(endpoint.turns.running)
                await asyncio.sleep(0)
            assert ((await request).status_code, seen) == (200, {0, texts})

    with_keys(scenario)
