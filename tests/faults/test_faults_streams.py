"""Fifty streams at once, and what they run on is killed, replaced, scaled away: no stream is cut, no text differs."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from cluster.connect import Connection
from serve import endpoints
from serve.spec import ServeSpec
from tests.support import tiny_models
from tests.support.controller import controller_pid

STREAMS = 50
TOKENS = 450
HIDDEN = 192
"""Size of the models: their texts take some seconds, so that a fault comes in the middle of all of them."""


def spec(model: Path, replicas: int = 2) -> ServeSpec:
    tiny = {
        **{"model": str(model), "replicas": replicas, "precision": "fp32", "max_batch": 32},
        "resources": {"cpus_per_replica": 0.5},
    }
    return ServeSpec.model_validate({"models": {"tiny": tiny}, "drain_s": 60, "start_timeout_s": 120})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models with other weights."""
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    one, two = (tiny_models.language_model(at, n, context=512, hidden=HIDDEN) for n, at in enumerate(folders))
    return one, two


@pytest.fixture(scope="module")
def endpoint(cluster: Connection, models: tuple[Path, Path]) -> Iterator[str]:
    yield endpoints.up(spec(models[0]), print)["endpoint"]
    endpoints.down(print)


@dataclass
class Text:
    """One stream: what came of it, and when."""

    body: dict[str, Any]
    text: str = ""
    chunks: int = 0
    ended: bool = False
    error: str | None = None
    version: str = ""
    arrived: list[float] = field(default_factory=list)

    @property
    def longest_gap_s(self) -> float:
        return max((b - a for a, b in zip(self.arrived, self.arrived[1:], strict=False)), default=0.0)


def requests() -> list[dict[str, Any]]:
    """Return the bodies: half of them greedy, half of them seeded, some with a stop string that never comes."""
    bodies = []
    for number in range(STREAMS):
        chosen = {"temperature": 0} if number % 2 else {"temperature": 1, "seed": number, "top_p": 0.9}
        common = {"model": "tiny", "prompt": f"number {number}", "max_tokens": TOKENS, "ignore_eos": True}
        bodies.append({**common, **chosen, **({"stop": "\0never"} if number % 5 == 0 else {}), "stream": True})
    return bodies


async def _fill(client: httpx.AsyncClient, text: Text) -> Text:
    try:
        async with client.stream("POST", "/v1/completions", json=text.body) as answer:
            text.version = answer.headers.get("x-tandem-model-version", "")
            if answer.status_code != 200:
                text.error = f"{answer.status_code} {(await answer.aread()).decode()}"
                return text
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    text.ended = True
                elif line.startswith("data: "):
                    _add(text, json.loads(line.removeprefix("data: ")))
    except httpx.HTTPError as error:
        text.error = repr(error)
    return text


def _add(text: Text, chunk: dict[str, Any]) -> None:
    if "error" in chunk:
        text.error = str(chunk["error"])
        return
    text.text += chunk["choices"][0]["text"]
    text.chunks += 1
    text.arrived.append(time.monotonic())


def streams(endpoint: str, fault: Callable[[], None] | None = None) -> list[Text]:
    """Run all streams together; in the middle of them, the fault."""

    async def run() -> list[Text]:
        async with _client(endpoint) as client:
            texts = [Text(body) for body in requests()]
            tasks = [asyncio.create_task(_fill(client, text)) for text in texts]
            if fault is not None:
                while not all(text.chunks for text in texts):
                    assert not any(text.ended or text.error for text in texts), "too late for a fault"
                    await asyncio.sleep(0.01)
                await asyncio.to_thread(fault)
                assert not any(text.ended for text in texts), "the fault came after a stream's end"
            return list(await asyncio.gather(*tasks))

    return asyncio.run(run())


def waves(endpoint: str, change: Callable[[], None]) -> list[list[Text]]:
    """Run all streams again and again, until a change that takes its time is through and one wave more."""

    async def run() -> list[list[Text]]:
        async with _client(endpoint) as client:
            changing: asyncio.Task[None] | None = None
            done: list[list[Text]] = []
            last = False
            while not last:
                last = changing is not None and changing.done()
                texts = [Text(body) for body in requests()]
                tasks = [asyncio.create_task(_fill(client, text)) for text in texts]
                changing = changing or asyncio.create_task(asyncio.to_thread(change))
                await asyncio.gather(*tasks)
                done.append(texts)
            assert changing is not None
            await changing
            return done

    return asyncio.run(run())


def _client(endpoint: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=endpoint, timeout=120, limits=httpx.Limits(max_connections=None))


def wrong(texts: list[Text], undisturbed: list[Text]) -> list[str]:
    """Return what is not as it would be without a fault."""
    found = []
    for text, before in zip(texts, undisturbed, strict=True):
        if text.error or not text.ended:
            found.append(f"{text.body['prompt']}: {text.error or 'cut'}")
        elif text.text != before.text:
            at = next(n for n, (a, b) in enumerate(zip(text.text + "\0", before.text + "\1", strict=False)) if a != b)
            found.append(f"{text.body['prompt']}: differs at character {at} of {len(before.text)}")
    return found


@pytest.fixture(scope="module")
def undisturbed(endpoint: str) -> list[Text]:
    texts = streams(endpoint)
    assert [text.error for text in texts if text.error] == []
    return texts


def replicas() -> dict[str, int]:
    """Return the pids of the model's replicas that run, by id."""
    deployment = endpoints._details()["applications"]["tandem.tiny"]["deployments"]["engine"]
    return {each["replica_id"]: each["pid"] for each in deployment["replicas"] if each["state"] == "RUNNING"}


def gateways() -> list[int]:
    deployment = endpoints._details()["applications"]["tandem"]["deployments"]["gateway"]
    return [each["pid"] for each in deployment["replicas"] if each["state"] == "RUNNING"]


def wait_for(what: Callable[[], Any], limit_s: float, otherwise: str) -> float:
    began = time.monotonic()
    while not what():
        assert time.monotonic() - began < limit_s, otherwise
        time.sleep(0.1)
    return time.monotonic() - began


def killed(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie", 5, "it lives")


def test_a_replica_that_is_killed_cuts_no_stream(endpoint: str, undisturbed: list[Text]) -> None:
    victim = next(iter(replicas().values()))
    texts = streams(endpoint, lambda: killed(victim))
    assert wrong(texts, undisturbed) == []
    print(f"longest gap: {max(text.longest_gap_s for text in texts):.2f} s")
    wait_for(lambda: len(replicas()) == 2 and victim not in replicas().values(), 60, "it is not replaced")


def test_the_controller_may_be_killed(endpoint: str, undisturbed: list[Text]) -> None:
    controller = controller_pid()
    assert wrong(streams(endpoint, lambda: killed(controller)), undisturbed) == []


def test_a_gateway_that_is_killed_costs_its_clients_an_error_they_may_try_again(endpoint: str) -> None:
    wait_for(lambda: len(gateways()) == 1, 60, "a controller that has come back does not know the gateway")
    (victim,) = gateways()
    texts = streams(endpoint, lambda: killed(victim))
    assert not any(text.ended for text in texts)
    assert all(text.error for text in texts)
    took = wait_for(lambda: _asked(endpoint) == 200, 30, "no gateway comes back")
    print(f"answered again after {took:.1f} s: {sorted({str(text.error)[:60] for text in texts})}")


def test_other_weights_and_fewer_replicas_come_without_a_failed_request_or_a_text_of_both(
    endpoint: str, undisturbed: list[Text], models: tuple[Path, Path]
) -> None:
    done = waves(endpoint, lambda: endpoints.up(spec(models[1], 1), print))
    old = undisturbed[0].version
    for texts in done:
        before = [b for text, b in zip(texts, undisturbed, strict=True) if text.version == old]
        assert wrong([text for text in texts if text.version == old], before) == []
        assert [text.error or "cut" for text in texts if text.error or not text.ended] == []
    assert {text.version for text in done[0]} == {old}
    new = {text.version for text in done[-1]}
    assert len(new | {old}) == 2
    after = streams(endpoint)
    for texts in done:
        late = [(text, a) for text, a in zip(texts, after, strict=True) if text.version != old]
        assert wrong([text for text, _ in late], [a for _, a in late]) == []
    wait_for(lambda: len(replicas()) == 1, 60, "the second replica does not leave")


def _asked(endpoint: str) -> int:
    try:
        body = {"model": "tiny", "prompt": "a", "max_tokens": 1}
        return httpx.post(f"{endpoint}/v1/completions", json=body, timeout=10).status_code
    except httpx.HTTPError:
        return 0
