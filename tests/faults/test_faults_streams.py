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

STREAMS = 50
TOKENS = 400
AFTER = 20
"""Tokens that every stream has before the fault: it is in the middle of all of them."""


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
    return tiny_models.language_model(folders[0], context=512), tiny_models.language_model(
        folders[1], seed=1, context=512
    )


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


async def read(client: httpx.AsyncClient, body: dict[str, Any]) -> Text:
    """Read one stream to its end, whatever that is."""
    text = Text(body)
    return await _fill(client, text)


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
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=endpoint, timeout=120, limits=limits) as client:
            texts = [Text(body) for body in requests()]
            tasks = [asyncio.create_task(_fill(client, text)) for text in texts]
            if fault is not None:
                while not all(text.chunks > 1 for text in texts):
                    assert not any(text.ended or text.error for text in texts), "too late for a fault"
                    await asyncio.sleep(0.01)
                await asyncio.to_thread(fault)
                assert not all(text.ended for text in texts), "the fault came after the streams"
            return list(await asyncio.gather(*tasks))

    return asyncio.run(run())


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
    texts = streams(endpoint, lambda: killed(next(iter(replicas().values()))))
    assert wrong(texts, undisturbed) == []
    print(f"longest gap: {max(text.longest_gap_s for text in texts):.2f} s")
    wait_for(lambda: len(replicas()) == 2, 60, "it is not replaced")


def test_the_controller_may_be_killed(endpoint: str, undisturbed: list[Text]) -> None:
    def fault() -> None:
        (controller,) = (p for p in psutil.process_iter(["name"]) if p.info["name"] == "ray::ServeController")
        killed(controller.pid)

    assert wrong(streams(endpoint, fault), undisturbed) == []


def test_other_weights_go_live_without_a_cut_and_no_text_is_of_both(
    endpoint: str, undisturbed: list[Text], models: tuple[Path, Path]
) -> None:
    texts = streams(endpoint, lambda: _up(models[1]))
    assert wrong(texts, undisturbed) == []
    assert {text.version for text in texts} == {undisturbed[0].version}
    after = streams(endpoint)
    assert [text.error for text in after if text.error] == []
    assert sum(text.text != before.text for text, before in zip(after, undisturbed, strict=True)) > STREAMS / 2


def test_a_replica_that_is_scaled_away_ends_its_streams_first(endpoint: str, models: tuple[Path, Path]) -> None:
    before = streams(endpoint)
    texts = streams(endpoint, lambda: _up(models[1], 1))
    assert wrong(texts, before) == []
    wait_for(lambda: len(replicas()) == 1, 60, "it does not leave")


def test_a_gateway_that_is_killed_costs_its_clients_an_error_they_may_try_again(endpoint: str) -> None:
    texts = streams(endpoint, lambda: killed(gateways()[0]))
    assert {bool(text.error) for text in texts if not text.ended} <= {True}
    print({text.error for text in texts})
    took = wait_for(lambda: _asked(endpoint) == 200, 30, "no gateway comes back")
    print(f"answered again after {took:.1f} s")
    assert [text.error for text in streams(endpoint) if text.error] == []


def _up(model: Path, count: int = 2) -> None:
    endpoints.up(spec(model, count), print)


def _asked(endpoint: str) -> int:
    try:
        body = {"model": "tiny", "prompt": "a", "max_tokens": 1}
        return httpx.post(f"{endpoint}/v1/completions", json=body, timeout=10).status_code
    except httpx.HTTPError:
        return 0
