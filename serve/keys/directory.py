"""Which key a request comes with: asked of the store once, remembered for seconds, and asked anew behind the scenes.

A revoked key is refused `FRESH_S` after its revocation at the latest (twice that where the store is slow). While the
store cannot be reached, keys that are known go on for `STALE_S`; others get a 503, not a 401: nobody knows.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from serve.keys import secret
from serve.keys.store import Key

logger = logging.getLogger(__name__)

FRESH_S = 2.0
STALE_S = 600.0
MOST = 100_000
"""Keys remembered, unknown ids too, so that a flood of wrong keys neither fills the memory nor asks the store twice."""


class NotAdmitted(Exception):
    """The request has no valid key. Its text tells nothing of which keys there are."""


class StoreAway(Exception):
    """Nobody can say now whether the key is valid."""


@dataclass
class _Known:
    key: Key | None
    """None: there is no such key."""
    asked: float
    refresh: asyncio.Task[None] | None = None


class Directory:
    """The keys that this gateway has seen. Its methods are called on one event loop."""

    def __init__(self, find: Callable[[str], Key | None], clock: Callable[[], float] = time.monotonic) -> None:
        """`find` returns the key of a secret's id; it blocks, and runs in a thread."""
        self._find = find
        self._clock = clock
        self._known: OrderedDict[str, _Known] = OrderedDict()

    async def identify(self, text: str) -> Key:
        """Return the key that a secret stands for.

        Raises:
            NotAdmitted: there is none, or it is revoked or has expired.
            StoreAway: the store could not be asked.
        """
        number = secret.id_of(text)
        found = None if number is None else await self._ask(number)
        kept = found.secrets[0] if found else None
        proved = secret.matches(text, kept.digest if kept else None)
        if found is None or kept is None or not proved or found.revoked is not None or not kept.is_valid(time.time()):
            raise NotAdmitted
        return found

    async def _ask(self, number: str) -> Key | None:
        known = self._known.get(number)
        if known is None:
            return await self._first(number)
        self._known.move_to_end(number)
        age = self._clock() - known.asked
        if age >= FRESH_S and known.refresh is None:
            known.refresh = asyncio.create_task(self._again(number, known))
        if age >= 2 * FRESH_S and known.refresh is not None:
            await asyncio.wait({known.refresh}, timeout=FRESH_S)
            age = self._clock() - known.asked
        if age >= STALE_S:
            raise StoreAway
        return known.key

    async def _first(self, number: str) -> Key | None:
        try:
            key = await asyncio.to_thread(self._find, number)
        except Exception as error:
            logger.warning("the store of keys does not answer: %s", type(error).__name__)
            raise StoreAway from error
        self._known[number] = _Known(key, self._clock())
        while len(self._known) > MOST:
            self._known.popitem(last=False)
        return key

    async def _again(self, number: str, known: _Known) -> None:
        try:
            known.key = await asyncio.to_thread(self._find, number)
            known.asked = self._clock()
        except Exception as error:
            logger.warning("the store of keys does not answer: %s; keys known here go on", type(error).__name__)
        finally:
            known.refresh = None
