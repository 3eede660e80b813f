"""What Tandem uses of Ray Train's insides (ray 2.60, ray/train/v2/_internal): policies, a callback, the trainer's run.

Ray Train has the extension points, but no public way to hand them to a trainer. Our own policies are in
jobs/driver/ray_train.py; here is only what touches Ray Train's own attributes.
"""

from __future__ import annotations

from typing import Any

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision, ScalingPolicy
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy
from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy
from ray.train.v2._internal.util import ObjectRefWrapper

from cluster import interfaces
from cluster.internals import Internal

__all__ = [
    "ControllerCallback",
    "ElasticPolicy",
    "FailureDecision",
    "FailurePolicy",
    "FixedScalingPolicy",
    "FixedWithoutAutoscaler",
    "InterfacesFirst",
    "NoopDecision",
    "PolicyTrainer",
    "ResizeDecision",
    "ScalingPolicy",
    "worker_resources",
]

ENTRIES = (
    Internal(
        "DataParallelTrainer._initialize_and_run_controller, _get_train_func, _create_default_callbacks",
        "to run Ray Train's controller with policies of our own",
        "nothing trains",
        "TorchTrainer takes policies and controller callbacks",
    ),
    Internal(
        "DataParallelTrainer._register_sigint_handler",
        "replaced by nothing: at Ctrl-C Ray Train aborts the group at once, and the job would end unsaved",
        "a job that gets SIGINT ends without a checkpoint",
        "the trainer leaves signals alone",
    ),
    Internal(
        "ray.train.v2._internal.execution.failure_handling",
        "to decide by the kind of failure: skip a batch, halve the micro-batch, exclude a node, stop",
        "nothing trains; with Ray Train's own policy every failure is only tried again",
        "as for _initialize_and_run_controller",
    ),
    Internal(
        "ScalingPolicy._maybe_send_resource_request, _send_resource_request, _cancel_resource_request",
        "replaced by nothing on a cluster that cannot grow: asking the autoscaler takes an actor of its own",
        "each job starts one more process, 2 s later",
        "Ray Train asks only where there is an autoscaler",
    ),
    Internal(
        "ElasticScalingPolicy._get_reserved_resources, _autoscaling_coordinator, _requester_id",
        "replaced by a question for a fresh view: the coordinator's own is up to 20 s old",
        "a run with a range of workers asks for a node that is just lost, and waits a minute for it",
        "the coordinator looks again when a node is lost",
    ),
    Internal(
        "ElasticScalingPolicy._latest_monitor_time",
        "to decide anew at once when the checkpoint that a resize waited for is there",
        "a run that may grow or shrink does so one monitoring interval late, from an older checkpoint",
        "a policy can ask to be called again",
    ),
    Internal(
        "ray.train.v2._internal.execution.scaling_policy (ResizeDecision, NoopDecision, FixedScalingPolicy)",
        "to limit a group to the nodes that are not excluded, and to save before a resize",
        "nothing trains",
        "as for _initialize_and_run_controller",
    ),
    Internal(
        "ControllerCallback.on_controller_start_worker_group",
        "to keep workers off the nodes that a failure has excluded, by a label selector",
        "workers come back to a node that fails each time",
        "ScalingConfig's label selector can change between attempts",
    ),
    Internal(
        "DatasetsCallback, PlacementGroupCleanerCallback",
        "left out: each starts a process; we read our own rows, and placement groups end with the driver's job",
        "each job starts two more processes",
        "Ray Train starts them where they are needed",
    ),
    Internal(
        "ScalingConfig._resources_per_worker_not_none",
        "what a worker takes, to see how many fit on the nodes that are not excluded",
        "a run with a range of workers fails when it is resized",
        "ScalingConfig tells it",
    ),
    Internal(
        "WorkerGroupError.worker_failures; .cause, .health_check_failure, .preempted of what is in it",
        "to know which rank failed, and of what, beneath Ray's wrapping",
        "every failure is taken for one of the user's code, or of no known rank",
        "Ray Train documents what `worker_failures` holds",
    ),
    Internal(
        "TorchConfig.backend_cls; on_start(group, config) of what it returns; group.execute",
        "to set, on each node, the interface that gloo and NCCL take, before the process group is made",
        "on nodes whose own name resolves to 127.0.1.1, as Debian has it, no group over several nodes comes up",
        "Ray Train takes variables by node, or a hook in the worker before it makes the process group",
    ),
)


def _take_interfaces() -> None:
    """Set the interface in a worker whose group spans nodes: on one node, gloo and NCCL reach all of it anyway."""
    context = ray.train.get_context()
    if context.get_local_world_size() < context.get_world_size():
        interfaces.take()


class _AfterInterfaces(TorchConfig().backend_cls):  # type: ignore[misc]
    """Ray Train's process group for torch, made once every worker knows its interface."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Set the interfaces, then make the group."""
        worker_group.execute(_take_interfaces)
        super().on_start(worker_group, backend_config)


class InterfacesFirst(TorchConfig):
    """`TorchConfig` whose process group goes by the interface that has Ray's address of the node."""

    @property
    def backend_cls(self) -> Any:
        """Return what makes the process group."""
        return _AfterInterfaces


class FixedWithoutAutoscaler(FixedScalingPolicy):
    """A group of one size on a cluster that cannot grow: no autoscaler is asked."""

    def _maybe_send_resource_request(self) -> None:
        pass

    def _send_resource_request(self) -> None:
        pass

    def _cancel_resource_request(self) -> None:
        pass


class ElasticPolicy(ElasticScalingPolicy):
    """Ray Train's elastic size, by a fresh view of the cluster."""

    def decide_anew(self) -> None:
        """Have the next decision about a running group made at once, not when the monitoring interval is over."""
        self._latest_monitor_time = float("-inf")

    def _get_reserved_resources(self) -> Any:
        """Return what the coordinator has reserved; None if it does not answer."""
        try:
            reference = self._autoscaling_coordinator.get_reserved_resources.remote(self._requester_id, recompute=True)
            return ray.get(reference, timeout=5)
        except (ray.exceptions.RayError, TimeoutError):
            return None


class PolicyTrainer(TorchTrainer):
    """`TorchTrainer` with policies of our own, and without the callbacks that start processes we do not use."""

    def __init__(
        self,
        *arguments: Any,
        scaling: ScalingPolicy,
        failures: FailurePolicy,
        callback: ControllerCallback,
        **keywords: Any,
    ) -> None:
        super().__init__(*arguments, **keywords)
        self._callback = callback
        self._policies = {"scaling_policy": scaling, "failure_policy": failures}

    def _register_sigint_handler(self, controller: Any) -> None:
        """Leave SIGINT as it is: Ray Train would abort at once, where the driver has the run saved first."""

    def fit(self) -> Any:
        """Train; raise `ray.train.TrainingFailedError` if that failed for good."""
        unused = (DatasetsCallback, PlacementGroupCleanerCallback)
        result = self._initialize_and_run_controller(
            train_fn_ref=ObjectRefWrapper(self._get_train_func()),
            train_run_context=self.train_run_context,
            callbacks=[
                self._callback,
                *(callback for callback in self._create_default_callbacks() if not isinstance(callback, unused)),
            ],
            validation_config=None,
            **self._policies,
        )
        if result.error:
            raise result.error
        return result


def worker_resources(scaling_config: Any) -> dict[str, float]:
    """Return what one worker takes, by resource."""
    return dict(scaling_config._resources_per_worker_not_none)
