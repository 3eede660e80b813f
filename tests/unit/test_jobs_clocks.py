"""Machines whose clocks are off (jobs/worker/clocks.py)."""

from pathlib import Path

from jobs.driver import postmortem
from jobs.run_folder import RunFolder
from jobs.worker import clocks
from jobs.worker.clocks import off


def test_the_one_that_differs_from_most_is_named() -> None:
    (said,) = off([("a", 1000.0), ("b", 1060.4), ("c", 1000.1)])
    assert said.startswith("the clock of b is 60 s ahead of the others'")
    (said,) = off([("a", 1000.0), ("b", 1060.0), ("c", 1060.1)])
    assert said.startswith("the clock of a is 60 s behind the others'")


def test_of_two_one_is_compared_with_the_other() -> None:
    (said,) = off([("a", 1000.0), ("b", 940.0)])
    assert said.startswith("the clock of b is 60 s behind that of a")


def test_ranks_of_one_machine_are_one_voice_and_small_differences_none() -> None:
    assert off([("a", 1000.0), ("a", 1000.1), ("b", 1001.9), ("b", 1002.0)]) == []
    assert len(off([("a", 1000.0), ("a", 1000.1), ("b", 1060.0), ("b", 1060.1), ("b", 1060.2)])) == 1
    assert off([("a", 1000.0)]) == []


def test_the_post_mortem_takes_it_up(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.add_remarks(["something else", *off([("a", 1000.0), ("b", 940.0)])])
    page = postmortem.page(folder)
    assert "## Clocks\n\n- the clock of b is 60 s behind" in page
    assert "something else" not in page
    assert postmortem.CLOCK == clocks.BEGIN


def test_the_post_mortem_names_the_node_and_why_ray_took_it_off(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    entry = {
        "kind": "node lost", "rank": 2, "step": 37, "message": "gone", "time": 0.0, "action": "retry", "reason": "",
        "checkpoint": 30, "workers": 3, "where": "10.0.0.3 (0a1b2c3d)", "node_said": "health check failed",
    }  # fmt: skip
    folder.add_failure(entry)
    assert "| node | 10.0.0.3 (0a1b2c3d): health check failed |" in postmortem.page(folder)
