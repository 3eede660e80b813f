"""What happened to a group, and what is done about it."""

import errno
from dataclasses import replace

import pytest

from cluster.errors import UserError
from jobs.checkpoint.fence import Superseded
from jobs.driver import failures
from jobs.driver.failures import Failure, Limits, RankError

DIED = RankError(("ActorDiedError", "RayActorError"), "The actor died unexpectedly before finishing this task.")
NODE = RankError(("ActorDiedError", "RayActorError"), "The actor died because its node has died. Node Id: 1")
CLOSED = RankError(("RuntimeError",), "[gloo/transport/tcp/pair.cc] Connection closed by peer [127.0.0.1]:1")
STORE = RankError(("KeyError",), "no such key in the store")
BUG = RankError(("ZeroDivisionError", "ArithmeticError"), "division by zero")
NAN = RankError(("NonFiniteLoss", "RuntimeError"), "the loss of step 5 is nan")
CUDA = RankError(("OutOfMemoryError", "RuntimeError"), "CUDA out of memory. Tried to allocate 2 GiB")
HOST = RankError(("OutOfMemoryError", "RayError"), "Task was killed due to the node running low on memory.")
DATA = RankError(("TaskError", "ValueError"), "label 12 of 10", for_user=True)
LATE = RankError.of(Superseded("a newer attempt works on these checkpoints"))
FULL = RankError.of(OSError(errno.ENOSPC, "No space left on device", "/a/file"))
NOTICE = RankError(("ActorDiedError",), "The actor died because its node has died.", preempted=True)


@pytest.mark.parametrize(
    ("errors", "kind", "rank"),
    [
        ({0: CLOSED, 1: DIED}, "worker killed", 1),
        ({0: CLOSED, 2: NODE}, "node lost", 2),
        ({0: CLOSED, 2: NOTICE}, "preempted", 2),
        ({0: DIED, 1: CUDA}, "out of memory", 1),
        ({0: HOST}, "out of memory", 0),
        ({0: NAN, 1: NAN}, "non-finite loss", 0),
        ({0: CLOSED, 1: BUG, 2: CLOSED}, "user code", 1),
        ({0: CLOSED, 1: DATA}, "bad data", 1),
        ({0: LATE, 1: CLOSED}, "bad data", 0),
        ({0: CLOSED, 1: FULL}, "storage", 1),
        ({0: CLOSED, 1: CLOSED}, "worker killed", None),
        ({0: STORE, 1: STORE}, "user code", 0),
        ({}, "start-up", None),
    ],
)
def test_the_class_is_that_of_the_error_which_is_no_consequence(errors, kind, rank):
    found = failures.classify(errors, step=7)
    assert (found.kind, found.rank, found.step) == (kind, rank, 7)


def test_a_group_whose_watchdog_fired_hung():
    assert failures.classify({0: DIED, 1: DIED}, 7, hung=True).kind == "hang"
    assert failures.classify({0: CLOSED, 1: DIED}, 7, hung=True).kind == "hang"
    assert failures.classify({0: NAN}, 7, hung=True).kind == "non-finite loss"


def test_a_group_that_never_trained_failed_to_start():
    assert failures.classify({0: DIED}, 0, started=False).kind == "start-up"


def failure(kind, step=7):
    return Failure(kind, step, 0, "…")


@pytest.mark.parametrize(
    ("kind", "earlier", "limits", "action"),
    [
        ("worker killed", [], Limits(), "retry"),
        ("worker killed", ["worker killed"] * 2, Limits(max_failures=3), "retry"),
        ("worker killed", ["worker killed"] * 3, Limits(max_failures=3), "stop"),
        ("worker killed", ["preempted"] * 30, Limits(max_failures=1), "retry"),
        ("worker killed", ["non-finite loss"] * 5, Limits(max_failures=1), "retry"),
        ("worker killed", [], Limits(max_failures=0), "stop"),
        ("preempted", ["preempted"] * 30, Limits(max_failures=0), "retry"),
        ("bad data", [], Limits(), "stop"),
        ("non-finite loss", [], Limits(), "stop"),
        ("non-finite loss", [], Limits(non_finite="skip"), "skip batch"),
        ("loss spike", ["non-finite loss"] * 9, Limits(non_finite="skip"), "skip batch"),
        ("loss spike", ["non-finite loss"] * 10, Limits(non_finite="skip"), "stop"),
        ("out of memory", [], Limits(), "halve micro-batch"),
        ("out of memory", [], Limits(out_of_memory="stop"), "stop"),
        ("hang", ["hang"], Limits(), "retry"),
    ],
)
def test_what_is_done(kind, earlier, limits, action):
    found = failures.decide(failure(kind), [failure(k) for k in earlier], limits, micro_batch=4)
    assert found.action == action
    assert found.reason


def test_one_row_cannot_be_halved():
    assert failures.decide(failure("out of memory"), [], Limits(), micro_batch=1).action == "stop"


def test_the_reason_names_the_step_that_fails_every_time():
    same = failures.decide(failure("user code", 36), [failure("user code", 36)] * 2, Limits(max_failures=2))
    assert same.reason == "failed 3 times at step 37; max_failures is 2"


def test_failures_with_progress_between_them_do_not_count():
    earlier = [failure("worker killed", step) for step in range(10, 100, 10)]
    found = failures.decide(failure("worker killed", 100), earlier, Limits(max_failures=1))
    assert (found.action, found.wait_s) == ("retry", 0)
    again = failures.decide(failure("worker killed", 100), [*earlier, failure("hang", 100)], Limits(max_failures=1))
    assert again.action == "stop"


def test_the_first_retry_is_at_once_and_later_ones_wait_longer():
    waits = [failures.decide(failure("hang"), [failure("hang")] * n, Limits(max_failures=9)).wait_s for n in range(9)]
    assert waits[0] == 0
    assert waits == sorted(waits)
    assert max(waits) <= 30


def killed_on(node: str | None, kind: str = "worker killed") -> Failure:
    return replace(failure(kind), node=node)


@pytest.mark.parametrize(
    ("now", "earlier", "room", "action"),
    [
        ("a", ["a"], True, "exclude node"),
        ("a", ["a"], False, "retry"),
        ("a", [], True, "retry"),
        ("a", ["b"], True, "retry"),
        ("a", ["a", "b"], True, "retry"),
        (None, [None], True, "retry"),
    ],
)
def test_a_node_whose_workers_die_in_a_row_is_excluded_where_others_have_room(now, earlier, room, action):
    found = failures.decide(killed_on(now), [killed_on(node) for node in earlier], Limits(), room=room)
    assert found.action == action


def test_an_error_of_user_code_excludes_no_node():
    same = killed_on("a", "user code")
    assert failures.decide(same, [same], Limits(), room=True).action == "retry"


def test_a_lost_node_explains_what_the_other_ranks_saw():
    closed = RankError(("RuntimeError",), "[gloo] Connection closed by peer [127.0.0.4]")
    bug = RankError(("ValueError",), "wrong shape")
    assert failures.classify({0: closed, 1: closed}, 7, lost=[2]) == Failure("node lost", 7, 2, closed.message)
    assert failures.classify({0: closed, 1: bug}, 7, lost=[2]).kind == "user code"
    assert failures.classify({0: closed}, 7).kind == "worker killed"


def test_an_exit_code_alone_makes_no_user_error():
    """torch's ProcessExitedException has one: it tells of a crash, which is retried."""
    from torch.multiprocessing.spawn import ProcessExitedException

    crash = ProcessExitedException("died", error_index=0, error_pid=1, exit_code=1)
    assert RankError.of(crash).for_user is False
    assert RankError.of(UserError("bad file")).for_user is True


@pytest.mark.parametrize(
    ("errors", "dead", "kind", "rank"),
    [
        ({0: CLOSED}, {1: False}, "worker killed", 1),
        ({0: CLOSED}, {1: True}, "out of memory", 1),
        ({1: CLOSED}, {0: False}, "worker killed", 0),
        ({0: CLOSED, 1: CLOSED}, {1: False}, "worker killed", 1),
        ({0: CLOSED, 1: DIED}, {1: True}, "out of memory", 1),
        ({0: CLOSED, 1: DIED}, {1: False}, "worker killed", 1),
        ({0: CLOSED, 1: DIED}, {}, "worker killed", 1),
        ({0: CLOSED, 1: BUG}, {1: False}, "user code", 1),
    ],
)
def test_a_rank_that_was_killed_is_named_though_only_another_could_say_so(errors, dead, kind, rank):
    found = failures.classify(failures.with_deaths(errors, dead), 7)
    assert (found.kind, found.rank) == (kind, rank)


@pytest.mark.parametrize(
    ("errors", "asked"),
    [({0: CLOSED}, True), ({0: CLOSED, 1: DIED}, True), ({0: CLOSED, 1: BUG}, False), ({0: NAN}, False)],
)
def test_who_died_is_asked_only_where_no_error_says_so(errors, asked):
    assert failures.need_deaths(errors) is asked
