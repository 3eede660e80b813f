"""The two loops that send: closed (users who wait for their answers) and open (arrivals that do not wait)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from serve.bench import arrivals, record
from serve.bench.answers import Answer
from serve.bench.http import Client, Connection, Lost
from serve.bench.record import Record
from serve.bench.settings import Caller, Settings
from serve.bench.workload import PATHS, Asked, Workload

LONGEST_WAIT_S = 5.0
"""How long a user of the closed loop waits at most after a 429, whatever Retry-After says."""
AFTER_429_S = 1.0
"""How long it waits where nothing is said."""
Told = Callable[[Record], None]


@dataclass
class Part:
    """What one process does of a run, and what it found."""

    settings: Settings
    index: int = 0
    of: int = 1
    begin_at: float = 0.0
    """On the monotonic clock, which all processes of a machine share."""
    records: list[Record] = field(default_factory=list)
    cpu_s: float = 0.0
    wall_s: float = 0.0


async def run(part: Part, workload: Workload, told: Told = lambda _: None) -> Part:
    """Send this part's requests, and return it with their records, in the order in which they ended."""
    driver = Driver(part, workload, told)
    await asyncio.sleep(part.begin_at - time.monotonic())
    cpu, began = time.thread_time(), time.monotonic()
    try:
        await (driver.closed() if part.settings.users is not None else driver.opened())
    finally:
        driver.client.close()
    part.cpu_s, part.wall_s = time.thread_time() - cpu, time.monotonic() - began
    return part


class Driver:
    """One process's client."""

    def __init__(self, part: Part, workload: Workload, told: Told) -> None:
        self.client = Client(part.settings.target, part.settings.cacert, part.settings.certificate)
        self._part, self._workload, self._told = part, workload, told
        self._settings = part.settings
        self._running: set[asyncio.Future[Record]] = set()

    async def closed(self) -> None:
        """Let each user send, wait for the answer, and send again."""
        settings = self._settings
        assert settings.users is not None
        numbers = iter(range(self._part.index, settings.requests, self._part.of))
        counts = arrivals.shared(settings.users, [caller.share for caller in settings.callers])
        callers = [caller for caller, count in zip(settings.callers, counts, strict=True) for _ in range(count)]
        users = [
            asyncio.ensure_future(self._user(callers[user], settings.ramp_s * user / settings.users, numbers))
            for user in range(self._part.index, settings.users, self._part.of)
        ]
        await self._finish(users)

    async def _user(self, caller: Caller, begins: float, numbers: Iterator[int]) -> None:
        settings = self._settings
        await asyncio.sleep(begins)
        while self._now() < settings.seconds and (number := next(numbers, None)) is not None:
            found = await self._one(number, caller, None)
            pause = settings.think_s
            if found.outcome == record.RATE_LIMITED:
                pause = max(
                    pause, min(LONGEST_WAIT_S, AFTER_429_S if found.retry_after_s is None else found.retry_after_s)
                )
            if pause:
                await asyncio.sleep(pause)

    async def opened(self) -> None:
        """Begin each request at its arrival, whatever became of those before it."""
        settings = self._settings
        assert settings.rate is not None
        slots = asyncio.Semaphore(max(1, settings.max_open // self._part.of))
        shares = [caller.share for caller in settings.callers]
        moments = arrivals.times(settings.rate, settings.burstiness, settings.seed)
        for number, at in arrivals.bounded(moments, settings.requests, settings.seconds):
            if number % self._part.of != self._part.index:
                continue
            if (pause := at - self._now()) > 0:
                await asyncio.sleep(pause)
            caller = settings.callers[arrivals.picked(number, shares, settings.seed)]
            if not await self._slot(slots):
                self._never_sent(number, caller, at)
                continue
            task = asyncio.ensure_future(self._one(number, caller, at))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
            task.add_done_callback(lambda _: slots.release())
        await self._finish(list(self._running))

    async def _finish(self, tasks: Sequence[asyncio.Future[Any]]) -> None:
        """Wait for what runs, `drain_s` beyond the end at most; what is left is cut off and counted as unfinished."""
        if not tasks:
            return
        _, late = await asyncio.wait(tasks, timeout=max(0.0, self._left()))
        for task in late:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception):
                raise result

    async def _slot(self, slots: asyncio.Semaphore) -> bool:
        """Wait until one more request may be in flight; False when the time for all of them is over first."""
        try:
            await asyncio.wait_for(slots.acquire(), max(0.0, self._left()))
        except asyncio.TimeoutError:
            return False
        return True

    def _never_sent(self, number: int, caller: Caller, at: float) -> None:
        """Count an arrival for which there was no room in the client until the end."""
        found = Record(number, caller.name, at, self._now(), detail="never sent: --max-open were in flight")
        asked = self._workload.request(number)
        found.asked_prompt, found.asked_answer = asked.prompt_tokens, asked.answer_tokens
        found.ended = self._now()
        self._part.records.append(found)
        self._told(found)

    def _left(self) -> float:
        """Return the seconds until whatever runs is cut off."""
        return self._settings.seconds + self._settings.drain_s - self._now()

    def _now(self) -> float:
        return time.monotonic() - self._part.begin_at

    async def _one(self, number: int, caller: Caller, at: float | None) -> Record:
        """Send one request and return its record, which is also kept."""
        asked = self._workload.request(number)
        now = self._now()
        found = Record(number, caller.name, now if at is None else at, now)
        found.asked_prompt, found.asked_answer = asked.prompt_tokens, asked.answer_tokens
        try:
            await asyncio.wait_for(self._exchange(asked, caller, found), self._settings.timeout_s)
        except asyncio.TimeoutError:
            found.outcome, found.detail = "time-out", f"no whole answer within {self._settings.timeout_s:g} s"
        finally:
            found.ended = self._now()
            self._part.records.append(found)
            self._told(found)
        return found

    async def _exchange(self, asked: Asked, caller: Caller, found: Record) -> None:
        """Send a request, and put down what came. One whose kept connection had been closed is sent again."""
        settings = self._settings
        head = self.client.head("POST", PATHS[settings.route], len(asked.body), caller.key, asked.session)
        connection: Connection | None = None
        try:
            connection = await self.client.take()
            found.sent = self._now()
            try:
                await connection.request(head, asked.body, settings.stream)
            except Lost as lost:
                if lost.begun or not connection.used:
                    raise
                found.resent, connection = True, await self.client.connect()
                await connection.request(head, asked.body, settings.stream)
            self._put_down(connection, found)
            self.client.give(connection)
        except Lost as lost:
            assert connection is not None
            self._put_down(connection, found)
            found.outcome, found.detail = record.CUT if lost.begun else "connection", str(lost)
        except OSError as error:
            found.outcome, found.detail = "connection", str(error)
        except asyncio.CancelledError:  # its time is up
            if connection is not None:
                self._put_down(connection, found)
                found.outcome = record.UNFINISHED
                connection.close()
            raise

    def _put_down(self, connection: Connection, found: Record) -> None:
        """Copy what is known of the answer into the record."""
        answer, origin = connection.answer, self._part.begin_at
        found.status = connection.status
        found.outcome, found.detail = outcome(connection.status, answer, self._settings.stream)
        found.first = None if answer.first is None else answer.first - origin
        found.last = None if answer.last is None else answer.last - origin
        found.events, found.gaps = answer.events, answer.gaps
        found.prompt_tokens = answer.usage.get("prompt_tokens")
        found.completion_tokens = answer.usage.get("completion_tokens")
        with suppress(ValueError):  # a date: then as if nothing were said
            found.retry_after_s = (
                float(connection.headers["retry-after"]) if "retry-after" in connection.headers else None
            )


def outcome(status: int, answer: Answer, streams: bool) -> tuple[str, str]:
    """Return what became of a request whose answer is over, and what was said of it."""
    if status == 429:
        return record.RATE_LIMITED, answer.error or ""
    if status != 200:
        return f"http {status}", answer.error or ""
    if answer.error is not None:
        return "error in the stream" if streams else "http 200 with an error", answer.error
    if not answer.whole:
        return record.CUT, "the stream ended without [DONE]"
    return record.OK, ""
