"""What Tandem uses of Ray Serve's insides (ray 2.60). Ray is imported where it is used."""

from __future__ import annotations

import asyncio
from typing import Any

from cluster.internals import Internal

ENTRIES = (
    Internal(
        "ray.serve.context._get_global_client",
        "to find a running Serve without starting one",
        "`serve up` and `serve down` fail",
        "Serve tells whether it runs, inside the cluster too",
    ),
    Internal(
        "Deployment.options(_internal=True)",
        "to give a deployment its version: otherwise every deploy restarts every replica",
        "`serve up` on a running endpoint restarts every model, also those that have not changed",
        "`version` is a public option again",
    ),
    Internal(
        "ray.serve.delete(_blocking=False)",
        "to take models away that the spec names no more while the others answer, without waiting for their requests",
        "`serve up` fails where the new spec has fewer models",
        "`delete` has a public option not to wait",
    ),
    Internal(
        "async __del__ of a deployment is awaited",
        "a replica that is to end finishes its streams, gives the rest back, and stops its engine",
        "a replica that was scaled away or replaced cuts its streams, which go on at others as after a crash",
        "Serve has a public hook for a replica's end",
    ),
    Internal(
        "ray.dashboard.modules.serve.sdk.ServeSubmissionClient._do_request(timeout=…)",
        "Serve's REST API with the cluster's token and a bound: `serve status`, from outside the cluster",
        "`tandem serve status`, `chat` and `down` fail",
        "Serve documents a client of its REST API",
    ),
    Internal(
        "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS",
        "a replica that no longer answers is ended at once: asked to leave, it would hold its CPUs all `drain_s`",
        "a replica that hangs is replaced minutes late where the cluster has no room for another",
        "Serve ends a replica that does not answer its request to leave",
    ),
    Internal(
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD",
        "a gateway runs in the replica's own loop, which is uvloop's: two loops in two threads share one interpreter",
        "a gateway's server shares its interpreter with one loop more; no difference in its rate has been measured",
        "Serve documents it",
    ),
    Internal(
        "ray.serve._private.logging_utils.get_serve_logs_dir",
        "a gateway's access log lies beside the other logs of its node's replicas",
        "a gateway does not start",
        "a replica is told where its logs are",
    ),
    Internal(
        "SERVE_CONTROLLER_ACTOR in the namespace serve, check_alive",
        "a controller that hangs is found and ended; Ray starts it again",
        "`serve up` and `serve down` hang with a controller that hangs",
        "Serve's calls have a timeout, or Ray ends a controller that does not answer",
    ),
    Internal(
        "ServeController.update_deployment_replicas, get_serve_instance_details, DeploymentID",
        "Tandem's own policy sets numbers of replicas, also while the dashboard with the REST API for it is gone",
        "models keep the number of replicas they have, and `serve status` says why",
        "Serve has a public call for external scaling inside the cluster",
    ),
)

CONTROLLER_ENV = {"RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1"}
"""What Serve's controller reads when it starts; it has the environment of the job that starts it."""
ONE_LOOP = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}
"""What a gateway's replica reads when it starts."""


CONTROLLER, CONTROLLER_NAMESPACE = "SERVE_CONTROLLER_ACTOR", "serve"


def running_client() -> Any | None:
    """Return Serve's client if Serve runs in this cluster; never start it."""
    from ray.serve.context import _get_global_client

    return _get_global_client(raise_if_no_controller_running=False)


def pinned(version: str) -> dict[str, Any]:
    """Return the options of a deployment that is replaced only when its version changes; scaling changes in place."""
    return {"version": version, "_internal": True}


def delete_soon(application: str) -> None:
    """Have an application removed; its requests may end, and nobody waits for them."""
    from ray import serve

    serve.delete(application, _blocking=False)


def logs_directory() -> str:
    """Return the directory of this node where Serve's replicas keep their logs."""
    from ray.serve._private.logging_utils import get_serve_logs_dir

    return str(get_serve_logs_dir())


def serve_details(address: str, timeout_s: float = 10.0) -> dict[str, Any]:
    """Return what Serve's REST API at the dashboard's `address` tells of applications and replicas.

    Raises:
        TimeoutError: Serve's controller does not answer the dashboard.
        ConnectionError: the dashboard does not answer.
        OSError: it answers that it cannot tell.
    """
    import requests
    from ray.dashboard.modules.serve.sdk import STATUS_PATH, ServeSubmissionClient

    client = ServeSubmissionClient(address)
    try:
        response = client._do_request("GET", STATUS_PATH, timeout=timeout_s)
    except requests.Timeout as error:
        raise TimeoutError(f"no answer from {address}{STATUS_PATH} in {timeout_s:g} s") from error
    except requests.ConnectionError as error:
        raise ConnectionError(str(error)) from error
    response.raise_for_status()
    details: dict[str, Any] = response.json()
    return details


def controller_answers(timeout_s: float) -> bool:
    """Tell whether Serve's controller answers in time; True where there is none, or it has just died."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError

    try:
        controller = ray.get_actor(CONTROLLER, namespace=CONTROLLER_NAMESPACE)
        ray.get(controller.check_alive.remote(), timeout=timeout_s)
    except GetTimeoutError:
        return False
    except (ValueError, RayError):
        return True
    return True


def end_controller() -> None:
    """End Serve's controller; Ray starts it again, and it reads what it had deployed."""
    import ray

    ray.kill(ray.get_actor(CONTROLLER, namespace=CONTROLLER_NAMESPACE), no_restart=False)


def running_applications(timeout_s: float = 30.0) -> dict[str, Any]:
    """Return what Serve's REST API tells of applications, from inside the cluster.

    Raises:
        GetTimeoutError: the controller does not answer.
    """
    import ray

    told = ray.get(_controller().get_serve_instance_details.remote(), timeout=timeout_s)
    return dict(told["applications"])


class ControllerHandle:
    """Serve's controller, asked without waiting in the event loop."""

    async def details(self) -> dict[str, Any]:
        """Return what Serve's REST API tells."""
        told: dict[str, Any] = await (await self._found()).get_serve_instance_details.remote()
        return told

    async def set_replicas(self, application: str, deployment: str, count: int) -> None:
        """Have a deployment aim at so many replicas; its application takes that from outside alone."""
        from ray.serve._private.common import DeploymentID

        place = DeploymentID(name=deployment, app_name=application)
        await (await self._found()).update_deployment_replicas.remote(place, count)

    async def _found(self) -> Any:
        return await asyncio.to_thread(_controller)


def _controller() -> Any:
    """Return the controller's handle; what its answers are made of is imported here, which takes seconds once."""
    import ray
    import ray.serve._private.common

    return ray.get_actor(CONTROLLER, namespace=CONTROLLER_NAMESPACE)


def gateway_config(application: dict[str, Any]) -> dict[str, Any]:
    """Return the `user_config` of an application's deployment, from Serve's details; empty where it tells none."""
    for deployment in (application.get("deployments") or {}).values():
        if found := (deployment.get("deployment_config") or {}).get("user_config"):
            return dict(found)
    return {}
