"""Whose request goes next: shares of tokens between keys, classes, bounds and deadlines."""

from __future__ import annotations

import random
import weakref
from collections import Counter

import pytest

from serve.fair.queue import QUANTUM, SAVED, FairQueue, Full, Waiting


def queue(most: int = 10_000, most_per_key: int = 5_000) -> FairQueue[int]:
    return FairQueue(most, most_per_key)


def push(waiting: FairQueue[int], key: str, count: int = 1, priority: int = 1, cost: float = 100) -> list[Waiting[int]]:
    return [waiting.push(at, key, priority, cost, deadline=10.0) for at in range(count)]


def served(waiting: FairQueue[int], count: int, generated: dict[str, int]) -> Counter[str]:
    """Take requests one after another, each ends before the next; return the tokens that each key got."""
    tokens: Counter[str] = Counter()
    for _ in range(count):
        entry = waiting.pop()
        assert entry is not None
        waiting.charge(entry.key, entry.priority, generated[entry.key])
        waiting.end(entry.key, entry.priority)
        tokens[entry.key] += int(entry.cost) + generated[entry.key]
    return tokens


def jain(shares: list[float]) -> float:
    """R. Jain, D. Chiu, W. Hawe, 1984: 1 when all are equal, 1/n when one has everything."""
    return sum(shares) ** 2 / (len(shares) * sum(share**2 for share in shares))


def test_one_key_is_first_in_first_out() -> None:
    waiting = queue()
    push(waiting, "a", 5)
    assert [entry.request for entry in iter(waiting.pop, None)] == [0, 1, 2, 3, 4]
    assert len(waiting) == 0


def test_two_keys_at_ten_to_one_share_equally() -> None:
    waiting = queue()
    push(waiting, "big", 1000)
    push(waiting, "small", 100)
    tokens = served(waiting, 180, {"big": 50, "small": 50})
    assert jain([tokens["big"], tokens["small"]]) > 0.999


def test_tokens_are_shared_not_requests() -> None:
    waiting = queue()
    push(waiting, "long", 1000, cost=10)
    push(waiting, "short", 3000, cost=10)
    tokens = served(waiting, 1000, {"long": 2000, "short": 40})
    assert jain([tokens["long"], tokens["short"]]) > 0.99


@pytest.mark.parametrize("seed", range(5))
def test_many_keys_with_random_costs_that_run_together(seed: int) -> None:
    random_ = random.Random(seed)
    waiting, tokens = queue(), Counter[str]()
    keys = [f"k{at}" for at in range(20)]
    for at, key in enumerate(keys):
        push(waiting, key, 200 + 10 * at, cost=random_.choice([10, 300, 4000]))
    running: list[tuple[Waiting[int], int]] = []
    for _ in range(1500):
        while len(running) < 16 and (entry := waiting.pop()):
            running.append((entry, random_.randint(1, 500)))
        entry, generated = running.pop(random_.randrange(len(running)))
        waiting.charge(entry.key, entry.priority, generated)
        waiting.end(entry.key, entry.priority)
        tokens[entry.key] += int(entry.cost) + generated
    assert jain([tokens[key] for key in keys]) > 0.95


def test_a_key_that_owes_much_is_paid_in_one_step() -> None:
    waiting = queue()
    push(waiting, "a", 2)
    assert waiting.pop() is not None
    waiting.charge("a", 1, 10**12)
    entry = waiting.pop()  # walking 4e9 rounds would not end
    assert entry is not None
    assert entry.key == "a"


def test_debts_last_while_something_runs_and_end_with_it() -> None:
    waiting = queue()
    push(waiting, "a", 11)
    waiting.pop()
    waiting.charge("a", 1, 100 * QUANTUM)
    push(waiting, "b", 10)
    assert [entry.key for _ in range(10) if (entry := waiting.pop())] == ["b"] * 10
    assert [entry.key for entry in iter(waiting.pop, None)] == ["a"] * 10
    for key, times in (("a", 11), ("b", 10)):
        for _ in range(times):
            waiting.end(key, 1)
    push(waiting, "a")
    assert [entry.key for entry in iter(waiting.pop, None)] == ["a"]


def test_what_is_used_while_nobody_waits_is_free() -> None:
    waiting = queue()
    push(waiting, "long")
    waiting.pop()
    waiting.charge("long", 1, 1000 * QUANTUM)  # an hour alone
    push(waiting, "long", 9, cost=QUANTUM)
    push(waiting, "new", 9, cost=QUANTUM)
    order = [entry.key for entry in iter(waiting.pop, None)]
    assert order[:3] == ["new"] * 3  # of long, something runs
    assert order[3:11].count("long") == pytest.approx(4, abs=1)


def test_a_key_of_which_something_always_runs_does_not_fall_behind_the_one_that_has_more() -> None:
    waiting = queue()
    push(waiting, "big", 1000)
    push(waiting, "small")
    while (entry := waiting.pop()) and entry.key != "small":
        waiting.end(entry.key, 1)
    for _ in range(100):  # at each third end of a request another one of small comes; one of it runs already
        for _ in range(2):
            entry = waiting.pop()
            assert entry is not None
            waiting.charge(entry.key, 1, 2 * QUANTUM)
            waiting.end(entry.key, 1)
        push(waiting, "small")
        order = []
        while not order or order[-1].key != "small":
            entry = waiting.pop()
            assert entry is not None
            order.append(entry)
        assert len(order) <= 4
        for entry in order:
            waiting.charge(entry.key, 1, 2 * QUANTUM)
            waiting.end(entry.key, 1)


def test_a_key_that_is_owed_goes_first_and_the_others_are_passed_over_where_that_is_asked() -> None:
    waiting = queue()
    push(waiting, "big", 20, cost=SAVED)
    assert [entry.key for _ in range(2) if (entry := waiting.pop())] == ["big"] * 2
    assert waiting.pop(kept_for=99) is None
    push(waiting, "small", 9, cost=QUANTUM)
    assert [entry and entry.key for entry in (waiting.pop(kept_for=99) for _ in range(4))] == ["small"] * 3 + [None]
    waiting.push(7, "heavy", 1, 10, 10.0, weight=5)
    assert waiting.pop(room=4, kept_for=99) is None
    entry = waiting.pop(room=5, kept_for=99)
    assert entry is not None
    assert entry.key == "heavy"
    waiting.end("heavy", 1, 5)
    push(waiting, "new", 3, cost=1)
    assert [entry and entry.key for entry in (waiting.pop(kept_for=2) for _ in range(3))] == ["new"] * 2 + [None]
    assert [waiting.is_owed("new", 1, most_running) for most_running in (2, 3)] == [False, True]
    push(waiting, "better", 9, priority=0, cost=SAVED)
    assert [entry and entry.key for entry in (waiting.pop(kept_for=99) for _ in range(2))] == ["better", None]


def test_keys_that_come_anew_again_and_again_do_not_starve_the_one_that_stays() -> None:
    waiting, taken = queue(), Counter[str]()
    push(waiting, "big", 1000)
    for key in range(8):
        push(waiting, f"serial {key}")
    for _ in range(900):
        entry = waiting.pop()
        assert entry is not None
        taken[entry.key] += 1
        waiting.charge(entry.key, 1, 50)
        waiting.end(entry.key, 1)
        if entry.key != "big":  # with nothing of it running or waiting, it is a new one
            push(waiting, entry.key)
    assert taken["big"] == pytest.approx(100, abs=10)
    assert all(taken[f"serial {key}"] == pytest.approx(100, abs=10) for key in range(8))


def test_a_better_class_goes_first_always() -> None:
    waiting = queue()
    push(waiting, "low", 3, priority=2)
    push(waiting, "normal", 3, priority=1)
    push(waiting, "high", 3, priority=0)
    assert [entry.key for entry in iter(waiting.pop, None)] == ["high"] * 3 + ["normal"] * 3 + ["low"] * 3


def test_a_key_may_fill_its_own_bound_and_leaves_room_for_others() -> None:
    waiting = queue(most=10, most_per_key=6)
    push(waiting, "a", 6)
    with pytest.raises(Full) as full:
        push(waiting, "a")
    assert (full.value.whose, full.value.waiting) == ("key", 6)
    push(waiting, "b", 4)
    with pytest.raises(Full) as full:
        push(waiting, "c")
    assert full.value.whose == "all"
    waiting.pop()
    push(waiting, "c")


def test_what_goes_before_a_request_depends_on_its_key_and_class() -> None:
    waiting = queue()
    assert waiting.ahead("new", 1) == 0
    push(waiting, "a", 10)
    push(waiting, "b", 2)
    push(waiting, "better", 5, priority=0)
    push(waiting, "worse", 50, priority=2)
    assert waiting.ahead("new", 1) == 5 + 2  # one each of a and b
    assert waiting.ahead("b", 1) == 5 + 3 * 2 - 1
    assert waiting.ahead("a", 1) == 5 + 12  # not more than there is
    assert waiting.ahead("new", 0) == 1
    assert waiting.ahead("new", 2) == 5 + 12 + 1


def test_a_request_for_several_texts_counts_as_many_and_is_not_passed_while_there_is_no_room() -> None:
    waiting = queue()
    waiting.push(0, "a", 1, 10, 10.0, weight=8)
    push(waiting, "b", 2)
    assert (len(waiting), waiting.ahead("b", 1), waiting.ahead("a", 1), waiting.ahead("new", 2)) == (3, 5, 10, 10)
    entry = waiting.push(1, "better", 0, 10, 10.0)
    assert waiting.pop(7) is entry
    assert waiting.pop(7) is None
    assert [each.key for each in iter(lambda: waiting.pop(8), None)] == ["a", "b", "b"]
    assert waiting.ahead("new", 2) == 0


def test_a_full_queue_takes_its_place_from_the_longest_of_the_worst_class() -> None:
    waiting = queue()
    assert waiting.last_in_line("new", 2) is None
    newest = push(waiting, "long", 5)[-1]
    push(waiting, "short", 3)
    assert waiting.last_in_line("new", 1) is newest
    assert waiting.last_in_line("short", 1) is newest  # 4 and 4
    push(waiting, "short")
    assert waiting.last_in_line("short", 1) is None  # 5 and 4 is no better than 4 and 5
    assert waiting.last_in_line("long", 1) is None
    assert waiting.last_in_line("new", 2) is None
    assert waiting.last_in_line("short", 0) is newest
    low = push(waiting, "low", priority=2)[-1]
    assert waiting.last_in_line("long", 1) is low


def test_what_leaves_is_not_served_and_frees_its_place() -> None:
    waiting = queue(most=3)
    first, _, last = push(waiting, "a", 3)
    waiting.remove(first)
    waiting.remove(first)
    waiting.remove(last)
    assert len(waiting) == waiting.waiting_of("a", 1) == 1
    push(waiting, "b", 2)
    assert sorted((entry.key, entry.request) for entry in iter(waiting.pop, None)) == [("a", 1), ("b", 0), ("b", 1)]


def test_what_has_left_is_not_kept_while_its_class_waits() -> None:
    waiting, left = queue(), []
    push(waiting, "a", priority=2)
    for _ in range(100):
        entry = waiting.push(7, "a", 2, 1, deadline=10.0)
        waiting.remove(entry)
        left.append(weakref.ref(entry))
        del entry
    assert [ref for ref in left if ref() is not None] == []


def test_what_has_waited_too_long_is_handed_out_as_such() -> None:
    waiting = queue()
    soon = waiting.push(1, "a", 1, 1, deadline=5.0)
    waiting.push(2, "a", 1, 1, deadline=9.0)
    assert list(waiting.expired(5.0)) == [soon]
    assert [entry.request for entry in iter(waiting.pop, None)] == [2]
    assert list(waiting.expired(100.0)) == []


def test_random_use_keeps_its_counts() -> None:
    random_, waiting, kept, running = random.Random(1), queue(), set(), []
    for at in range(5000):
        what = random_.random()
        if what < 0.5:
            key = f"k{random_.randrange(8)}"
            kept.add(id(entry := waiting.push(at, key, random_.randrange(3), 50, random_.random())))
            running.append(entry)
        elif what < 0.8 and (taken := waiting.pop()):
            kept.remove(id(taken))
            waiting.charge(taken.key, taken.priority, random_.random() * 900)
            waiting.end(taken.key, taken.priority)
        elif what < 0.9 and running:
            gone = running.pop(random_.randrange(len(running)))
            kept.discard(id(gone))
            waiting.remove(gone)
        elif what < 0.91:
            kept -= {id(entry) for entry in waiting.expired(random_.random())}
        assert len(waiting) == len(kept)
    assert len(list(iter(waiting.pop, None))) == len(kept)


def test_keys_that_have_gone_are_forgotten_while_others_wait() -> None:
    waiting = queue()
    push(waiting, "big", 5000)
    for key in range(2000):
        push(waiting, f"once {key}")
        for _ in range(2):
            entry = waiting.pop()
            assert entry is not None
            waiting.charge(entry.key, 1, 100)
            waiting.end(entry.key, 1)
    assert len(waiting._idle[1]) < 20
