"""What `tandem cluster status` says of nodes (cluster/node_report.py)."""

from dataclasses import replace

import pytest

from cluster.node_report import MOST_DEATHS, Kept, state_of, told_of, trouble
from cluster.rejoining import RETURNS_LABEL
from cluster.topology import Node
from cluster.vitals import Vitals, read, wrong

GIB = 1024**3
NOW = 1_000_000.0
ALIVE = Node("a1", "10.0.0.2", alive=True, is_head=False, total_cpus=1, free_cpus=1)
DEAD = replace(ALIVE, alive=False, reason="health check\n failed", ended_at=NOW - 125)
KEPT = Kept(1, "up", 0, "", NOW - 10, "/logs/ray-node-1.log")


def test_how_a_node_is() -> None:
    assert state_of(ALIVE, NOW) == "alive"
    assert state_of(replace(ALIVE, labels={RETURNS_LABEL: "2"}), NOW) == "alive, has joined again 2 times"
    assert state_of(DEAD, NOW) == "dead for 2 minutes"
    assert state_of(replace(DEAD, ended_at=0), NOW) == "dead"


def test_a_label_that_is_no_number_is_none_of_ours() -> None:
    assert replace(ALIVE, labels={RETURNS_LABEL: "often"}).returns == 0


def test_deaths_are_told_with_rays_reason_and_returns_with_the_log() -> None:
    back = replace(KEPT, returns=1, reason="its raylet was ended by SIGKILL")
    died, returned = trouble([ALIVE, DEAD], {}, [back, replace(KEPT, number=2)], NOW)
    assert died == "10.0.0.2 died: health check failed"
    assert returned.startswith("node 1 has joined again (1 time in all), 10 seconds ago: ")
    assert returned.endswith("its raylet was ended by SIGKILL; log: /logs/ray-node-1.log")


def test_of_many_deaths_the_newest_are_told_and_the_rest_counted() -> None:
    dead = [replace(DEAD, address=f"10.0.0.{n}", ended_at=NOW - n) for n in range(MOST_DEATHS + 2)]
    told = trouble(dead, {}, [], NOW)
    assert told[0].startswith("10.0.0.0 ")
    assert len(told) == MOST_DEATHS + 1
    assert told[-1].startswith("2 earlier deaths")


def test_full_disks_and_wrong_clocks_are_told_of_living_nodes() -> None:
    fine = Vitals("a1", 4.0, 500 * GIB, 1000 * GIB)
    assert trouble([ALIVE], {"a1": fine}, [], NOW) == []
    ahead = replace(fine, age_s=-60.0)
    assert trouble([ALIVE], {"a1": ahead}, [], NOW) == ["10.0.0.2: its clock is 60 s ahead of the head's"]
    assert "clock is behind" in wrong(replace(fine, age_s=64.0))[0]
    assert wrong(replace(fine, age_s=-2.0)) == wrong(replace(fine, age_s=9.0)) == []
    full = replace(fine, disk_free_bytes=GIB // 2)
    assert wrong(full) == ["its disk is full: 0.5 of 1000.0 GiB are free"]
    assert wrong(Vitals("a1", 4.0, GIB // 2, 4 * GIB)) == [], "a small disk with an eighth of it free"
    assert len(wrong(replace(full, age_s=-60.0))) == 2
    assert not any("clock" in line for line in trouble([DEAD], {"a1": ahead}, [], NOW))


def test_reports_are_read_by_the_fullest_disk_and_the_heads_clock() -> None:
    disks = {"/": {"free": 100, "total": 1000}, "/tmp/ray": {"free": 5, "total": 50}}
    found = read({"a1": {"now": NOW - 3, "disk": disks}, "b2": {}}, NOW)
    assert found == {"a1": Vitals("a1", 3.0, 5, 50)}


@pytest.mark.parametrize(
    ("state", "words"),
    [("down", "is being started again"), ("ended", "is started no more"), ("left alone", "has no supervisor any more")],
)
def test_a_node_that_is_not_up_is_always_told(state: str, words: str) -> None:
    told = told_of(replace(KEPT, state=state), NOW)
    assert told is not None
    assert words in told


def test_a_node_that_has_always_been_up_is_not() -> None:
    assert told_of(KEPT, NOW) is None
