"""Admission: a caller's limits, budget and turn, before a request goes to a model, and the count of what it used.

The order: may the key call the model; is there budget left; do its rates and concurrency allow one more; and then the
turn among those that wait. What is counted is counted before it is sent.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from serve.api import refusals
from serve.api.body import ApiError
from serve.api.callers import Caller
from serve.api.own_rates import OwnRates, Rates
from serve.fair.turns import Busy, Turn, Turns
from serve.front import exchange
from serve.keys.limits import PRIORITIES
from serve.keys.meter import Counted, Hold, Meter
from serve.metrics import watch
from serve.metrics.watch import Watch
from serve.scaling.work import Item, ModelWork

BYTES_PER_TOKEN = 4
"""How prompts are estimated before a replica has encoded them, as OpenAI's limits do."""
UNNAMED_MAX_TOKENS = 256
"""What a request that names no `max_tokens` is taken to generate."""


@dataclass
class Ticket:
    """One admitted request."""

    admission: Admission
    caller: Caller
    model: str
    turns: Turns
    """Those that the turn is of: the model's name may be gone, or another model's, before the request ends."""
    turn: Turn
    charged: int
    """Tokens that its key has paid for the prompt: an estimate, until a replica has read it."""
    entry: Counted | None
    reserved: int
    headers: dict[str, str]
    item: Item
    watch: Watch
    used: int = 0
    generated: int = 0
    _ended: bool = False
    _streams: bool = False
    _worked: set[str] = field(default_factory=set)
    """Of its calls, those that replicas are done with."""
    _has_turn: bool = True

    def __enter__(self) -> Ticket:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None or not self._streams:
            self.end(answered=kind is None)

    def __del__(self) -> None:
        self.end()  # of an answer that nobody began to read

    async def until_its_end(self, content: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Pass an answer on that outlives the request's handler, and end with it."""
        try:
            async for piece in content:
                yield piece
        finally:
            self.end()

    def streams(self) -> None:
        """Leave the end to `until_its_end`."""
        self._streams = True

    def prompt(self, tokens: int) -> None:
        """Count the prompt's tokens: a replica has taken it."""
        self.item.started(tokens)
        exchange.current().prompt_tokens = tokens
        self.turns.charge(self.turn, tokens - self.charged)
        self.charged = tokens
        self._count(tokens, 0)

    def predicted(self, rows: int) -> None:
        """Count rows of predictions against the key's limits, as a token each."""
        self.used += rows
        if self.entry is not None:
            self.admission.count(self.caller, self.entry, rows, 0)

    def answer(self, generated: int) -> None:
        """Count an answer's tokens, `generated` in all so far, before they are sent.

        Raises:
            ApiError: 429, the key's budget was spent before these.
        """
        more, self.generated = generated - self.generated, generated
        if more > 0:
            self.item.generated(generated)
            exchange.current().generated(generated)
            self._count(0, more)
            self.turns.charge(self.turn, more)

    def worked(self, call_id: str) -> None:
        """Take note that a replica is done with one of the texts; with the last one the turn is another request's.

        A client that reads slowly holds no place of those that could be worked on.
        """
        self._worked.add(call_id)
        if len(self._worked) >= self.turn.weight:
            self.give_turn_back()

    def give_turn_back(self) -> None:
        """Let the next request go. A second time does nothing."""
        if self._has_turn:
            self._has_turn = False
            self.turns.end(self.turn)

    def end(self, answered: bool = True) -> None:
        """Give back what was held. A second time does nothing."""
        if not self._ended:
            self._ended = True
            self.item.end(answered)
            self.admission.end(self)

    def _count(self, prompt: int, generated: int) -> None:
        self.used += prompt + generated
        if self.entry is not None:
            self.admission.count(self.caller, self.entry, prompt, generated)
        self.watch.tokens(self.caller.key, prompt, generated)


class _Wanted(NamedTuple):
    """What a request asks for, as far as it is known before a replica has read it."""

    prompt: int
    most: int
    named: bool
    rows: int | None
    texts: int

    @property
    def read(self) -> int:
        """Tokens of what is sent; a row of predictions counts as one."""
        return self.prompt if self.rows is None else self.rows


class Admission:
    """Everything that stands between a caller and a model, for all models of one gateway."""

    def __init__(
        self,
        rates: Rates,
        meter: Meter | None,
        turns: Callable[[str], Turns],
        patience_s: float,
        work: Callable[[str], ModelWork] | None = None,
    ) -> None:
        """`meter` is None where no keys are used. `turns` and `work` return a model's turns and the count of its work.

        A model's `work` is asked for once for each request that comes for it.
        """
        self._rates, self._meter, self._turns, self._patience_s = rates, meter, turns, patience_s
        self._work = work or defaultdict[str, ModelWork](ModelWork).__getitem__

    async def begin(
        self,
        caller: Caller,
        model: str,
        prompt: int,
        most: int,
        named: bool = True,
        rows: int | None = None,
        texts: int = 1,
    ) -> Ticket:
        """Admit a request of about `prompt` tokens that may generate `most`; waits for its turn.

        Args:
            named: whether the request says itself how much it may generate.
            rows: of one for predictions: what counts as its work, and against the key's limits as a token each.
            texts: of one that generates: each is a call to a replica, and takes a place among what runs.

        Raises:
            ApiError: 429 with Retry-After, or for a spent budget without.
        """
        exchange.current().model = model
        wanted = _Wanted(prompt, most, named, rows, texts)
        hold = await self._check_budget(caller, wanted.read, most)
        try:
            return await self._admitted(caller, model, wanted, hold)
        except BaseException:
            if hold is not None:
                hold.end()
            raise

    async def _admitted(self, caller: Caller, model: str, wanted: _Wanted, hold: Hold | None) -> Ticket:
        verdict = await self._rates.begin(caller.key, caller.limits, wanted.read + wanted.most, wanted.texts)
        headers = refusals.rate_headers(verdict)
        if verdict.refused_by is not None:
            raise refusals.limited(verdict, caller.limits, headers, wanted.texts)
        item = self._work(model).begin(wanted.read, wanted.most if wanted.named else None)
        asked = time.perf_counter()
        try:
            turns, turn = await self._turn(caller, model, wanted)
        except BaseException as error:
            item.end(answered=False)
            self._rates.end(caller.key, verdict.reserved, 0, wanted.texts)
            if isinstance(error, Busy):
                raise refusals.busy(model, error, headers) from None
            raise
        if not wanted.most:  # vectors and predictions tell nothing before they are there
            item.started()
        entry = self._meter.begin(caller.key, model, hold) if self._meter and caller.key else None
        watched = watch.current()
        watched.admitted(time.perf_counter() - asked)
        reserved = verdict.reserved
        return Ticket(self, caller, model, turns, turn, wanted.prompt, entry, reserved, headers, item, watched)

    async def _turn(self, caller: Caller, model: str, wanted: _Wanted) -> tuple[Turns, Turn]:
        turns, priority = self._turns(model), PRIORITIES.index(caller.limits.priority)
        patience_s = exchange.current().patience_s(self._patience_s)
        return turns, await turns.take(caller.key, priority, wanted.prompt, patience_s, wanted.texts)

    def count(self, caller: Caller, entry: Counted, prompt: int, generated: int) -> None:
        """Count tokens of a key. Raises ApiError (429) for generated ones when its budget was spent before them."""
        assert self._meter is not None
        left = self._meter.left_now(caller.key, caller.limits) if generated else None
        if left is not None and left <= 0:
            raise refusals.spent(caller)
        self._meter.count(caller.key, entry, prompt, generated)

    def end(self, ticket: Ticket) -> None:
        """Let the next one go."""
        try:
            ticket.give_turn_back()
        finally:
            self._rates.end(ticket.caller.key, ticket.reserved, ticket.used, ticket.turn.weight)
            if ticket.entry is not None and ticket.entry.hold is not None:
                ticket.entry.hold.end()

    async def _check_budget(self, caller: Caller, prompt: int, most: int) -> Hold | None:
        """Hold back of the key's budget what a request needs first; None: the key has none. Raises ApiError."""
        if self._meter is None or not caller.key:
            return None
        try:
            left = await self._meter.left(caller.key, caller.limits)
        except Exception as error:  # whatever the database's driver raises
            message = "what this key has used cannot be read now; try again"
            raise ApiError(503, message, code="keys_unavailable", headers={"retry-after": "2"}) from error
        if left is None:
            return None
        if left <= 0:
            raise refusals.spent(caller)
        if left <= self._meter.held(caller.key):
            raise refusals.held(caller)
        return self._meter.hold(caller.key, prompt, most)


def estimate(body_bytes: int, max_tokens: int | None, texts: int) -> tuple[int, int, bool]:
    """Return (prompt, most, named) of a request of so many bytes that asks for so many texts.

    That is: the tokens that it could use, and whether it names itself how many it may generate.
    """
    most = (UNNAMED_MAX_TOKENS if max_tokens is None else max_tokens) * texts
    return math.ceil(body_bytes / BYTES_PER_TOKEN), most, max_tokens is not None


def everyone() -> Admission:
    """Return an admission of anyone, as many as come."""
    turns = Turns(window=_NO_BOUND, most=_NO_BOUND, most_per_key=_NO_BOUND)
    return Admission(OwnRates(), None, lambda model: turns, patience_s=float(_NO_BOUND))


_NO_BOUND = 10**9
