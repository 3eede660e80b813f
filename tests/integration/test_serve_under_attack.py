"""Too much load, clients that do not read, do not end or leave: the gateway's own process, a real model behind it.

What a figure is goes to the output (`pytest -s`); what is asserted has room for a machine that does other things too.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from collections import Counter
from collections.abc import Coroutine, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import httpx
import pytest

from serve.bench.http import Client, Connection
from serve.bench.settings import Target
from serve.front.limits import Limits
from tests.support import own_gateway, tiny_models
from tests.support.own_gateway import Running, until

LIMITS = Limits(head_s=2, body_s=2, idle_s=3, reader_s=3)
OVERLOAD_S = float(os.environ.get("OVERLOAD_S", "3"))
"""How long: OVERLOAD_S=30 is the battery's."""
TIMES = 10
WAIT_S = 2.0
"""`gateway.max_wait_s`."""
DEADLINE_S = 20.0
"""What each request of the overload asks for itself."""
CONTEXT = 4096
MOST_GROWTH_MIB = 200.0
DROPPED = 50
LONG = {"model": "wide", "prompt": "a", "max_tokens": CONTEXT - 2, "ignore_eos": True, "stream": True}
SCORED = {**LONG, "logprobs": 5, "model": "narrow"}
"""Some 300 bytes a token: 1.2 MB in all."""
SHORTER = {**SCORED, "max_tokens": 600}
"""180 kB: more than is taken for a client that does not read."""

UNREAD = [SCORED] * 2 + [SHORTER] * 8
"""As many as may be on their way to the narrow model."""


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("attacked")
    model = tiny_models.language_model(folder / "model", context=CONTEXT)
    slots = {"narrow": 8, "wide": 64}
    with own_gateway.running(own_gateway.Setup(model, folder, LIMITS, slots, max_wait_s=WAIT_S)) as running:
        yield running


@pytest.fixture(autouse=True)
def normal_again(endpoint: Running) -> Iterator[None]:
    """Whatever came over it, the endpoint is idle soon, has not grown, and answers."""
    before = endpoint.rss_mib()
    yield
    took = until(endpoint.is_idle, 10, "something of the attack still runs")
    growth = endpoint.rss_mib() - before
    print(f"\nidle after {took:.2f} s; the gateway has grown by {growth:.1f} MiB")
    assert growth < MOST_GROWTH_MIB
    for model in endpoint.setup.slots:
        assert ask(endpoint, model) == 200


def ask(endpoint: Running, model: str = "wide") -> int:
    body = {"model": model, "prompt": "a", "max_tokens": 4, "ignore_eos": True}
    return httpx.post(f"{endpoint.url}/v1/completions", json=body, timeout=30).status_code


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)


def percentile(values: list[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]


def figures(values: list[float]) -> str:
    """Return what is worth telling of some times."""
    return ", ".join(f"p{100 * part:.0f} {1000 * percentile(values, part):.0f} ms" for part in (0.5, 0.95, 0.99))


# -- ten times what it can do -----------------------------------------------------------------------------------------


@dataclass
class Load:
    """An open loop: requests begin when they are due, whatever became of those before them."""

    endpoint: Running
    client: Client
    body: bytes = json.dumps(
        {"model": "narrow", "prompt": "a", "max_tokens": 100, "ignore_eos": True, "stream": True}
    ).encode()
    whole_s: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)
    wrong: Counter[str] = field(default_factory=Counter)

    async def one(self, due: float) -> None:
        head = self.client.head("POST", "/v1/completions", len(self.body), None)
        head = head[:-2] + f"x-tandem-timeout-s: {DEADLINE_S:g}\r\n\r\n".encode()
        connection = await self.client.take()
        await connection.request(head, self.body, streams=True)
        took, answer = time.monotonic() - due, connection.answer
        if connection.status == 429:
            self.refused_s.append(took)
            self.wrong.update(amiss(connection))
        elif connection.status == 200 and answer.whole and answer.first is not None:
            self.whole_s.append(took)
            self.first_s.append(answer.first - due)
        else:
            self.wrong[f"{connection.status} {answer.error}"] += 1
        self.client.give(connection)

    async def offer(self, rate: float, seconds: float) -> None:
        began, tasks = time.monotonic() + 0.1, []
        for number in range(int(rate * seconds)):
            due = began + number / rate
            if (pause := due - time.monotonic()) > 0:
                await asyncio.sleep(pause)
            tasks.append(asyncio.create_task(self.one(due)))
        await asyncio.gather(*tasks)


def amiss(refused: Connection) -> list[str]:
    """Return what a refusal lacks of OpenAI's shape and of a time to come again."""
    error = getattr(refused.answer, "value", {}).get("error", {})
    told = (error.get("type"), error.get("code"), error.get("param"))
    lacks = [] if told == ("rate_limit_error", "overloaded", None) and error["message"] else [f"error: {error}"]
    return lacks if int(refused.headers.get("retry-after", 0)) >= 1 else [*lacks, "no retry-after"]


def test_ten_times_the_load_that_it_can_do_is_refused_at_once_and_the_rest_is_served(endpoint: Running) -> None:
    """The battery's S5."""

    async def scenario() -> None:
        load = Load(endpoint, Client(Target("127.0.0.1", endpoint.port, "", False)))
        began, slots = time.monotonic(), endpoint.setup.slots["narrow"]
        await asyncio.gather(*(load.one(time.monotonic()) for _ in range(2 * slots)))
        able = 2 * slots / (time.monotonic() - began)
        alone, load = load, Load(endpoint, load.client)
        began = time.monotonic()
        await load.offer(TIMES * able, OVERLOAD_S)
        served = len(load.whole_s) / (time.monotonic() - began)
        print(
            f"\n{TIMES * able:.0f} requests/s where {able:.0f} are possible: {len(load.whole_s)} served, {served:.0f}/s"
            f", first token {figures(load.first_s)}; {len(load.refused_s)} refused, {figures(load.refused_s)}"
        )
        assert (alone.wrong, alone.refused_s, load.wrong) == (Counter(), [], Counter())
        assert len(load.refused_s) > len(load.whole_s) > 0
        assert percentile(load.refused_s, 0.9) < WAIT_S / 2, "refusals wait"
        assert max(load.whole_s) < DEADLINE_S
        load.client.close()

    run(scenario())


# -- clients that leave, and that do not read -------------------------------------------------------------------------


class Raw:
    """A connection of a client that does not behave."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.closed_after_s = 0.0
        self.told = b""

    @classmethod
    async def open(cls, endpoint: Running, sent: bytes = b"", buffer_bytes: int | None = None) -> Raw:
        opened = socket.socket()
        if buffer_bytes is not None:  # before it connects: the window is told with the first segment
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        opened.setblocking(False)
        await asyncio.get_running_loop().sock_connect(opened, ("127.0.0.1", endpoint.port))
        raw = cls(*await asyncio.open_connection(sock=opened, limit=2**10 if buffer_bytes else 2**16))
        raw.writer.write(sent)
        return raw

    async def until_closed(self, drip: bytes = b"") -> None:
        """Send a byte now and then, and read until the other end closes."""
        began = time.monotonic()
        dripping = asyncio.create_task(self._drip(drip)) if drip else None
        with suppress(ConnectionResetError):
            self.told = await self.reader.read()
        self.closed_after_s = time.monotonic() - began
        if dripping is not None:
            dripping.cancel()
        self.writer.close()

    async def _drip(self, drip: bytes) -> None:
        while True:
            await asyncio.sleep(0.25)
            self.writer.write(drip)


def post(body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    return POST + b"content-length: %d\r\n\r\n" % len(content) + content


def left(endpoint: Running, since: int) -> list[dict[str, Any]]:
    """Return the log's lines, from line `since` on, of clients that left before their answers ended."""
    return [line for line in endpoint.logged()[since:] if line.get("cut") == "gone"]


def test_fifty_clients_that_drop_in_the_middle_of_their_streams_leave_nothing_running(endpoint: Running) -> None:
    """The battery's S7."""

    before = len(endpoint.logged())
    running = partial(endpoint.gauge, "tandem_requests_running")

    async def scenario() -> None:
        clients = [await Raw.open(endpoint, post(LONG)) for _ in range(DROPPED)]
        for client in clients:
            await client.reader.readuntil(b"data: ")
        await asyncio.to_thread(until, lambda: running() == DROPPED, 10, "they do not run together")
        for number, client in enumerate(clients):
            client.writer.transport.abort() if number % 2 else client.writer.close()
        took = await asyncio.to_thread(until, lambda: not running(), 10, "texts that nobody reads go on")
        print(f"\nthe last of {DROPPED} texts had ended {took:.2f} s after the clients left")

    run(scenario())
    until(lambda: len(left(endpoint, before)) == DROPPED, 30, "not all are logged as gone")


def test_clients_that_do_not_read_are_cut_and_others_go_on(endpoint: Running) -> None:
    """Long texts are cut in their middle. Of those that are complete, and only not read, none keeps others out."""
    before = len(endpoint.logged())

    async def scenario() -> None:
        began = time.monotonic()
        slow = [await Raw.open(endpoint, post(body), 4096) for body in UNREAD]
        async with httpx.AsyncClient(base_url=endpoint.url, timeout=60) as client:
            usage = {"include_usage": True}
            beside = await client.post("/v1/completions", json={**LONG, "max_tokens": 600, "stream_options": usage})
            while (later := await client.post("/v1/completions", json={**SHORTER, "max_tokens": 4})).status_code == 429:
                pass
            took, answered = time.monotonic() - began, time.time()
        assert '"completion_tokens":600' in beside.text
        assert all(answer.text.endswith("data: [DONE]\n\n") for answer in (beside, later))
        await asyncio.to_thread(
            until, lambda: len(left(endpoint, before)) == len(slow), 30, "clients that do not read are not cut"
        )
        cut = [line["time"] + line["duration_ms"] / 1000 for line in left(endpoint, before)]
        assert answered < min(cut), "a request gets its turn only when those that do not read are cut"
        print(f"\ntwo streams beside them took {took:.1f} s; the last was cut after {time.monotonic() - began:.1f} s")
        for each in slow:
            each.writer.transport.abort()

    run(scenario())


# -- clients that do not come to an end -------------------------------------------------------------------------------


POST = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
LATE = b"HTTP/1.1 408 Request Timeout"
ENDLESS = {
    "heads": (500, POST + b"x-slow: ", b"a", LATE),
    "bodies": (50, POST + b"content-length: 1000\r\n\r\n{", b" ", LATE),
    "silent": (50, b"", b"", b""),
    "idle": (50, b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n", b"", b"HTTP/1.1 200 OK"),
}
"""How many, what is sent at once and what drips then, and the first line that is answered."""


def test_connections_that_do_not_come_to_an_end_are_closed_and_others_are_answered(endpoint: Running) -> None:
    """The battery's S6: 500 heads and 50 bodies without an end, and 100 connections on which nothing comes."""

    async def scenario() -> None:
        attackers = {
            kind: [await Raw.open(endpoint, sent) for _ in range(count)]
            for kind, (count, sent, _, _) in ENDLESS.items()
        }
        closing = [
            asyncio.create_task(each.until_closed(ENDLESS[kind][2]))
            for kind, group in attackers.items()
            for each in group
        ]
        normal: list[float] = []
        async with httpx.AsyncClient(base_url=endpoint.url, timeout=30) as client:
            while not all(task.done() for task in closing):
                began = time.monotonic()
                answer = await client.post("/v1/completions", json={**LONG, "stream": False, "max_tokens": 8})
                normal.append(time.monotonic() - began)
                assert answer.status_code == 200
        last = {kind: max(each.closed_after_s for each in group) for kind, group in attackers.items()}
        print(
            f"\n{len(normal)} requests meanwhile: {figures(normal)}; the last closed after"
            f" {', '.join(f'{kind} {took:.1f} s' for kind, took in last.items())}"
        )
        assert max(last.values()) < 20
        told = {kind: Counter(each.told.split(b"\r\n")[0] for each in group) for kind, group in attackers.items()}
        assert told == {kind: {line: count} for kind, (count, _, _, line) in ENDLESS.items()}

    run(scenario())
