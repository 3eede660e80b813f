"""Ray Serve still has what serve/deploy/ray_serve_internals.py relies on."""

import pytest

from serve.deploy import ray_serve_internals
from tests.support.contracts import Contract, calls, source_mentions, takes

SERVE = Contract("serve/deploy/ray_serve_internals.py", ray_serve_internals.ENTRIES)


@SERVE.check("ray.serve.context._get_global_client")
def _client() -> None:
    from ray.serve.context import _get_global_client

    takes(_get_global_client, "raise_if_no_controller_running")


@SERVE.check("Deployment.options(_internal=True)")
def _version() -> None:
    from ray import serve

    class Something:
        pass

    deployment = serve.deployment(Something).options(name="x", **ray_serve_internals.pinned("3"))
    assert deployment.version == "3"


@SERVE.check("ray.serve.delete(_blocking=False)")
def _delete() -> None:
    from ray import serve

    takes(serve.delete, "name", "_blocking")


@SERVE.check("async __del__ of a deployment is awaited")
def _end() -> None:
    source_mentions("ray.serve._private.replica", 'if hasattr(self._callable, "__del__"):', "self._callable.__del__,")


@SERVE.check("RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS")
def _force_stop() -> None:
    source_mentions("ray.serve._private.deployment_state", "graceful = not self.FORCE_STOP_UNHEALTHY_REPLICAS")
    for name in ray_serve_internals.CONTROLLER_ENV:
        source_mentions("ray.serve._private.constants", f'"{name}"')


@SERVE.check("RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD")
def _one_loop() -> None:
    (name,) = ray_serve_internals.ONE_LOOP
    source_mentions("ray.serve._private.constants", f'"{name}"')
    source_mentions("ray.serve._private.replica", "self._user_code_event_loop = asyncio.get_running_loop()")


@SERVE.check("ray.serve._private.logging_utils.get_serve_logs_dir")
def _logs() -> None:
    from pathlib import Path

    assert Path(ray_serve_internals.logs_directory()).name == "serve"


@SERVE.check("SERVE_CONTROLLER_ACTOR in the namespace serve, check_alive")
def _controller() -> None:
    from ray.serve._private import constants

    assert constants.SERVE_CONTROLLER_NAME == ray_serve_internals.CONTROLLER
    assert constants.SERVE_NAMESPACE == ray_serve_internals.CONTROLLER_NAMESPACE
    source_mentions("ray.serve._private.controller", "def check_alive(self)")


@SERVE.check("ray.dashboard.modules.serve.sdk.ServeSubmissionClient._do_request(timeout=…)")
def _details() -> None:
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
    from ray.serve import schema

    calls(ServeSubmissionClient.get_serve_details, "_do_request", "STATUS_PATH", "json()")
    calls(ServeSubmissionClient._do_request, "**kwargs")
    fields = {
        schema.ServeInstanceDetails: {"controller_info", "applications"},
        schema.ApplicationDetails: {"status", "message", "route_prefix", "deployments"},
        schema.DeploymentDetails: {"message", "replicas", "target_num_replicas", "status", "deployment_config"},
        schema.ReplicaDetails: {"state", "node_ip", "replica_id"},
    }
    for owner, names in fields.items():
        assert names <= owner.model_fields.keys(), owner


@SERVE.check("ServeController.update_deployment_replicas, get_serve_instance_details, DeploymentID")
def _scaling() -> None:
    from ray import serve
    from ray.serve import schema
    from ray.serve._private import controller, deployment_state
    from ray.serve._private.common import DeploymentID

    actor = controller.ServeController
    takes(actor.update_deployment_replicas, "deployment_id", "target_num_replicas")
    calls(actor.update_deployment_replicas, "get_external_scaler_enabled", "set_target_num_replicas")
    calls(actor.get_serve_instance_details, "_get_user_facing_json_serializable_dict")
    takes(DeploymentID, "name", "app_name")
    takes(serve.RunTarget, "external_scaler_enabled")
    assert "UPDATING" in schema.DeploymentStatus.__members__
    calls(deployment_state.DeploymentStateManager.set_target_num_replicas, "set_target_num_replicas", "save_checkpoint")


@pytest.mark.parametrize("name", SERVE.entries)
def test_ray_serve(name: str) -> None:
    SERVE.verify(name)
