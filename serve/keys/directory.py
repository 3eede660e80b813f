"""Which key a request comes with: asked of the store once, remembered for seconds, and asked anew behind the scenes.

A revoked key is refused `FRESH_S` after its revocation at the latest, while the store answers within that time. While
the store cannot be reached, keys that are known go on for `STALE_S`; others get a 503, not a 401: nobody knows. So do
unknown ones beyond `MOST_ASKED` at a time, and known ones are asked for in threads of their own: made-up keys, of which
anybody can send many, keep nobody waiting whose key is known here.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from serve.keys import secret
from serve.keys.store import Key

logger = logging.getLogger(__name__)

REFRESH_S = 1.5
"""A key is asked for anew when its answer is so old."""
FRESH_S = 2.0
"""And not let in without that answer when it is so old."""
STALE_S = 600.0
MOST = 100_000
"""Keys remembered, unknown ids too, so that a flood of wrong keys neither fills the memory nor asks the store twice."""
MOST_ASKED = 1_024
"""Unknown ids that the store is asked for at the same time."""
THREADS = 2
"""For known keys, and as many for unknown ones."""


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
    is_late: bool = False
    """The store did not answer in time the last time, so nobody waits for it any more until it does."""


class Directory:
    """The keys that this gateway has seen. Its methods are called on one event loop."""

    def __init__(self, find: Callable[[str], Key | None], clock: Callable[[], float] = time.monotonic) -> None:
        """`find` returns the key of a secret's id; it blocks, and runs in a thread."""
        self._find = find
        self._clock = clock
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._asked: dict[str, asyncio.Task[Key | None]] = {}
        """Unknown ids that the store is asked for now."""
        self._for_known, self._for_unknown = (ThreadPoolExecutor(THREADS, f"keys-{of}") for of in ("known", "unknown"))

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
        age = self._clock() - known.asked if known else 0.0
        if known is None or (known.key is None and age >= FRESH_S):
            return await self._first(number)
        self._known.move_to_end(number)
        if age >= REFRESH_S and known.key is not None and known.refresh is None:
            known.refresh = asyncio.create_task(self._again(number, known))
        if age >= FRESH_S and known.refresh is not None and not known.is_late:
            _, late = await asyncio.wait({known.refresh}, timeout=FRESH_S)
            known.is_late = bool(late)
            age = self._clock() - known.asked
        if age >= STALE_S:
            raise StoreAway
        return known.key

    async def _first(self, number: str) -> Key | None:
        """Ask once for all that come with this id meanwhile."""
        task = self._asked.get(number)
        if task is None:
            if len(self._asked) >= MOST_ASKED:
                raise StoreAway(f"{MOST_ASKED:,} other unknown keys are looked up now")
            task = self._asked[number] = asyncio.create_task(self._looked_up(number))
            task.add_done_callback(lambda task: task.cancelled() or task.exception())  # all who asked may have left
        return await asyncio.shield(task)  # one client that leaves takes nothing from the others

    async def _looked_up(self, number: str) -> Key | None:
        began = self._clock()
        try:
            key = await asyncio.get_running_loop().run_in_executor(self._for_unknown, self._find, number)
        except Exception as error:
            logger.warning("the store of keys does not answer: %s", type(error).__name__)
            raise StoreAway from error
        finally:
            del self._asked[number]
        self._known[number] = _Known(key, began)
        while len(self._known) > MOST:
            self._known.popitem(last=False)
        return key

    async def _again(self, number: str, known: _Known) -> None:
        began = self._clock()
        try:
            known.key = await asyncio.get_running_loop().run_in_executor(self._for_known, self._find, number)
            known.asked = began
            known.is_late = self._clock() - began >= FRESH_S
        except Exception as error:
            logger.warning("the store of keys does not answer: %s; keys known here go on", type(error).__name__)
        finally:
            known.refresh = None
