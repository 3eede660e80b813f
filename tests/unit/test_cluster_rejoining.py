"""When a node is started again (cluster/rejoining.py)."""

import signal
from dataclasses import replace

import pytest

from cluster.rejoining import (
    ASKED,
    FIRST_PAUSE_S,
    LONGEST_PAUSE_S,
    MOST_TRIES,
    SILENCE_S,
    Seen,
    decide,
    ended_how,
    node_id,
    pause_s,
    with_label,
)

DEAD = Seen(runs=False, exit_code=1, head_answers=True, idle_s=FIRST_PAUSE_S)


def test_a_living_raylet_is_watched() -> None:
    assert decide(Seen(runs=True)).action == "watch"


def test_a_raylet_that_died_is_started_again_once_ray_knows_that_it_is_dead() -> None:
    assert decide(DEAD).action == "start"
    assert decide(replace(DEAD, idle_s=FIRST_PAUSE_S / 2)).action == "wait"
    assert decide(replace(DEAD, exit_code=-signal.SIGKILL)).action == "start"
    assert decide(replace(DEAD, exit_code=None)).action == "start"  # the kernel does not tell


@pytest.mark.parametrize("code", ASKED)
def test_a_stop_that_was_asked_for_is_no_death(code: int) -> None:
    assert decide(replace(DEAD, exit_code=code)).action == "end"
    assert decide(replace(DEAD, exit_code=code, tries=3)).action == "end"


def test_nothing_is_started_while_the_head_does_not_answer_nor_waited_for_ever() -> None:
    silent = replace(DEAD, head_answers=False, idle_s=3600, silent_s=3600)
    assert decide(silent).action == "wait"
    given_up = decide(replace(silent, silent_s=SILENCE_S + 1))
    assert given_up.action == "end"
    assert "24 hours" in given_up.reason


def test_what_the_head_has_given_up_is_started_at_once_but_not_again_and_again() -> None:
    given_up = replace(DEAD, idle_s=0, given_up=True)
    assert decide(given_up).action == "start"
    assert decide(replace(given_up, tries=1)).action == "wait"


def test_a_raylets_command_line_names_its_node() -> None:
    assert node_id(["/ray/raylet", "--x=1", "--node_id=abc1", "--node_ip_address=1"]) == "abc1"
    assert node_id(["/ray/raylet"]) == ""


def test_pauses_grow_and_starts_in_vain_come_to_an_end() -> None:
    pauses = [pause_s(tries) for tries in range(MOST_TRIES)]
    assert pauses == sorted(pauses)
    assert pauses[0] == FIRST_PAUSE_S
    assert pauses[-1] == LONGEST_PAUSE_S
    for tries in range(MOST_TRIES):
        assert decide(replace(DEAD, tries=tries, idle_s=pauses[tries] - 0.1)).action == "wait"
        assert decide(replace(DEAD, tries=tries, idle_s=pauses[tries])).action == "start"
    assert decide(replace(DEAD, tries=MOST_TRIES, idle_s=3600)).action == "end"


def test_a_node_ends_with_its_cluster() -> None:
    assert decide(Seen(runs=True, wanted=False)).action == "end"
    assert decide(replace(DEAD, wanted=False)).action == "end"


def test_how_a_raylet_ended_is_said() -> None:
    assert "SIGKILL" in ended_how(-signal.SIGKILL)
    assert "declared dead" in ended_how(1)
    assert "declared dead" in ended_how(-signal.SIGABRT)
    assert "code 3" in ended_how(3)
    assert "gone" in ended_how(None)


def test_labels_of_the_user_are_left_alone() -> None:
    assert with_label(["ray", "start"], "a", 2) == ["ray", "start", "--labels=a=2"]
    for own in ("--labels=b=1", "--labels-file=x", "--labels"):
        assert with_label(["ray", "start", own], "a", 2) == ["ray", "start", own]
