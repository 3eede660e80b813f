"""Slow nodes: what is compared, when it is said, and who may be excluded (jobs/driver/stragglers.py)."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.driver import postmortem
from jobs.driver.leaving import SAVE_TIMEOUT_S, Leaving
from jobs.driver.stragglers import RATIO, WINDOWS, Straggler, Streaks, sentence, slower, why_not
from jobs.paces import Pace, Paces
from jobs.run_folder import RunFolder
from jobs.run_notes import Attempt, Control
from jobs.worker.pace import FEWEST_STEPS, PaceKeeper, own_s


def paces(own: Mapping[str, list[float]], window: int = 1, step: int = 10, step_s: float = 2.0) -> dict[int, Pace]:
    """Make one of each rank from the own times on each node; ranks go through the nodes in order."""
    told = [(node, seconds) for node, all_of in own.items() for seconds in all_of]
    return {rank: Pace(node, window, step, seconds, step_s, 4.0) for rank, (node, seconds) in enumerate(told)}


def names(found: list[Straggler]) -> list[tuple[str, tuple[int, ...]]]:
    return [(straggler.node, straggler.ranks) for straggler in found]


def test_the_one_that_works_longer_is_slow_however_many_ranks_it_has() -> None:
    assert names(slower(paces({"a": [1.0], "b": [2.0], "c": [1.0]}), RATIO)) == [("b", (1,))]
    assert names(slower(paces({"a": [1.0], "b": [2.0] * 4, "c": [1.0]}), RATIO)) == [("b", (1, 2, 3, 4))]
    assert names(slower(paces({"a": [1.0] * 4, "b": [1.0, 1.0, 2.0, 1.0]}), RATIO)) == [("b", (6,))]
    assert slower(paces({"a": [1.0], "b": [1.2], "c": [1.1]}), RATIO) == []


def test_of_two_the_slower_one_is_named_and_nothing_is_certain() -> None:
    (found,) = slower(paces({"a": [1.0], "b": [2.0]}), RATIO)
    assert (found.node, found.ratio, found.outnumbered) == ("b", 2.0, False)


def test_ranks_of_one_node_are_compared_with_each_other() -> None:
    assert names(slower(paces({"a": [1.0, 1.0, 2.0]}), RATIO)) == [("a", (2,))]


def test_most_of_three_or_more_have_to_be_faster() -> None:
    (found,) = slower(paces({"a": [1.0], "b": [2.0], "c": [1.0]}), RATIO)
    assert found.outnumbered
    both = slower(paces({"a": [1.0], "b": [2.0], "c": [2.0], "d": [1.0]}), RATIO)
    assert [straggler.outnumbered for straggler in both] == [False, False]
    assert slower(paces({"a": [1.0], "b": [2.0], "c": [2.0]}), RATIO) == [], "two slow ones are the rule"


def test_what_costs_next_to_nothing_of_a_step_is_no_straggler() -> None:
    assert slower(paces({"a": [0.001], "b": [0.003], "c": [0.001]}, step_s=1.0), RATIO) == []
    assert slower(paces({"a": [0.001], "b": [0.0025], "c": [0.001]}, step_s=0.003), RATIO) == []


def test_a_rank_with_more_rows_may_take_longer_and_one_with_fewer_is_not_blamed() -> None:
    uneven = paces({"a": [2.0], "b": [1.0], "c": [1.0]})
    assert names(slower(uneven, RATIO)) == [("a", (0,))]
    uneven[0] = replace(uneven[0], rows=8.0)
    assert slower(uneven, RATIO) == []
    few = paces({"a": [1.0], "b": [1.0], "c": [1.0]})
    few[2] = replace(few[2], rows=1.0)
    assert slower(few, RATIO) == []


def said(
    streaks: Streaks, own: Mapping[str, list[float]], windows: range, attempt: str = "x"
) -> list[tuple[str, bool]]:
    found = []
    for window in windows:
        told = paces(own, window, 10 * window)
        found += [(news.node, news.over) for news in streaks.look(attempt, len(told), told)]
    return found


SLOW, EVEN = {"a": [1.0], "b": [2.0], "c": [1.0]}, {"a": [1.0], "b": [1.0], "c": [1.0]}


def test_it_is_said_once_after_windows_in_a_row_and_again_when_it_is_over() -> None:
    streaks = Streaks()
    assert said(streaks, SLOW, range(1, WINDOWS)) == []
    assert said(streaks, SLOW, range(WINDOWS, WINDOWS + 1)) == [("b", False)]
    assert streaks.told["b"].step == 10, "since the first of them"
    assert said(streaks, SLOW, range(10, 20)) == []
    assert said(streaks, EVEN, range(20, 20 + WINDOWS)) == [("b", True)]
    assert said(streaks, EVEN, range(30, 40)) == []
    assert said(streaks, SLOW, range(40, 40 + WINDOWS)) == [("b", False)]


def test_a_moment_is_none() -> None:
    streaks = Streaks()
    for start in range(1, 100, WINDOWS):
        assert said(streaks, SLOW, range(start, start + WINDOWS - 1)) == []
        assert said(streaks, EVEN, range(start + WINDOWS - 1, start + WINDOWS)) == []


def test_what_lies_between_the_limits_neither_begins_nor_ends_it() -> None:
    between = {"a": [1.0], "b": [1.25], "c": [1.0]}
    streaks = Streaks()
    assert said(streaks, between, range(1, 20)) == []
    assert said(streaks, SLOW, range(20, 20 + WINDOWS)) == [("b", False)]
    assert said(streaks, between, range(30, 50)) == []


def test_nothing_is_compared_before_every_rank_has_told_a_new_window() -> None:
    streaks = Streaks()
    told = paces(SLOW)
    for _ in range(10):
        assert streaks.look("x", 3, told) == []
        assert streaks.look("x", 4, told) == []
    assert streaks.slow["b"][0] == 1


def test_another_start_of_the_group_counts_anew_and_forgets_nodes_that_are_gone() -> None:
    streaks = Streaks()
    said(streaks, SLOW, range(1, WINDOWS + 1))
    assert said(streaks, {"a": [1.0], "c": [1.0]}, range(1, 10), "y") == []
    assert streaks.told == {}


def test_what_is_said() -> None:
    one = Straggler("b", (1,), 2.04, 120)
    assert "node 10.0.0.2 (b) is a straggler: rank 1 of it took 2.0 times" in sentence(one, "10.0.0.2 (b)")
    assert "since step 120" in sentence(one, "b")
    assert "ranks 1, 2 of it" in sentence(replace(one, ranks=(1, 2)), "b")
    assert "8 ranks of it" in sentence(replace(one, ranks=tuple(range(8))), "b")
    assert "keeps up with the others again, at step 120" in sentence(replace(one, over=True), "b")


def test_who_may_be_excluded() -> None:
    certain = Straggler("b", (1,), 2.0, 1, outnumbered=True)
    assert why_not(certain, has_room=True) is None
    assert "no room" in (why_not(certain, has_room=False) or "")
    assert "three nodes" in (why_not(replace(certain, outnumbered=False), has_room=True) or "")


def test_own_time_is_without_the_waits_for_others() -> None:
    parts = {"forward_s": 0.2, "backward_s": 0.5, "communication_s": 0.4}
    assert own_s(parts, 1.0, 0.1, on_gpu=False) == pytest.approx(0.6)
    assert own_s(parts, 1.0, 0.1, on_gpu=True) == pytest.approx(0.3)
    assert own_s({"communication_s": 2.0}, 1.0, 0.0, on_gpu=False) == 0.0


def test_a_rank_tells_averages_and_no_more_often_than_it_should(tmp_path: Path) -> None:
    now = [0.0]
    kept = Paces(tmp_path)
    keeper = PaceKeeper(kept, "x", 1, "node-b", window_s=5.0, clock=lambda: now[0])
    for step in range(1, 20):
        now[0] += 0.1
        keeper.note(step, 0.1, 0.2, 4)
    assert kept.of("x") == {}
    now[0] = 5.0
    keeper.note(20, 2.1, 4.2, 4)
    assert kept.of("x") == {1: Pace("node-b", 1, 20, pytest.approx(0.2), pytest.approx(0.4), 4.0)}
    now[0] = 100.0
    for step in range(21, 21 + FEWEST_STEPS):
        assert kept.of("x")[1].window == 1
        keeper.note(step, 0.3, 0.4, 4)
    assert kept.of("x")[1] == Pace("node-b", 2, 20 + FEWEST_STEPS, pytest.approx(0.3), pytest.approx(0.4), 4.0)
    assert kept.of("y") == {}


def test_half_a_note_is_passed_over(tmp_path: Path) -> None:
    kept = Paces(tmp_path)
    kept.write("x", 0, Pace("a", 1, 1, 1.0, 1.0, 1.0))
    (tmp_path / "paces" / "x-rank-1").write_text('{"node": "b", "win')
    assert list(kept.of("x")) == [0]


def test_the_post_mortem_names_slow_nodes_also_of_a_run_that_did_not_fail(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.paces.add_straggler({"time": 0.0, "node": "b", "step": 120, "said": "node b is a straggler", "over": False})
    page = postmortem.page(folder)
    assert "## Slow nodes" in page
    assert "1970-01-01 00:00:00 UTC: node b is a straggler" in page
    folder.begin()
    assert "Slow nodes" not in postmortem.page(folder)


def test_a_group_leaves_an_excluded_node_once_it_has_saved(tmp_path: Path) -> None:
    folder, now, newest = RunFolder(tmp_path), [0.0], [10]
    group = Leaving(folder, lambda: newest[0], lambda: now[0])
    assert not group.is_due(), "no group yet"
    folder.write_attempt(Attempt("x", 3, 1, training=True, nodes=("a", "b", "c")))
    folder.write_control(Control(excluded=("z",)))
    assert not group.is_due()
    assert not folder.save_requested()
    folder.write_control(Control(excluded=("b",)))
    assert not group.is_due()
    assert folder.save_requested()
    now[0] = SAVE_TIMEOUT_S - 1
    assert not group.is_due()
    newest[0] = 20
    assert group.is_due()
    assert group.is_due(), "until it is done"
    group.leave()
    assert not group.is_due(), "once for each start of the group"
    folder.write_attempt(Attempt("y", 2, 1, training=True, nodes=("a", "c")))
    assert not group.is_due()
    folder.write_control(Control(excluded=("b", "c")))
    assert not group.is_due()
    now[0] += SAVE_TIMEOUT_S
    assert group.is_due(), "a save that does not come is waited for in vain no longer"
