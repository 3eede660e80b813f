"""Start worker processes before there is work for them, so that a group of workers begins in a second, not in ten.

A Ray worker process spends its first seconds on imports. Ray's raylets can start processes ahead (it does so for the
backlog of a queue); this asks them to, with a hook that imports what the work will need. An actor or a task takes such
a process if its runtime environment is the same to the letter. Where none is found, Ray starts one as ever.

The request is Ray's own `NodeManagerService.PrestartWorkers`: internal, so whatever goes wrong with it costs the
seconds it would have saved and nothing else.
"""

import json
import logging
from collections.abc import Mapping

from cluster import ray_internals

logger = logging.getLogger(__name__)


def prestart(counts: Mapping[str, int], env_vars: Mapping[str, str], keep_s: int = 3600) -> None:
    """Have processes started, by node id, for tasks and actors of this job with `runtime_env={"env_vars": …}`.

    Args:
        counts: processes per node.
        env_vars: the same as those of the tasks or actors that are to find them, with the
            HOOK_VARIABLE of ray_process_internals → "module.function" for what they are to import.
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

    context = ray.get_runtime_context()
    environment = dict(context.runtime_env)
    text = merged(environment, env_vars)
    ray_internals.prestart_workers(address, context.get_job_id(), count, keep_s, environment, text)


def merged(job_environment: Mapping[str, object], env_vars: Mapping[str, str]) -> str:
    """Serialise a task's runtime environment as Ray's core worker does: the job's, the task's variables over its own.

    The letters matter: an idle process is found by their hash (`CoreWorker::OverrideTaskOrActorRuntimeEnvInfo`).
    """
    inherited = job_environment.get("env_vars") or {}
    assert isinstance(inherited, Mapping)
    whole = {name: value for name, value in job_environment.items() if name != "excludes"}
    return json.dumps({**whole, "env_vars": {**inherited, **env_vars}}, sort_keys=True, separators=(",", ":"))
