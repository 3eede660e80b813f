"""Ray Train still has what jobs/driver/ray_train_internals.py relies on."""

import pytest

from jobs.driver import ray_train_internals
from tests.support.contracts import Contract, calls, has_attributes, source_mentions, takes

TRAIN = Contract("jobs/driver/ray_train_internals.py", ray_train_internals.ENTRIES)


@TRAIN.check("DataParallelTrainer._initialize_and_run_controller, _get_train_func, _create_default_callbacks")
def _trainer() -> None:
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.execution.controller.controller import TrainController
    from ray.train.v2._internal.util import ObjectRefWrapper

    has_attributes(TorchTrainer, "_get_train_func", "_create_default_callbacks")
    takes(TorchTrainer._initialize_and_run_controller, "train_fn_ref")
    controller = ("train_fn_ref", "train_run_context", "callbacks", "validation_config")
    takes(TrainController.__init__, *controller, "scaling_policy", "failure_policy")
    calls(
        TorchTrainer.fit,
        "self.train_run_context",
        "ObjectRefWrapper",
        "_get_train_func()",
        "_create_default_callbacks()",
        "result.error",
    )
    assert ObjectRefWrapper is not None


@TRAIN.check("DataParallelTrainer._register_sigint_handler")
def _sigint() -> None:
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    calls(DataParallelTrainer, "self._register_sigint_handler(controller)")


@TRAIN.check("ray.train.v2._internal.execution.failure_handling")
def _failures() -> None:
    from ray.train.v2._internal.execution.controller.controller import TrainController
    from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy

    assert {"RETRY", "RAISE"} <= set(FailureDecision.__members__)
    takes(FailurePolicy.make_decision, "training_failed_error")
    calls(TrainController, "self._failure_policy.make_decision(")


@TRAIN.check("ScalingPolicy._maybe_send_resource_request, _send_resource_request, _cancel_resource_request")
def _requests() -> None:
    from ray.train.v2._internal.execution.scaling_policy import ScalingPolicy
    from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy

    names = ("_maybe_send_resource_request", "_send_resource_request", "_cancel_resource_request")
    has_attributes(FixedScalingPolicy, *names)
    calls(FixedScalingPolicy, "self._maybe_send_resource_request()")
    calls(ScalingPolicy, "self._send_resource_request()", "self._cancel_resource_request()")


@TRAIN.check("ElasticScalingPolicy._get_reserved_resources, _autoscaling_coordinator, _requester_id")
def _reserved() -> None:
    from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as coordinator
    from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy

    calls(ElasticScalingPolicy, "self._get_reserved_resources()", "self._autoscaling_coordinator", "self._requester_id")
    source_mentions(coordinator.__name__, "self, requester_id: RequesterId, recompute: bool = False")


@TRAIN.check("ElasticScalingPolicy._latest_monitor_time")
def _monitor() -> None:
    from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy

    calls(ElasticScalingPolicy.__init__, 'self._latest_monitor_time = float("-inf")')
    calls(ElasticScalingPolicy.make_decision_for_running_worker_group, "self._latest_monitor_time")


@TRAIN.check("ray.train.v2._internal.execution.scaling_policy (ResizeDecision, NoopDecision, FixedScalingPolicy)")
def _scaling() -> None:
    from ray.train.v2._internal.execution.controller.controller import TrainController
    from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision
    from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy
    from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy

    assert {"num_workers", "resources_per_worker"} <= ResizeDecision.__dataclass_fields__.keys()
    NoopDecision()
    for policy in (ElasticScalingPolicy, FixedScalingPolicy):
        takes(policy.__init__, "scaling_config")
    takes(ElasticScalingPolicy.make_decision_for_running_worker_group, "worker_group_state", "worker_group_status")
    asked = ("make_decision_for_non_running_worker_group(", "make_decision_for_running_worker_group(")
    calls(TrainController, *(f"scaling_policy.{name}" for name in asked))


@TRAIN.check("ControllerCallback.on_controller_start_worker_group")
def _callback() -> None:
    from ray.train.v2._internal.execution.callback import ControllerCallback

    hook = ControllerCallback.on_controller_start_worker_group
    takes(hook, "scaling_config", "num_workers")
    assert "Dict[str, str]" in str(hook.__annotations__["return"])


@TRAIN.check("DatasetsCallback, PlacementGroupCleanerCallback")
def _unused() -> None:
    from ray.train.torch import TorchTrainer

    calls(TorchTrainer._create_default_callbacks, "DatasetsCallback(", "PlacementGroupCleanerCallback(")


@TRAIN.check("ScalingConfig._resources_per_worker_not_none")
def _resources() -> None:
    from ray.train import ScalingConfig

    config = ScalingConfig(num_workers=2, resources_per_worker={"CPU": 3})
    assert ray_train_internals.worker_resources(config) == {"CPU": 3}


@TRAIN.check("TorchConfig.backend_cls; on_start(group, config) of what it returns; group.execute")
def _interfaces() -> None:
    from ray.train.torch import TorchConfig
    from ray.train.v2._internal.callbacks.backend_setup import BackendSetupCallback
    from ray.train.v2._internal.execution.worker_group.execution_group import ExecutionGroup

    takes(TorchConfig().backend_cls.on_start, "worker_group", "backend_config")
    calls(BackendSetupCallback, "backend_config.backend_cls()", "self._backend.on_start(")
    takes(ExecutionGroup.execute, "fn")
    calls(
        TorchConfig().backend_cls.on_start,
        "worker_group.execute(_set_torch_distributed_env_vars)",
        "_setup_torch_process_group",
    )


@TRAIN.check("WorkerGroupError.worker_failures; .cause, .health_check_failure, .preempted of what is in it")
def _errors() -> None:
    from ray.exceptions import ActorDiedError, RayTaskError
    from ray.train import WorkerGroupError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    inner = ValueError("x")
    assert WorkerGroupError("", {1: inner}).worker_failures == {1: inner}
    assert WorkerHealthCheckFailedError("", inner).health_check_failure is inner
    has_attributes(ActorDiedError, "preempted")
    takes(RayTaskError.__init__, "cause")


@pytest.mark.parametrize("name", TRAIN.entries)
def test_ray_train(name: str) -> None:
    TRAIN.verify(name)
