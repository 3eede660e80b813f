"""Fifty streams at once, and what they run on is killed, replaced, scaled away: no stream is cut, no text differs."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
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
from tests.support.fifty_streams import Text, client, filled, requests, streams, wrong

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


def waves(endpoint: str, change: Callable[[], None]) -> list[list[Text]]:
    """Run all streams again and again, until a change that takes its time is through and one wave more."""

    async def run() -> list[list[Text]]:
        async with client(endpoint) as http:
            changing: asyncio.Task[None] | None = None
            done: list[list[Text]] = []
            last = False
            while not last:
                last = changing is not None and changing.done()
                texts = [Text(body) for body in requests()]
                tasks = [asyncio.create_task(filled(http, text)) for text in texts]
                changing = changing or asyncio.create_task(asyncio.to_thread(change))
                await asyncio.gather(*tasks)
                done.append(texts)
            assert changing is not None
            await changing
            return done

    return asyncio.run(run())


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
