"""A request's turn is another one's when replicas are done with its texts, however far its client has read them."""

from __future__ import annotations

import asyncio
import gc

from serve.api.admission import Admission
from serve.api.callers import ANYONE
from serve.api.own_rates import OwnRates
from serve.fair.turns import Turns
from serve.front.exchange import Exchange


def test_the_turn_is_given_back_with_the_last_text_and_once() -> None:
    async def scenario() -> None:
        turns = Turns(2, 10, 10)
        admission = Admission(OwnRates(), None, lambda model: turns, 5.0)
        ticket = await admission.begin(ANYONE, "m", 1, 1, texts=2)
        next_one = asyncio.create_task(admission.begin(ANYONE, "m", 1, 1))
        await asyncio.sleep(0)
        ticket.worked("a-0")
        ticket.worked("a-0")  # resumed: it is done twice
        await asyncio.sleep(0)
        assert (turns.running, turns.waiting) == (2, 1)
        ticket.worked("a-1")
        assert await next_one
        assert (turns.running, turns.waiting) == (1, 0)
        ticket.end()
        assert turns.running == 1, "a turn was given back twice"
        next_one.result().end()
        assert turns.running == 0

    asyncio.run(scenario())


def test_an_exchange_tells_who_is_there_and_keeps_nobody() -> None:
    class Asks:
        told: list[str] = []  # noqa: RUF012  # of the only one

        def worked(self, call_id: str) -> None:
            self.told.append(call_id)

    exchange, asks = Exchange(), Asks()
    exchange.worked("nobody asks")
    exchange.when_worked(asks.worked)
    exchange.worked("a")
    del asks
    gc.collect()
    exchange.worked("nobody is there")
    assert Asks.told == ["a"]
