"""A run with a range of workers is given whole groups of those that share rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray.train

from jobs.checkpoint.store import Store
from jobs.driver.ray_train import ElasticSize
from jobs.driver.ray_train_internals import NoopDecision, ResizeDecision
from jobs.run_folder import RunFolder


@pytest.mark.parametrize(("room", "multiple", "workers"), [(3, 2, 2), (4, 2, 4), (3, 1, 3), (5, 4, 4)])
def test_what_is_left_of_a_group_is_not_started(tmp_path: Path, room: int, multiple: int, workers: int) -> None:
    scaling = ray.train.ScalingConfig(num_workers=(multiple, 8), resources_per_worker={"CPU": 1})
    policy = ElasticSize(scaling, RunFolder(tmp_path), Store(str(tmp_path)), multiple)
    decision = policy._capped(ResizeDecision(num_workers=room, resources_per_worker={"CPU": 1}))
    assert (decision.num_workers, decision.resources_per_worker) == (workers, {"CPU": 1})
    assert policy._capped(NoopDecision()) == NoopDecision()
