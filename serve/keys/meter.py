"""Counts what keys use, keeps it in the store, and knows when a budget is spent: one per gateway replica.

Counting is a store into the ledger's memory. Every `FLUSH_S` what has changed is written to the database, and what keys
with budgets have used over all gateways is read back. Counts themselves are exact: a gateway that is killed leaves its
ledger, which the next one on that machine settles; a machine that is lost takes `FLUSH_S` of counts.

What a request is expected to use (the estimate of its prompt, and the first tokens of its answer) is held back from the
key's budget from its admission until it is counted, in this gateway. So here a budget is overdrawn by one request's
prompt, by what prompts have beyond their estimates, and by a chunk of each running answer. Other gateways do not see
what is held back: each may admit prompts up to what is left, and answers there go on for `FLUSH_S` after it is spent.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, datetime, timezone
from pathlib import Path

from serve.keys.ledger import Entry, Ledger, Used, orphans
from serve.keys.limits import Limits, month_of
from serve.keys.store import Store

logger = logging.getLogger(__name__)

FLUSH_S = 1.0
FORGET_S = 60.0
"""A key's budget is followed for so long after its last request has ended."""
FIRST_TOKENS = 64
"""Of an answer, at most, are held back when its request is admitted."""
SETTLE_S = 15.0
"""How often the ledgers of gateways that have died are looked for."""


def today() -> date:
    """Return the day in UTC, by which usage is counted."""
    return datetime.now(timezone.utc).date()


@dataclass
class _Spent:
    """What one key with a budget has used, by the store, and how much of that was this gateway's."""

    day: date
    of_day: int
    of_month: int
    own: int
    asked: float


class Hold:
    """What is held back of a key's budget for one request, until it is counted or the request ends."""

    __slots__ = ("_all", "answer", "key", "prompt")

    def __init__(self, held: dict[str, set[Hold]], key: str, prompt: int, answer: int) -> None:
        self._all, self.key, self.prompt, self.answer = held, key, prompt, answer
        held.setdefault(key, set()).add(self)

    @property
    def tokens(self) -> int:
        """What is still held back."""
        return self.prompt + self.answer

    def counted(self, prompt: int, generated: int) -> None:
        """Take note of what was counted for the request."""
        if prompt:
            self.prompt = 0
        self.answer = max(0, self.answer - generated)

    def end(self) -> None:
        """Hold nothing any more. A second time does nothing."""
        if (of_key := self._all.get(self.key)) is not None:
            of_key.discard(self)
            if not of_key:
                del self._all[self.key]


@dataclass(frozen=True, slots=True)
class Counted:
    """Where the tokens of one request are counted."""

    entry: Entry
    hold: Hold | None = None


class Meter:
    """The ledger of this process, its way to the store, and the budgets of the keys that are used here."""

    def __init__(self, store: Store, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._folder = folder
        self._clock = clock
        self._ledger = Ledger(folder)
        self._own: dict[str, int] = {}
        """Tokens that each key has used at this gateway, ever."""
        self._spent: dict[str, _Spent] = {}
        self._held: dict[str, set[Hold]] = {}
        """What running and waiting requests of keys with budgets hold back; no key without any."""
        self._looking = asyncio.Lock()
        self._exchanging = asyncio.Lock()
        self._running: set[asyncio.Task[None]] = set()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to flush."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Write the last counts, and leave nothing to settle."""
        if self._task is not None:
            self._task.cancel()
        async with self._exchanging:  # what is being written now is written first
            self._ledger.close()
        await asyncio.to_thread(self._settle)

    # -- counting --------------------------------------------------------------------------------------------------

    def begin(self, key: str, model: str, hold: Hold | None = None) -> Counted:
        """Count a request that was admitted, and return where its tokens are counted."""
        entry = self._ledger.entry(key, model, today())
        entry.add(requests=1)
        return Counted(entry, hold)

    def count(self, key: str, at: Counted, prompt_tokens: int = 0, generated_tokens: int = 0) -> None:
        """Count tokens, before they are sent."""
        at.entry.add(prompt_tokens=prompt_tokens, generated_tokens=generated_tokens)
        if at.hold is not None:
            at.hold.counted(prompt_tokens, generated_tokens)
        self._own[key] = self._own.get(key, 0) + prompt_tokens + generated_tokens

    # -- budgets ---------------------------------------------------------------------------------------------------

    async def left(self, key: str, limits: Limits) -> int | None:
        """Return how many tokens the key may still use, None for any number; asks the store the first time.

        Raises what the store raises where it has to be asked and does not answer.
        """
        if limits.tokens_per_day is None and limits.tokens_per_month is None:
            return None
        if not self._is_known(key):
            async with self._looking:  # those who waited for it find it known
                if not self._is_known(key):
                    await self._exchange([key])
        self._spent[key].asked = self._clock()
        return self.left_now(key, limits)

    def held(self, key: str) -> int:
        """Return how many tokens are held back for the key's requests at this gateway."""
        return sum(hold.tokens for hold in self._held.get(key, ()))

    def hold(self, key: str, prompt: int, most: int) -> Hold:
        """Hold back what a request needs first, of about `prompt` tokens that may generate `most`; follow its key.

        The caller ends it with the request.
        """
        return Hold(self._held, key, prompt, min(most, FIRST_TOKENS))

    def left_now(self, key: str, limits: Limits) -> int | None:
        """Return what `left` does, from what is known: a key is known while a request of it holds something."""
        known = self._spent.get(key)
        if known is None:
            return None
        since = self._own.get(key, 0) - known.own
        budgets = ((limits.tokens_per_day, known.of_day), (limits.tokens_per_month, known.of_month))
        left = [budget - used - since for budget, used in budgets if budget is not None]
        return min(left, default=None)

    # -- the store -------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        settled = -SETTLE_S
        while True:
            try:
                if self._clock() - settled >= SETTLE_S:
                    await asyncio.to_thread(self._settle)
                    settled = self._clock()
                await self._exchange(self._recent())
            except Exception as error:
                logger.warning("usage could not be written: %s; it is kept here", type(error).__name__)
            await asyncio.sleep(FLUSH_S)

    def _is_known(self, key: str) -> bool:
        return key in self._spent and self._spent[key].day == today()

    def _recent(self) -> list[str]:
        """Return the keys with budgets that have requests or were asked for lately, and forget the others."""
        now = self._clock()
        for key in self._held.keys() & self._spent.keys():
            self._spent[key].asked = now
        oldest = now - FORGET_S
        self._spent = {key: spent for key, spent in self._spent.items() if spent.asked >= oldest}
        return list(self._spent)

    async def _exchange(self, keys: list[str]) -> None:
        """Write what has changed, then learn what keys have used: the answer has this gateway's part up to now.

        It goes on when its caller is cancelled: its thread would do so too, unseen, and write after those that follow.
        """
        task = asyncio.ensure_future(self._exchanged(keys))
        self._running.add(task)
        task.add_done_callback(self._ended)
        await asyncio.shield(task)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # its caller may have left

    async def _exchanged(self, keys: list[str]) -> None:
        async with self._exchanging:
            totals, day = self._ledger.flushable(), today()
            own = {key: self._own.get(key, 0) for key in keys}
            try:
                of_day, of_month = await asyncio.to_thread(self._written_and_read, totals, keys, day)
            except BaseException:
                self._ledger.keep_all()  # totals: the next time has them all
                raise
            for key in keys:
                asked = self._spent[key].asked if key in self._spent else self._clock()
                self._spent[key] = _Spent(day, of_day.get(key, 0), of_month.get(key, 0), own[key], asked)

    def _written_and_read(
        self, totals: list[Used], keys: list[str], day: date
    ) -> tuple[dict[str, int], dict[str, int]]:
        self._store.write_usage(self._ledger.id, totals)
        if not keys:
            return {}, {}
        return self._store.tokens_since(keys, day), self._store.tokens_since(keys, month_of(day))

    def _settle(self) -> None:
        for orphan in orphans(self._folder):
            self._store.close_ledger(orphan.id, orphan.used)
            orphan.path.unlink()
