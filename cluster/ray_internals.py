"""What Tandem calls of Ray's insides (2.60): core and dashboard. Names and variables: cluster/ray_process_internals.py.

Ray Train's are in jobs/driver/ray_train_internals.py, Ray Serve's in serve/deploy/ray_serve_internals.py. Ray is
imported where it is used: command lines and forked workers read this file before Ray may be imported.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from cluster.internals import Internal

RPC_TIMEOUT_S = 5.0
NODE_SUMMARY = "/nodes?view=summary"
"""What the dashboard shows of each node."""
SETUP_TIMEOUT_S = 600
"""What a runtime environment may take to be set up; Ray's own default, which is part of the request."""
UPLOAD_LOGGERS = ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging")

ENTRIES = (
    Internal(
        "JobSubmissionClient._do_request",
        "GET requests to the dashboard with the client's own address, token and TLS settings",
        "`tandem cluster status` and `serve status` fail where RAY_ADDRESS is a dashboard's URL",
        "the Jobs SDK has a public request, or its state API tells what is in use",
    ),
    Internal(
        "ray._raylet.Config.initialize, AuthenticationTokenLoader",
        "Ray reads the token's mode once, when it is imported, and keeps the token; a process that finds its cluster "
        "later has it read both again, as ray.init on a local cluster does",
        "commands that import Ray before they know the cluster are refused by it (a wrong or missing token)",
        "a client can be given its token",
    ),
    Internal(
        "ray.dashboard.modules.dashboard_sdk, ray._private.runtime_env.packaging (loggers)",
        "they report every package that is uploaded, or was before; their level is raised meanwhile",
        "`tandem jobs submit` prints Ray's remarks beside the job's id",
        "an upload can be asked to be silent",
    ),
    Internal(
        "ray._private.state.state.get_draining_nodes",
        "which nodes are announced to be taken away, and when: a run saves before",
        "no checkpoint is written when a node is announced to go; the run falls back to its last one",
        "ray.nodes() or the state API tells of draining nodes with their deadlines",
    ),
    Internal(
        "ray._raylet.GcsClient.get_all_node_info, drain_node",
        "a pod that is to end announces its node, as `ray drain-node` (hidden) does: jobs save, replicas move away",
        "work on a pod that Kubernetes takes away is cut off: jobs go back to their last checkpoint, streams go on at "
        "other replicas as after a crash",
        "Ray documents `ray drain-node`, or KubeRay announces pods that end",
    ),
    Internal(
        "NodeManagerService.PrestartWorkers (ray.core.generated, ray._private.grpc_utils)",
        "to have worker processes started and imported before there is work for them",
        "each group of workers starts in ten seconds instead of one; nothing else",
        "Ray can be asked for warm workers of a runtime environment",
    ),
    Internal(
        "CoreWorker::OverrideTaskOrActorRuntimeEnvInfo (serialised runtime environments)",
        "idle processes are found by the letters of their runtime environment, so these are written as Ray does",
        "processes that were started ahead are not found, so each group starts in ten seconds instead of one",
        "as for PrestartWorkers",
    ),
    Internal(
        "ray.autoscaler.v2.sdk.get_cluster_status",
        "what is in use on each node, from the GCS; the public state API knows totals only",
        "`tandem cluster status` and the check that a job fits fail",
        "the state API tells what is in use",
    ),
    Internal(
        "GET /api/cluster_status",
        "the same where only the dashboard can be reached",
        "every node looks free to clients whose RAY_ADDRESS is a dashboard's URL",
        "as for get_cluster_status",
    ),
    Internal(
        "GET /nodes?view=summary (now, disk, raylet.nodeId)",
        "the time and the free disk that each node's agent reports",
        "`tandem cluster status` does not tell of full disks and wrong clocks",
        "the state API tells them",
    ),
)


def get(client: Any, path: str) -> Any:
    """Return the response of a GET of the dashboard that a Jobs API client talks to, with its token."""
    return client._do_request("GET", path)


def read_token_again() -> None:
    """Have Ray, if it is imported, read the token's mode and the token from the environment once more."""
    if "ray._raylet" in sys.modules:
        from ray._raylet import AuthenticationTokenLoader, Config

        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()


def draining_nodes() -> Mapping[str, int]:
    """Return the nodes that are announced to be taken away: id → deadline in ms since the epoch; 0: none is known."""
    from ray._private.state import state

    draining: Mapping[str, int] = state.get_draining_nodes()
    return draining


def alive_nodes(address: str) -> dict[str, str]:
    """Return the living nodes of the cluster whose GCS is at `address`: id (hexadecimal) → IP address."""
    from ray.core.generated import gcs_pb2

    found = _gcs_client(address).get_all_node_info(timeout=RPC_TIMEOUT_S)
    alive = gcs_pb2.GcsNodeInfo.ALIVE
    return {node_id.hex(): info.node_manager_address for node_id, info in found.items() if info.state == alive}


def drain(address: str, node_id: str, why: str, deadline_ms: int) -> str | None:
    """Announce that a node will be taken away at `deadline_ms` (since the epoch); return why that was refused."""
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    preemption = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, refusal = _gcs_client(address).drain_node(node_id, preemption, why, deadline_ms)
    return None if accepted else str(refusal)


def _gcs_client(address: str) -> Any:
    from ray._raylet import GcsClient

    return GcsClient(address=address)


def prestart_workers(
    address: str, job_id: str, count: int, keep_s: int, job_environment: Mapping[str, Any], text: str
) -> None:
    """Ask the raylet at `address` (host:port) to start `count` processes.

    Args:
        job_id: hexadecimal.
        keep_s: how long an unused one is kept.
        job_environment: the job's runtime environment, as Ray resolved it.
        text: that of the tasks and actors that are to find the processes, serialised.
    """
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import common_pb2, node_manager_pb2, node_manager_pb2_grpc

    request = node_manager_pb2.PrestartWorkersRequest(
        language=common_pb2.PYTHON,
        job_id=bytes.fromhex(job_id),
        num_workers=count,
        keep_alive_duration_secs=keep_s,
    )
    info = request.runtime_env_info
    info.serialized_runtime_env = text
    info.uris.working_dir_uri = job_environment.get("working_dir", "")
    info.uris.py_modules_uris.extend(job_environment.get("py_modules", []))
    info.runtime_env_config.setup_timeout_seconds = SETUP_TIMEOUT_S
    info.runtime_env_config.eager_install = True
    with init_grpc_channel(address) as channel:
        node_manager_pb2_grpc.NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=RPC_TIMEOUT_S)


def used_by_gcs(address: str) -> dict[str, dict[str, float]]:
    """Return what is in use, by node id and resource, from the GCS at `address`."""
    from ray.autoscaler.v2.sdk import get_cluster_status

    status = get_cluster_status(address)
    return {
        node.node_id: {usage.resource_name: usage.used for usage in node.resource_usage.usage}
        for node in (*status.active_nodes, *status.idle_nodes)
        if node.resource_usage is not None
    }


def summaries(answer: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Read what agents report, by node id, from the dashboard's answer to NODE_SUMMARY."""
    return {
        told["raylet"]["nodeId"]: told for told in answer["data"]["summary"] if told.get("raylet", {}).get("nodeId")
    }


def used_by_dashboard(answer: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Read the same from the dashboard's answer to /api/cluster_status."""
    reported = answer["data"]["clusterStatus"] or {}
    by_node = (reported.get("loadMetricsReport") or {}).get("usageByNode") or {}
    return {node: {name: used for name, (used, _) in usage.items()} for node, usage in by_node.items()}
