"""Contenders for a run in an object store: no number is won twice, no live owner is passed, and somebody wins."""

from __future__ import annotations

import json
from typing import Any

import pytest

from jobs import lease_contest, lease_objects
from jobs.lease import Owner
from jobs.lease_contest import List, Now, Owned, Read, Remove, Step, Wait, World, Write
from jobs.lease_objects import Name, Watch
from tests.support.lease_simulation import CALM, TIMING, schedules

ME = Owner("host-a", 7, 0.0, "mine", "now")
OTHER = Owner("host-b", 8, 0.0, "other", "now")


def test_whatever_stops_dies_or_is_late_no_number_is_won_twice_and_no_live_owner_is_passed() -> None:
    won = taken_over = 0
    for world in schedules(100):
        assert world.violations == [], f"schedule {world.seed}"
        won, taken_over = won + len(world.numbers), taken_over + world.taken_over
        world.chaos = CALM
        for contender in world.contenders:
            contender.once = True
        world.run(world.now + 500)  # what sleeps wakes up
        last = world.start("last", "host-9", world.now, once=True)
        world.run(world.now + 2000)
        assert last.state == "released", f"schedule {world.seed}: nobody gets the run any more"
        assert world.violations == [], f"schedule {world.seed}"
        assert len(world.objects) <= 8, "old objects go"
    assert won > 100
    assert taken_over > 5, "owners that slept for long were passed, too"


def test_the_schedules_find_a_protocol_that_is_broken() -> None:
    found = [violation for world in schedules(150, marks=False) for violation in world.violations]
    assert any("won twice" in violation for violation in found)


class Alone:
    """A store for one contender, and a clock that each kind of step moves by as much as is said."""

    def __init__(self, objects: dict[str, bytes], takes: dict[type, float]) -> None:
        self.objects, self.takes, self.now = objects, takes, 0.0
        self.log: list[Step] = []

    def answer(self, step: Step) -> Any:
        """Take a step."""
        self.log.append(step)
        self.now += step.seconds if isinstance(step, Wait) else self.takes.get(type(step), 0.0)
        match step:
            case Now():
                return self.now
            case List():
                return sorted(self.objects)
            case Read(name):
                return self.objects.get(name)
            case Write(name, content):
                self.objects[name] = content
            case Remove(name):
                self.objects.pop(name, None)
        return None

    def contend(self, steps: int = 10_000) -> lease_contest.Won | None:
        """Take part; None: it is not over after so many steps."""
        ids = iter(f"{number:04x}" for number in range(steps))
        contest = lease_contest.contend(World(ME, TIMING, lambda: next(ids), lambda owner: "elsewhere"))
        answer = None
        try:
            for _ in range(steps):
                answer = self.answer(contest.send(answer))
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        return None


def test_one_alone_takes_the_next_number_and_leaves_nothing_old() -> None:
    old = lease_objects.content(Owner(**{**vars(OTHER), "released": True}), 9)
    store = Alone({"claim-00000004-aa.json": old, "held-00000004-aa": b".", "notes.txt": b""}, {})
    won = store.contend()
    assert won is not None
    assert won.claim == Name("claim", 5, "0000")
    assert sorted(store.objects) == ["claim-00000005-0000.json", "held-00000005-0000", "notes.txt"]
    assert json.loads(store.objects["claim-00000005-0000.json"])["job"] == "mine"


@pytest.mark.parametrize("slow", [Write, Read], ids=["to claim", "to look"])
def test_one_that_is_too_slow_to_be_trusted_wins_nothing_and_withdraws(slow: type) -> None:
    store = Alone({}, {slow: TIMING.valid_s + 1})
    assert store.contend(500) is None
    assert sum(isinstance(step, Write) and step.name.startswith("claim") for step in store.log) > 2, "it tries again"
    assert not [name for name in store.objects if name.startswith("held")]
    assert len(store.objects) <= 2


def test_a_silent_owner_is_passed_after_stale_s_of_looks_and_not_before() -> None:
    silent = {"claim-00000001-aa.json": lease_objects.content(OTHER, 3), "held-00000001-aa": b"."}
    store = Alone(silent, {})
    won = store.contend()
    assert won is not None
    assert won.claim.number == 2
    assert TIMING.stale_s <= store.now < TIMING.stale_s + 2 * TIMING.poll_s


def test_an_owner_that_shows_a_sign_of_life_keeps_its_run() -> None:
    class Beating(Alone):
        def answer(self, step: Step) -> Any:
            if self.now > 10:
                self.objects["claim-00000001-aa.json"] = lease_objects.content(OTHER, 4)
            return super().answer(step)

    store = Beating({"claim-00000001-aa.json": lease_objects.content(OTHER, 3), "held-00000001-aa": b"."}, {})
    with pytest.raises(Owned) as refused:
        store.contend()
    assert refused.value.owner == OTHER
    assert 10 < store.now < 12
    assert sorted(store.objects) == ["claim-00000001-aa.json", "held-00000001-aa"]


def test_time_in_which_the_store_was_away_is_no_silence() -> None:
    watch, most = Watch(), 4 * TIMING.beat_s
    for began in (0.0, 5.0, 10.0):
        watch.look("x", began, began + 1, most)
    assert watch.silent_s == 9.0
    watch.look("x", 100.0, 101.0, most)
    assert watch.silent_s == 0.0
    watch.look("x", 110.0, 111.0, most)
    assert (watch.silent_s, watch.changed) == (9.0, False)
    watch.look("y", 115.0, 116.0, most)
    assert (watch.silent_s, watch.changed) == (0.0, True)


def test_the_lowest_claim_wins_but_for_those_given_up() -> None:
    mine, lower, same = Name("claim", 3, "bb"), Name("claim", 2, "cc"), Name("claim", 3, "aa")
    higher, held = Name("claim", 4, "aa"), Name("held", 3, "cc")
    assert lease_objects.wins(mine, [mine, higher], ())
    for rival in (lower, same, held):
        assert not lease_objects.wins(mine, [mine, rival], ())
        assert lease_objects.wins(mine, [mine, rival], [rival])
    assert lease_objects.parsed([*map(str, (mine, held)), "claim-1.json", "x"]) == [mine, held]
    assert lease_objects.newest([mine, held, Name("choosing", 0, "aa")]) == 3


def test_all_that_a_claim_says_in_its_time_is_of_one_size() -> None:
    released = Owner(**{**vars(ME), "released": True})
    said = [lease_objects.content(owner, beats) for owner, beats in ((ME, 1), (ME, 10**9), (released, 12))]
    assert len({len(each) for each in said}) == 1
    assert [lease_objects.owner_of(each) for each in said] == [ME, ME, released]
