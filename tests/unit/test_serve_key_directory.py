"""Keys are looked up once, revoked ones are found within seconds, and a store that is away stops nobody it knew."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace

import pytest

from serve.keys import directory as directory_module
from serve.keys import secret
from serve.keys.directory import FRESH_S, MOST_ASKED, REFRESH_S, STALE_S, Directory, NotAdmitted, StoreAway
from serve.keys.limits import Limits
from serve.keys.store import Key, KeySecret


class Kept:
    """A store of one key, and a clock: both are the test's."""

    def __init__(self) -> None:
        self.made = secret.make()
        self.key: Key | None = Key(
            "alice", Limits(), 0.0, None, (KeySecret(self.made.id, self.made.digest, 0.0, None),)
        )
        self.now = 0.0
        self.asked = 0
        self.away = False
        self.directory = Directory(self.find, lambda: self.now)

    def find(self, number: str) -> Key | None:
        self.asked += 1
        if self.away:
            raise OSError("no route to host")
        return self.key if number == self.made.id else None

    async def after(self, seconds: float) -> Key:
        self.now += seconds
        return await self.directory.identify(self.made.text)


def test_a_key_is_asked_for_once() -> None:
    kept = Kept()

    async def often() -> None:
        for _ in range(3):
            assert (await kept.after(0.1)).name == "alice"

    asyncio.run(often())
    assert kept.asked == 1


@pytest.mark.parametrize("text", ["", "Bearer x", "tandem-000000000000-" + "A" * 43])
def test_what_is_no_key_is_refused(text: str) -> None:
    with pytest.raises(NotAdmitted):
        asyncio.run(Kept().directory.identify(text))


def test_another_secret_of_the_same_id_is_refused() -> None:
    kept = Kept()
    with pytest.raises(NotAdmitted):
        asyncio.run(kept.directory.identify(kept.made.text[:-5] + "AAAAA"))


def test_an_unknown_id_asks_the_store_once() -> None:
    kept, other = Kept(), secret.make()

    async def often() -> None:
        for _ in range(5):
            with pytest.raises(NotAdmitted):
                await kept.directory.identify(other.text)

    asyncio.run(often())
    assert kept.asked == 1


def test_a_revoked_key_is_refused_soon_after() -> None:
    kept = Kept()

    async def revoked() -> None:
        await kept.after(0)
        assert kept.key is not None
        kept.key = replace(kept.key, revoked=time.time())
        await kept.after(REFRESH_S)  # asks behind the scenes
        await asyncio.sleep(0.05)
        with pytest.raises(NotAdmitted):
            await kept.after(0)

    asyncio.run(revoked())


@pytest.mark.parametrize("uses", [(), (0.5, 0.9)])
def test_a_revoked_key_is_let_in_for_no_longer_than_said(uses: tuple[float, ...]) -> None:
    kept = Kept()

    async def revoked() -> None:
        await kept.after(0)
        assert kept.key is not None
        kept.key = replace(kept.key, revoked=time.time())
        for seconds in uses:
            await kept.after(seconds)
        with pytest.raises(NotAdmitted):
            await kept.after(FRESH_S - sum(uses))

    asyncio.run(revoked())


def test_made_up_keys_keep_no_known_one_waiting() -> None:
    kept, goes_on = Kept(), threading.Event()
    find = kept.find

    def slow(number: str) -> Key | None:
        if number != kept.made.id:
            goes_on.wait(10)
        return find(number)

    async def flooded() -> None:
        kept.directory = directory = Directory(slow, lambda: kept.now)
        await kept.after(0)
        flood = [asyncio.create_task(directory.identify(secret.make().text)) for _ in range(MOST_ASKED)]
        await asyncio.sleep(0)
        assert (await asyncio.wait_for(kept.after(5 * FRESH_S), 5)).name == "alice"
        with pytest.raises(StoreAway):
            await directory.identify(secret.make().text)
        goes_on.set()
        assert {type(each) for each in await asyncio.gather(*flood, return_exceptions=True)} == {NotAdmitted}
        with pytest.raises(NotAdmitted):
            await directory.identify(secret.make().text)

    try:
        asyncio.run(flooded())
    finally:
        goes_on.set()


def test_those_who_come_at_once_with_a_new_key_ask_once() -> None:
    kept = Kept()

    async def at_once() -> None:
        first, *others = [asyncio.create_task(kept.after(0)) for _ in range(2 * MOST_ASKED)]
        await asyncio.sleep(0)
        first.cancel()
        assert {key.name for key in await asyncio.gather(*others)} == {"alice"}

    asyncio.run(at_once())
    assert kept.asked == 1


def test_a_store_that_hangs_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory_module, "FRESH_S", 0.05)
    kept, goes_on = Kept(), threading.Event()

    def hangs(number: str) -> Key | None:
        if kept.asked:
            goes_on.wait(10)
        return kept.find(number)

    async def waited() -> None:
        kept.directory = Directory(hangs, lambda: kept.now)
        await kept.after(0)
        await kept.after(REFRESH_S)
        [known] = kept.directory._known.values()
        assert known.is_late
        ask = kept.directory._ask(kept.made.id)
        with pytest.raises(StopIteration):
            ask.send(None)  # it answers without waiting
        goes_on.set()

    try:
        asyncio.run(waited())
    finally:
        goes_on.set()


def test_one_not_used_for_long_is_asked_for_before_it_is_let_in() -> None:
    kept = Kept()

    async def revoked() -> None:
        await kept.after(0)
        kept.key = None
        with pytest.raises(NotAdmitted):
            await kept.after(10 * FRESH_S)

    asyncio.run(revoked())


def test_an_expired_secret_is_refused() -> None:
    kept = Kept()
    assert kept.key is not None
    kept.key = replace(kept.key, secrets=(replace(kept.key.secrets[0], expires=time.time() - 1),))
    with pytest.raises(NotAdmitted):
        asyncio.run(kept.after(0))


def test_a_store_that_is_away_stops_none_that_it_knew() -> None:
    kept = Kept()

    async def away() -> None:
        await kept.after(0)
        kept.away = True
        assert (await kept.after(5 * FRESH_S)).name == "alice"
        with pytest.raises(StoreAway):
            await kept.directory.identify(secret.make().text)
        with pytest.raises(StoreAway):
            await kept.after(STALE_S)
        kept.away = False
        assert (await kept.after(0)).name == "alice"

    asyncio.run(away())
