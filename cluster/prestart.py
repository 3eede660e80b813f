"""Start worker processes before there is work for them, so that a group of workers begins in a second, not in ten.

A Ray worker process spends its first seconds on imports. Ray's raylets can start processes ahead (it does so for the
backlog of a queue); this asks them to, with a hook that imports what the work will need. An actor or a task takes such
a process if its runtime environment is the same to the letter. Where none is found, Ray starts one as ever.

The request is Ray's own `NodeManagerService.PrestartWorkers` (ray 2.60, protobuf/node_manager.proto): internal, so
whatever goes wrong with it costs the seconds it would have saved and nothing else.
"""

import json
import logging
from collections.abc import Mapping

HOOK_VARIABLE = "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR"
"""What `worker_process_setup_hook` in a job's runtime environment becomes; per task or actor only this way works."""
RPC_TIMEOUT_S = 5.0

logger = logging.getLogger(__name__)


def prestart(counts: Mapping[str, int], env_vars: Mapping[str, str], keep_s: int = 3600) -> None:
    """Have processes started, by node id, for tasks and actors of this job with `runtime_env={"env_vars": …}`.

    Args:
        counts: processes per node.
        env_vars: the same as those of the tasks or actors that are to find them, with HOOK_VARIABLE → "module.function"
            for what they are to import.
        keep_s: how long an unused one is kept.
    """
    import ray

    addresses = {
        node["NodeID"]: f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"
        for node in ray.nodes()
        if node["Alive"]
    }
    for node_id, count in counts.items():
        if count > 0 and node_id in addresses:
            try:
                _request(addresses[node_id], count, env_vars, keep_s)
            except Exception as error:
                logger.info("no processes started ahead on node %s: %s", node_id, error)


def _request(address: str, count: int, env_vars: Mapping[str, str], keep_s: int) -> None:
    import ray
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import common_pb2, node_manager_pb2, node_manager_pb2_grpc

    context = ray.get_runtime_context()
    request = node_manager_pb2.PrestartWorkersRequest(
        language=common_pb2.PYTHON,
        job_id=bytes.fromhex(context.get_job_id()),
        num_workers=count,
        keep_alive_duration_secs=keep_s,
    )
    environment = dict(context.runtime_env)
    info = request.runtime_env_info
    info.serialized_runtime_env = merged(environment, env_vars)
    info.uris.working_dir_uri = environment.get("working_dir", "")
    info.uris.py_modules_uris.extend(environment.get("py_modules", []))
    info.runtime_env_config.setup_timeout_seconds = 600
    info.runtime_env_config.eager_install = True
    with init_grpc_channel(address) as channel:
        node_manager_pb2_grpc.NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=RPC_TIMEOUT_S)


def merged(job_environment: Mapping[str, object], env_vars: Mapping[str, str]) -> str:
    """Serialise a task's runtime environment as Ray's core worker does: the job's, the task's variables over its own.

    The letters matter: an idle process is found by their hash (`CoreWorker::OverrideTaskOrActorRuntimeEnvInfo`).
    """
    inherited = job_environment.get("env_vars") or {}
    assert isinstance(inherited, Mapping)
    whole = {name: value for name, value in job_environment.items() if name != "excludes"}
    return json.dumps({**whole, "env_vars": {**inherited, **env_vars}}, sort_keys=True, separators=(",", ":"))
