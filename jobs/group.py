"""The worker group of a training job: Ray Train's trainer, with our policies and without the helpers we do not use.

The policies are Ray Train's own extension points (ray 2.60, ray/train/v2/_internal/execution).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray.train
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.failure_handling import create_failure_policy
from ray.train.v2._internal.execution.scaling_policy import create_scaling_policy
from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy
from ray.train.v2._internal.util import ObjectRefWrapper

from jobs import warm
from jobs.spec import JobSpec

UNUSED_CALLBACKS = (DatasetsCallback, PlacementGroupCleanerCallback)
"""Each starts an actor in a process of its own. We read our own rows; placement groups end with the driver's job."""


class FixedSize(FixedScalingPolicy):
    """A group of one size on a cluster that cannot grow: no autoscaler is asked, which takes an actor of its own."""

    def _maybe_send_resource_request(self) -> None:
        pass

    def _send_resource_request(self) -> None:
        pass

    def _cancel_resource_request(self) -> None:
        pass


class Trainer(TorchTrainer):
    """`TorchTrainer` with Tandem's policies.

    Args:
        autoscaling: whether the cluster may get more nodes if it is asked for them.
    """

    def __init__(self, *arguments: Any, autoscaling: bool, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._autoscaling = autoscaling

    def fit(self) -> Any:
        """Train; raise `ray.train.TrainingFailedError` if that failed for good."""
        scaling = create_scaling_policy(self.scaling_config)
        if not self._autoscaling and isinstance(scaling, FixedScalingPolicy):
            scaling = FixedSize(self.scaling_config)
        result = self._initialize_and_run_controller(
            train_fn_ref=ObjectRefWrapper(self._get_train_func()),
            scaling_policy=scaling,
            failure_policy=create_failure_policy(self.run_config.failure_config),
            train_run_context=self.train_run_context,
            callbacks=[c for c in self._create_default_callbacks() if not isinstance(c, UNUSED_CALLBACKS)],
            validation_config=None,
        )
        if result.error:
            raise result.error
        return result


def train(
    function: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    *,
    spec: JobSpec,
    name: str,
    storage: Path,
    autoscaling: bool,
) -> None:
    """Run `function(config)` on every worker; a lost group is started again from its checkpoint.

    Args:
        name: of this attempt; Ray Train resumes its own state under a name it has seen.
        storage: where Ray Train keeps that state.

    Raises:
        ray.train.TrainingFailedError: the group failed more often than `max_failures`.
    """
    wanted = spec.resources
    gpus = {"GPU": wanted.gpus_per_worker} if wanted.gpus_per_worker else {}
    Trainer(
        function,
        train_loop_config=config,
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=wanted.workers,
            use_gpu=bool(gpus),
            resources_per_worker={"CPU": wanted.cpus_per_worker, **gpus},
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=str(storage),
            failure_config=ray.train.FailureConfig(max_failures=spec.max_failures),
            worker_runtime_env={"env_vars": warm.WORKER},
        ),
        autoscaling=autoscaling,
    ).fit()
