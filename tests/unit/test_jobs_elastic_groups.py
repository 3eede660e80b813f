"""A run with a range of workers is given whole groups of those that share rows, and leaves excluded nodes."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray.train

from jobs.checkpoint.store import Store
from jobs.driver.leaving import Leaves, Leaving
from jobs.driver.ray_train import ElasticGroup, ElasticSize, FixedSize, FixedSizeOfMore
from jobs.driver.ray_train_internals import NoopDecision, ResizeDecision
from jobs.run_folder import RunFolder
from jobs.run_notes import Attempt, Control


@pytest.mark.parametrize(("room", "multiple", "workers"), [(3, 2, 2), (4, 2, 4), (3, 1, 3), (5, 4, 4)])
def test_what_is_left_of_a_group_is_not_started(tmp_path: Path, room: int, multiple: int, workers: int) -> None:
    scaling = ray.train.ScalingConfig(num_workers=(multiple, 8), resources_per_worker={"CPU": 1})
    policy = ElasticSize(scaling, RunFolder(tmp_path), Store(str(tmp_path)), multiple)
    decision = policy._capped(ResizeDecision(num_workers=room, resources_per_worker={"CPU": 1}))
    assert (decision.num_workers, decision.resources_per_worker) == (workers, {"CPU": 1})
    assert policy._capped(NoopDecision()) == NoopDecision()


class Answering(ElasticGroup):
    """An elastic group whose cluster answers with decisions that are given here."""

    answers: list[ResizeDecision | NoopDecision]

    def make_decision_for_non_running_worker_group(self) -> ResizeDecision | NoopDecision:
        return self.answers.pop(0)


def leaving(folder: Path) -> Leaving:
    """Make what says that a group of three leaves one of its nodes, with a new checkpoint at every look."""
    run, steps = RunFolder(folder), iter(range(1, 100))
    run.write_attempt(Attempt("x", 3, 1, training=True, nodes=("a", "b", "c")))
    run.write_control(Control(excluded=("b",)))
    return Leaving(run, lambda: next(steps))


def test_an_elastic_group_that_leaves_is_resized_once_the_cluster_has_answered(tmp_path: Path) -> None:
    scaling = ray.train.ScalingConfig(num_workers=(1, 3), resources_per_worker={"CPU": 1})
    group = Answering(scaling, RunFolder(tmp_path), Store(str(tmp_path)))
    group.leaving = leaving(tmp_path)
    assert not group.leaving.is_due(), "it saves first"
    resize = ResizeDecision(num_workers=2, resources_per_worker={"CPU": 1})
    group.answers = [NoopDecision(), resize]
    assert group.make_decision_for_running_worker_group(None, None) == NoopDecision()
    assert group.make_decision_for_running_worker_group(None, None) == resize
    assert not group.leaving.is_due()


@pytest.mark.parametrize("kind", [FixedSize, FixedSizeOfMore])
def test_a_group_of_one_size_that_leaves_is_started_again_with_as_many(kind: type[Leaves], tmp_path: Path) -> None:
    scaling = ray.train.ScalingConfig(num_workers=3, resources_per_worker={"CPU": 1})
    group = type("Silent", (kind,), {"_maybe_send_resource_request": lambda self: None})(scaling)
    assert group.make_decision_for_running_worker_group(None, None) == NoopDecision()
    group.leaving = leaving(tmp_path)
    assert group.make_decision_for_running_worker_group(None, None) == NoopDecision(), "it saves first"
    decision = group.make_decision_for_running_worker_group(None, None)
    assert isinstance(decision, ResizeDecision)
    assert decision.num_workers == 3
    assert group.make_decision_for_running_worker_group(None, None) == NoopDecision()
