"""What /metrics tells of a real engine's requests: exact counts, from whichever gateway, and nothing that is secret."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as plain

from serve.api import routes
from serve.api.admission import Admission
from serve.api.body import ApiError
from serve.api.doorkeeper import KeyDoorkeeper
from serve.api.gateway import Gateway
from serve.api.own_rates import OwnRates
from serve.fair.turns import Turns
from serve.keys.directory import Directory
from serve.keys.limits import Limits
from serve.keys.meter import Meter
from serve.keys.store import Store
from serve.metrics.busiest import BusiestKeys
from serve.metrics.metrics import Metrics
from serve.metrics.record import Record
from serve.wire import GatewayState
from tests.support import in_process, tiny_models
from tests.support.in_process import CARD, DIGITS

HELLO = {"model": "tiny", "prompt": "def add", "max_tokens": 5, "temperature": 0, "ignore_eos": True}
PROMPT = 4
"""Tokens of the prompt of HELLO."""
SECRET = "a-very-secret-operator"


class Front:
    """A gateway, its client, and the samples that it tells."""

    def __init__(self, gateway: Gateway, backend: in_process.InProcess, store: Store | None) -> None:
        app = routes.build(lambda: gateway)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60)
        self.gateway, self.backend, self.store = gateway, backend, store
        self.key: dict[str, str] = {}

    async def complete(self, **changes: Any) -> httpx.Response:
        return await self.client.post("/v1/completions", json={**HELLO, **changes}, headers=self.key)

    async def scrape(self) -> dict[str, dict[tuple[str, ...], float]]:
        """Return {sample: {label values in the order of the labels' names, but the gateway's: value}}."""
        header = {"authorization": f"Bearer {SECRET}"} if self.store else {}
        answer = await self.client.get("/metrics", headers=header)
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        return read(answer.text)


def read(text: str) -> dict[str, dict[tuple[str, ...], float]]:
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in plain(text):
        for sample in family.samples:
            labels = tuple(value for name, value in sorted(sample.labels.items()) if name != "gateway")
            rows = found.setdefault(sample.name, {})
            assert labels not in rows, "one row for each set of labels"
            rows[labels] = sample.value
    return found


Scenario = Callable[[Front], Awaitable[None]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    fast = tiny_models.tokenizer(300)
    return tiny_models.export(tmp_path_factory.mktemp("model"), fast, tiny_models.decoder("llama", vocab_size=300))


@pytest.fixture
def front(directory: Path) -> Callable[[Scenario], None]:
    """Run a scenario against a gateway without keys."""

    def run(scenario: Scenario) -> None:
        async def inside(_: httpx.AsyncClient, backend: in_process.InProcess) -> None:
            await scenario(Front(made(backend), backend, None))

        in_process.run(directory, inside)

    return run


@pytest.fixture
def with_keys(directory: Path, tmp_path: Path) -> Callable[[Scenario], None]:
    """The same with keys, one of which is shown by name."""

    def run(scenario: Scenario) -> None:
        async def inside(_: httpx.AsyncClient, backend: in_process.InProcess) -> None:
            store = Store(f"sqlite:///{tmp_path / 'keys.db'}")
            meter, turns = Meter(store, tmp_path / "usage"), Turns(4, 100, 100)
            gateway = made(
                backend,
                Record("g1", BusiestKeys(most=1)),
                admission=Admission(OwnRates(), meter, lambda model: turns, 5.0),
                doorkeeper=KeyDoorkeeper(Directory(store.find), SECRET),
            )
            await scenario(Front(gateway, backend, store))
            await meter.stop()
            store.close()

        in_process.run(directory, inside)

    return run


def made(backend: in_process.InProcess, record: Record | None = None, **others: Any) -> Gateway:
    metrics = others.pop("metrics", None) or Metrics(record or Record("g1"))
    gateway = Gateway(backend, 20_000, 3, metrics=metrics, **others)
    gateway.catalog = {card.name: card for card in (CARD, DIGITS)}
    return gateway


def test_requests_and_tokens_are_counted_exactly(front) -> None:
    async def scenario(it: Front) -> None:
        before = await it.scrape()
        assert before["tandem_generated_tokens_total"] == {("tiny",): 0, ("digits",): 0}, "zeros are told, for rate()"
        await it.complete()
        await it.complete(stream=True, n=2)
        await it.complete(max_tokens=1)
        await it.client.get("/v1/models/tiny/")
        told = await it.scrape()
        assert told["tandem_prompt_tokens_total"]["tiny",] == 3 * PROMPT
        assert told["tandem_generated_tokens_total"]["tiny",] == 5 + 10 + 1
        assert told["tandem_requests_total"] == {
            ("tiny", "/v1/completions", "200"): 3,
            ("tiny", "/v1/models/{name}", "200"): 1,
            ("", "/metrics", "200"): 1,
        }
        for name, count in (("time_to_first_token", 3), ("time_per_output_token", 2), ("queue", 3), ("request", 3)):
            assert told[f"tandem_{name}_seconds_count"] == {("tiny",): count, ("digits",): 0}, name
            assert told[f"tandem_{name}_seconds_bucket"]["+Inf", "tiny"] == count
            assert 0 < told[f"tandem_{name}_seconds_sum"]["tiny",] < 60
        first = told["tandem_time_to_first_token_seconds_sum"]["tiny",]
        assert first < told["tandem_request_seconds_sum"]["tiny",]
        assert "tandem_errors_total" not in told
        assert "tandem_key_tokens_total" not in told, "there are no keys"

    front(scenario)


def test_embeddings_and_predictions_are_requests_of_their_models(front) -> None:
    async def scenario(it: Front) -> None:
        tensor = {"name": "image", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}
        answers = (
            await it.client.post("/v1/embeddings", json={"model": "tiny", "input": ["def add", "def add"]}),
            await it.client.post("/v2/models/digits/infer", json={"inputs": [tensor]}),
        )
        assert [answer.status_code for answer in answers] == [200, 200]
        told = await it.scrape()
        assert told["tandem_prompt_tokens_total"] == {
            ("tiny",): answers[0].json()["usage"]["prompt_tokens"],
            ("digits",): 0,
        }
        assert told["tandem_requests_total"] == {
            ("tiny", "/v1/embeddings", "200"): 1,
            ("digits", "/v2/models/{name}/infer", "200"): 1,
        }
        assert told["tandem_request_seconds_count"] == {("tiny",): 1, ("digits",): 1}
        assert told["tandem_time_to_first_token_seconds_count"] == {("tiny",): 0, ("digits",): 0}

    front(scenario)


def test_errors_are_counted_by_their_code_in_the_middle_of_a_stream_too(front) -> None:
    async def scenario(it: Front) -> None:
        await it.complete(max_tokens=-1)
        await it.complete(model="digits")
        it.backend.failure = ApiError(503, "the replica was lost", code="replica_lost")
        assert '"code":"replica_lost"' in (await it.complete(stream=True, max_tokens=200)).text
        assert (await it.complete(max_tokens=200)).status_code == 503
        told = await it.scrape()
        assert told["tandem_errors_total"] == {
            ("invalid_value", "tiny"): 1,
            ("unsupported_task", "digits"): 1,
            ("replica_lost", "tiny"): 2,
        }
        route = "/v1/completions"
        assert told["tandem_requests_total"] == {
            ("tiny", route, "400"): 1,
            ("digits", route, "400"): 1,
            ("tiny", route, "200"): 1,
            ("tiny", route, "503"): 1,
        }

    front(scenario)


def test_what_a_client_makes_up_makes_no_series(front) -> None:
    async def scenario(it: Front) -> None:
        for at in range(20):
            await it.complete(model=f"made-up-{at}")
            await it.client.get(f"/made/up/{at}")
            await it.client.get(f"/v1/models/made/up-{at}")
            await it.client.get(f"/v2/models/made-up-{at}/ready?x={at}")
        told = await it.scrape()
        assert told["tandem_requests_total"] == {
            ("", "/v1/completions", "404"): 20,
            ("", "other", "404"): 20,
            ("", "/v1/models/{name}", "404"): 20,
            ("", "/v2/models/{name}/ready", "404"): 20,
        }
        assert told["tandem_errors_total"] == {("model_not_found", ""): 60, ("not_found", ""): 20}
        assert not any("made-up" in str(rows) for rows in told.values())

    front(scenario)


def test_a_request_whose_client_leaves_and_a_failure_are_counted(front) -> None:
    async def scenario(it: Front) -> None:
        leaving = asyncio.create_task(it.complete(max_tokens=400))
        while not it.backend.replica.load().running:
            await asyncio.sleep(0.001)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)

        async def broken() -> Any:
            raise RuntimeError("broken")

        it.backend.states = broken  # type: ignore[method-assign]
        assert (await it.client.get("/status")).status_code == 500
        del it.backend.states
        told = await it.scrape()
        assert told["tandem_requests_total"] == {("tiny", "/v1/completions", "499"): 1, ("", "/status", "500"): 1}
        assert told["tandem_errors_total"] == {("internal_error", ""): 1}
        assert told["tandem_request_seconds_count"]["tiny",] == 1

    front(scenario)


def test_what_runs_and_what_the_caches_hold_is_told_of_all_replicas(front) -> None:
    async def scenario(it: Front) -> None:
        running = asyncio.create_task(it.complete(max_tokens=400))
        while not it.backend.replica.load().cache_tokens_used:
            await asyncio.sleep(0.001)
        told = await it.scrape()
        assert told["tandem_requests_running"] == {("tiny",): 1, ("digits",): 0}
        assert told["tandem_requests_waiting"] == {("tiny",): 0, ("digits",): 0}
        assert told["tandem_replicas"]["tiny", "ready"] == 1
        assert 0 < told["tandem_cache_tokens_used"]["tiny",] <= told["tandem_cache_tokens_capacity"]["tiny",]
        await running
        it.backend.ready = False
        assert (await it.scrape())["tandem_replicas"]["tiny", "ready"] == 0

    front(scenario)


def test_any_gateway_tells_the_numbers_of_all(front) -> None:
    async def scenario(first: Front) -> None:
        states: dict[str, GatewayState] = {}

        async def reports() -> list[Any]:
            return list(states.values())

        gateways = [made(first.backend, metrics=Metrics(Record(name), reports)) for name in ("a", "b", "c")]
        fronts = [Front(gateway, first.backend, None) for gateway in gateways]
        for requests, it in enumerate(fronts, 1):
            for _ in range(requests):
                await it.complete()
        for gateway in gateways:
            states[gateway.metrics.record.gateway] = GatewayState({}, metrics=gateway.metrics.told(gateway.catalog))
        await fronts[0].complete()
        for it, expected in (
            (fronts[0], {"a": 2, "b": 2, "c": 3}),
            (fronts[1], {"a": 1, "b": 2, "c": 3}),
        ):
            families = {each.name: each for each in plain((await it.client.get("/metrics")).text)}
            requests = families["tandem_requests"].samples
            counted = {s.labels["gateway"]: s.value for s in requests if s.labels["route"] == "/v1/completions"}
            assert counted == expected, "its own as they are now, the others' as they told them"
            assert [s.value for s in families["tandem_gateways"].samples] == [3]
            tokens = sum(s.value for s in families["tandem_generated_tokens"].samples)
            assert tokens == 5 * sum(expected.values())

    front(scenario)


def test_openmetrics_is_told_to_who_asks_for_it(front) -> None:
    async def scenario(it: Front) -> None:
        await it.complete()
        accept = {"accept": "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"}
        answer = await it.client.get("/metrics", headers=accept)
        assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
        names = {family.name for family in openmetrics(answer.text)}
        assert {"tandem_requests", "tandem_queue_seconds", "tandem_cache_tokens_capacity"} <= names

    front(scenario)


def test_keys_are_told_by_name_the_busiest_only(with_keys) -> None:
    async def scenario(it: Front) -> None:
        for name in ("alice", "bob", "carol"):
            it.key = {"authorization": f"Bearer {it.store.create(name, Limits()).text}"}
            await it.complete(stream=name == "bob")
        told = await it.scrape()
        assert told["tandem_key_tokens_total"] == {
            ("alice", "generated", "tiny"): 5,
            ("alice", "prompt", "tiny"): PROMPT,
            ("other", "generated", "tiny"): 10,
            ("other", "prompt", "tiny"): 2 * PROMPT,
        }
        assert told["tandem_generated_tokens_total"]["tiny",] == 15

    with_keys(scenario)


def test_no_secret_prompt_or_answer_is_told(with_keys) -> None:
    async def scenario(it: Front) -> None:
        text = it.store.create("alice", Limits()).text
        it.key = {"authorization": f"Bearer {text}"}
        answer = (await it.complete(prompt="xyzzy plugh", max_tokens=40)).json()["choices"][0]["text"]
        await it.client.get("/v1/models", headers={"authorization": "Bearer tandem-wrong-secret"})
        told = (await it.client.get("/metrics", headers={"authorization": f"Bearer {SECRET}"})).text
        assert 'kind="invalid_api_key"' in told
        for hidden in (text, text.split("-")[1], text.split("-", 2)[2], SECRET, "xyzzy", "wrong-secret", answer):
            assert hidden not in told

    with_keys(scenario)


def test_operators_keys_read_the_state_and_nothing_else(with_keys) -> None:
    async def scenario(it: Front) -> None:
        it.key = {"authorization": f"Bearer {it.store.create('alice', Limits(models=('digits',))).text}"}
        prometheus = {"authorization": f"Bearer {it.store.create('prometheus', Limits(operator=True)).text}"}
        assert (await it.client.get("/metrics")).status_code == 401
        refused = await it.client.get("/metrics", headers=it.key)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "permission_denied")
        assert (await it.client.get("/metrics", headers=prometheus)).status_code == 200
        assert (await it.client.get("/metrics/", headers=it.key)).status_code == 403
        assert list((await it.client.get("/status", headers=prometheus)).json()) == ["tiny", "digits"]
        for method, path in (("POST", "/v1/completions"), ("GET", "/v1/models"), ("POST", "/v2/models/digits/infer")):
            answer = await it.client.request(method, path, json=HELLO, headers=prometheus)
            assert answer.status_code == 403, path

    with_keys(scenario)
