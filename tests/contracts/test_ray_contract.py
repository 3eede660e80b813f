"""Ray's core and dashboard still have what cluster/ray_internals.py and cluster/ray_process_internals.py rely on."""

import inspect
import json

import pytest
from ray._private.runtime_env.context import RuntimeEnvContext

from cluster import daemons, prestart, ray_internals, ray_process_internals, setup_worker
from tests.support.contracts import (
    Contract,
    binary_holds,
    calls,
    file_of,
    has_attributes,
    source_mentions,
    takes,
)

CALLS = Contract("cluster/ray_internals.py", ray_internals.ENTRIES)
PROCESSES = Contract("cluster/ray_process_internals.py", ray_process_internals.ENTRIES)


@PROCESSES.check("ray::… (the titles of workers)")
def _titles() -> None:
    source_mentions(
        "ray._private.ray_constants", f'WORKER_PROCESS_TYPE_IDLE_WORKER = "{ray_process_internals.WORKER_TITLE}'
    )


@CALLS.check("JobSubmissionClient._do_request")
def _request() -> None:
    from ray.job_submission import JobSubmissionClient

    takes(JobSubmissionClient._do_request, "method", "endpoint")


@CALLS.check("ray._raylet.Config.initialize, AuthenticationTokenLoader")
def _token() -> None:
    from ray._raylet import AuthenticationTokenLoader, Config

    has_attributes(Config, "initialize")
    has_attributes(AuthenticationTokenLoader.instance(), "reset_cache")


@CALLS.check("ray.dashboard.modules.dashboard_sdk, ray._private.runtime_env.packaging (loggers)")
def _loggers() -> None:
    for name in ray_internals.UPLOAD_LOGGERS:
        source_mentions(name, "logging.getLogger(__name__)", "logger.info")


@CALLS.check("ray._private.state.state.get_draining_nodes")
def _draining() -> None:
    from ray._private.state import state

    assert "Dict[str, int]" in str(type(state).get_draining_nodes.__annotations__["return"])


@CALLS.check("ray._raylet.GcsClient.get_all_node_info, drain_node")
def _drain() -> None:
    from ray._raylet import InnerGcsClient
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason
    from ray.core.generated.gcs_pb2 import GcsNodeInfo

    has_attributes(InnerGcsClient, "get_all_node_info", "drain_node")  # what GcsClient hands on to
    assert "DRAIN_NODE_REASON_PREEMPTION" in set(DrainNodeReason.keys())
    assert GcsNodeInfo.ALIVE == 0


@CALLS.check("NodeManagerService.PrestartWorkers (ray.core.generated, ray._private.grpc_utils)")
def _prestart() -> None:
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import common_pb2, node_manager_pb2, node_manager_pb2_grpc

    takes(init_grpc_channel, "address")
    assert common_pb2.Language.Value("PYTHON") == common_pb2.PYTHON
    request = node_manager_pb2.PrestartWorkersRequest(job_id=b"1", num_workers=1, keep_alive_duration_secs=1)
    request.runtime_env_info.uris.py_modules_uris.extend(["a"])
    request.runtime_env_info.uris.working_dir_uri = "b"
    request.runtime_env_info.runtime_env_config.eager_install = True
    request.runtime_env_info.runtime_env_config.setup_timeout_seconds = 600
    source_mentions(node_manager_pb2_grpc.__name__, "/ray.rpc.NodeManagerService/PrestartWorkers")


@CALLS.check("CoreWorker::OverrideTaskOrActorRuntimeEnvInfo (serialised runtime environments)")
def _serialised() -> None:
    from ray.runtime_env import RuntimeEnv

    job = {"py_modules": ["gcs://a.zip"], "working_dir": "gcs://b.zip", "env_vars": {"B": "1", "A": "2"}}
    ours = prestart.merged(job, {"C": "3"})
    theirs = RuntimeEnv(**{**job, "env_vars": {"A": "2", "B": "1", "C": "3"}}).serialize()
    assert json.loads(ours) == json.loads(theirs)


@CALLS.check("ray.autoscaler.v2.sdk.get_cluster_status")
def _used() -> None:
    from ray.autoscaler.v2 import schema, sdk

    takes(sdk.get_cluster_status, "gcs_address")
    fields = {
        schema.ClusterStatus: ("active_nodes", "idle_nodes"),
        schema.NodeInfo: ("node_id", "resource_usage"),
        schema.NodeUsage: ("usage",),
        schema.ResourceUsage: ("resource_name", "used"),
    }
    for owner, names in fields.items():
        assert set(names) <= owner.__dataclass_fields__.keys(), owner


@CALLS.check("GET /nodes?view=summary (now, disk, raylet.nodeId)")
def _summaries() -> None:
    from ray.dashboard.utils import to_google_style

    source_mentions("ray.dashboard.modules.node.node_head", '"summary"', "summary=all_node_summary")
    source_mentions("ray.dashboard.modules.node.datacenter", 'node_info["raylet"].update(node)')
    source_mentions("ray.dashboard.modules.reporter.reporter_agent", '"now": now', '"disk": self._get_disk_usage')
    told = {"now": 1.0, "disk": {"/": {"free": 1, "total": 2}}, "raylet": {"nodeId": "n1"}}
    sent = {"data": to_google_style({"summary": [told, {"raylet": {}}]})}
    assert ray_internals.summaries(sent) == {"n1": told}


@CALLS.check("GET /api/cluster_status")
def _dashboard() -> None:
    from ray.dashboard.utils import to_google_style

    source_mentions("ray.dashboard.modules.reporter.reporter_head", '"/api/cluster_status"', "cluster_status=formatted")
    source_mentions("ray.autoscaler._private.monitor", '"load_metrics_report"')
    source_mentions("ray.autoscaler._private.util", "usage_by_node: ")
    report = {"load_metrics_report": {"usage_by_node": {"n1": {"CPU": (1.0, 4.0)}}}}
    sent = {"data": to_google_style({"cluster_status": report})}
    assert ray_internals.used_by_dashboard(sent) == {"n1": {"CPU": 1.0}}


def _core(*names: str) -> None:
    for program in ("raylet/raylet", "gcs/gcs_server"):
        binary_holds(file_of("ray", f"core/src/ray/{program}"), *(name.removeprefix("RAY_") for name in names))


@PROCESSES.check("RAY_health_check_* (four settings of Ray's core)")
def _health() -> None:
    names = [name for name in ray_process_internals.HEAD_SETTINGS if name.startswith("RAY_health_check_")]
    assert len(names) == 4
    _core(*names)


@PROCESSES.check("RAY_prestart_worker_first_driver, RAY_enable_worker_prestart, RAY_num_workers_soft_limit")
def _prestart_settings() -> None:
    names = ("RAY_prestart_worker_first_driver", "RAY_enable_worker_prestart", "RAY_num_workers_soft_limit")
    assert set(names) <= ray_process_internals.HEAD_SETTINGS.keys()
    _core(*names)


@PROCESSES.check("RAY_gcs_storage, RAY_gcs_storage_path")
def _storage() -> None:
    path = file_of("ray", "core/src/ray/gcs/gcs_server")
    names = (ray_process_internals.GCS_STORAGE, ray_process_internals.GCS_STORAGE_PATH)
    binary_holds(path, "rocksdb", *(name.removeprefix("RAY_") for name in names))


@PROCESSES.check("RAY_JOB_STOP_WAIT_TIME_S")
def _stop() -> None:
    assert "RAY_JOB_STOP_WAIT_TIME_S" in ray_process_internals.HEAD_SETTINGS
    source_mentions("ray.dashboard.modules.job.job_supervisor", "RAY_JOB_STOP_WAIT_TIME_S")
    source_mentions("ray._common.usage.usage_constants", "RAY_USAGE_STATS_ENABLED")


@PROCESSES.check("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S, RAY_TRAIN_ENABLE_PREEMPTION_WATCHER")
def _train_settings() -> None:
    defines_constants = ("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER")
    assert set(defines_constants) <= ray_process_internals.CONTROLLER_SETTINGS.keys()
    text = file_of("ray", "train/v2/_internal/constants.py").read_text()
    assert all(f'"{name}"' in text for name in defines_constants), "ray/train/v2/_internal/constants.py names them not"


@PROCESSES.check("RAY_WARN_BLOCKING_GET_INSIDE_ASYNC")
def _blocking() -> None:
    text = file_of("ray", "train/v2/_internal/constants.py").read_text()
    value = ray_process_internals.CONTROLLER_SETTINGS["RAY_WARN_BLOCKING_GET_INSIDE_ASYNC"]
    assert f'DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE = "{value}"' in text


@PROCESSES.check("__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR")
def _hook() -> None:
    from ray._private import ray_constants
    from ray._private.runtime_env import setup_hook

    assert ray_constants.WORKER_PROCESS_SETUP_HOOK_ENV_VAR == ray_process_internals.HOOK_VARIABLE
    calls(setup_hook.load_and_execute_setup_hook, "load_and_execute_setup_hook_module")


@PROCESSES.check("RAY_JOB_CONFIG_JSON_ENV_VAR")
def _driver() -> None:
    from ray._private.runtime_env import constants

    assert constants.RAY_JOB_CONFIG_JSON_ENV_VAR == ray_process_internals.JOB_MARKER
    source_mentions("ray.dashboard.modules.job.job_supervisor", "RAY_JOB_CONFIG_JSON_ENV_VAR: json.dumps(")
    from ray.dashboard.modules.job import common

    assert common.JOB_ID_METADATA_KEY == ray_process_internals.SUBMISSION_ID


@PROCESSES.check("RAY_RAYLET_PID")
def _raylet_pid() -> None:
    binary_holds(file_of("ray", "core/src/ray/raylet/raylet"), ray_process_internals.RAYLET_PID)


@PROCESSES.check("--raylet-name=SESSION/sockets/… (an argument of workers, behind default_worker.py)")
def _raylet_argument() -> None:
    source_mentions("ray._private.services", f'f"{ray_process_internals.RAYLET_ARGUMENT}{{raylet_name}}"')
    source_mentions("ray._private.node", '"sockets"', "raylet_socket_name")
    file_of("ray", "_private/workers/default_worker.py")
    source_mentions("ray._private.runtime_env.context", "py_executable", "passthrough_args")


@PROCESSES.check("--raylet_socket_name=SESSION/sockets/raylet (an argument of raylets)")
def _raylet_socket() -> None:
    source_mentions("ray._private.services", f'f"{ray_process_internals.RAYLET_SOCKET}{{raylet_name}}"')
    source_mentions("ray._private.node", '"sockets"', "raylet_socket_name")


@PROCESSES.check("py_modules_files (a folder of Ray's session)")
def _shipped() -> None:
    source_mentions("ray._private.runtime_env.py_modules", f'"{ray_process_internals.SHIPPED_FOLDER}"')
    source_mentions("ray._private.runtime_env.working_dir", "PYTHONPATH")


@PROCESSES.check("ray_current_cluster (a file in Ray's folder)")
def _current() -> None:
    source_mentions("ray._common.utils", f'"{ray_process_internals.CURRENT_CLUSTER}"')


@PROCESSES.check("ray_constants.SETUP_WORKER_FILENAME, setup_worker.py, RuntimeEnvContext")
def _setup() -> None:
    source_mentions("ray._private.node", "ray_constants.SETUP_WORKER_FILENAME")
    source_mentions("ray._private.workers.setup_worker", '"--serialized-runtime-env-context"', '"--language"')
    binary_holds(file_of("ray", "core/src/ray/raylet/raylet"), daemons.SETUP_WORKER.name)
    fields = set(inspect.signature(RuntimeEnvContext).parameters)
    assert fields == setup_worker.KNOWN


@PROCESSES.check("python -m ray.scripts.scripts; the programs gcs_server, raylet and dashboard.py")
def _programs() -> None:
    source_mentions(ray_process_internals.START_MODULE, 'if __name__ == "__main__":', "--dashboard-agent-listen-port")
    for name in ("core/src/ray/gcs/gcs_server", "core/src/ray/raylet/raylet", "dashboard/dashboard.py"):
        assert file_of("ray", name).name in ray_process_internals.HEAD_PROGRAMS


@pytest.mark.parametrize("name", CALLS.entries)
def test_ray_calls(name: str) -> None:
    CALLS.verify(name)


@pytest.mark.parametrize("name", PROCESSES.entries)
def test_ray_processes(name: str) -> None:
    PROCESSES.verify(name)
