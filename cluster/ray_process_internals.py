"""What Tandem takes for granted of Ray's processes (2.60): variables, programs, arguments and folders.

Only the standard library's lightest modules are imported: a worker that is about to be forked reads this file.
"""

from __future__ import annotations

from cluster.internals import Internal

HOOK_VARIABLE = "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR"
"""What `worker_process_setup_hook` in a job's runtime environment becomes; per task or actor only this way works."""
JOB_MARKER = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets it for the driver of a submitted job, and for no daemon or worker: JSON, with the job's `metadata`."""
SUBMISSION_ID = "job_submission_id"
"""What the job's id is called in that metadata."""
RAYLET_PID = "RAY_RAYLET_PID"
"""Ray sets it for workers."""
RAYLET_ARGUMENT = "--raylet-name="
"""The argument of a worker by which its session is found: SESSION/sockets/raylet."""
RAYLET_SOCKET = "--raylet_socket_name="
"""The argument of a raylet by which it and its session are found above a driver: SESSION/sockets/raylet."""
SHIPPED_FOLDER = "py_modules_files"
"""Ray unpacks shipped packages below a folder of this name."""
CURRENT_CLUSTER = "ray_current_cluster"
"""A file in Ray's folder that holds the head's address."""
START_MODULE = "ray.scripts.scripts"
"""What the `ray` command runs."""
START = f"""
import sys
from ray._private import ray_constants
ray_constants.SETUP_WORKER_FILENAME = sys.argv.pop(1)
from {START_MODULE} import main
main()
"""
"""The same with a first argument: what raylets run before each worker, an absolute path (cluster/setup_worker.py)."""
GCS_PROGRAM = "gcs_server"
WORKER_TITLE = "ray::"
"""How the command lines of Ray's workers begin."""
HEAD_PROGRAMS = (GCS_PROGRAM, "raylet", "dashboard.py")
"""What a head cannot be without."""
NODE_PROGRAMS = ("raylet",)

HEALTH_CHECK = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2500",
    "RAY_health_check_failure_threshold": "3",
}
"""How Ray's head asks nodes whether they live: with these a killed one is noticed after 3 s, a silent one after 10 s.

Ray's own values take 14 s and 64 s. A cut of 5 s must pass, and so it takes 7 s at least: TCP sends again what was lost
after 0.2, 0.4, 0.8, 1.6 and 3.2 s, so that a link mended in the sixth second is silent until the seventh.
`ray-cluster.yaml` and the Kubernetes manifests have the same values; their tests compare.
"""

STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
"""How long Ray waits for a job that it has asked to stop, in seconds."""

HEAD_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # `jobs stop` must leave time to write a checkpoint; Ray's default is 3 s.
    STOP_WAIT: "60",
    **HEALTH_CHECK,
    # Jobs start their own processes ahead (prestart.py); those that Ray starts by itself nobody would use.
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_worker_prestart": "0",
    # Beyond this number Ray ends idle processes, spare ones too; its default is the number of CPUs.
    "RAY_num_workers_soft_limit": "64",
}

CONTROLLER_SETTINGS = {
    # How fast Ray Train's controller sees an end or a death.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # jobs/driver/preemption.py watches
    # Ray Train adds this one by itself; were it missing here, its actors would not find the processes.
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",
}
GCS_STORAGE, GCS_STORAGE_PATH = "RAY_gcs_storage", "RAY_gcs_storage_path"

ENTRIES = (
    Internal(
        "RAY_health_check_* (four settings of Ray's core)",
        "a dead node is noticed after 3 s, one behind a cut link after 10 s",
        "a job goes on after 14 s or more instead of 3 s when a node is killed, and after 64 s when its link is cut",
        "Ray documents them",
    ),
    Internal(
        "RAY_prestart_worker_first_driver, RAY_enable_worker_prestart, RAY_num_workers_soft_limit",
        "Ray starts no processes of its own accord and keeps those that a job has had started ahead",
        "processes that nobody uses take memory, and those started ahead may be ended before they are used",
        "as for PrestartWorkers (cluster/ray_internals.py)",
    ),
    Internal(
        "RAY_gcs_storage, RAY_gcs_storage_path",
        "the head's metadata on disk, so that a GCS which died goes on where it was",
        "when the GCS dies, the jobs of the local cluster die with it",
        "the setting leaves its alpha state and is documented",
    ),
    Internal(
        "RAY_JOB_STOP_WAIT_TIME_S",
        "time for a stopped job to write its checkpoint",
        "a job that is stopped is killed after 3 s, before it has saved",
        "Ray documents it, or `stop_job` takes a time",
    ),
    Internal(
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S, RAY_TRAIN_ENABLE_PREEMPTION_WATCHER",
        "Ray Train's controller sees an end or a death within 0.25 s, and starts no watcher beside ours",
        "each end and each failure is seen up to 2 s later; each job starts one more process",
        "Ray Train documents them",
    ),
    Internal(
        "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC",
        "Ray Train adds it to its actors' environment; it is in the job's from the start",
        "Ray Train's actors do not find the processes that were started ahead for them",
        "as for PrestartWorkers (cluster/ray_internals.py)",
    ),
    Internal(
        "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR",
        "what a process imports ahead, by task or actor: the public hook is for whole jobs",
        "processes that were started ahead have imported nothing: a group starts in ten seconds instead of one",
        "`worker_process_setup_hook` is allowed in a task's or actor's runtime environment",
    ),
    Internal(
        "RAY_JOB_CONFIG_JSON_ENV_VAR",
        "to tell a job's driver among the cluster's processes: `cluster down` waits for drivers to save; and "
        "the driver's submission id, which a second submission of the same spec is told",
        "`tandem cluster down` ends jobs before they have saved",
        "the Jobs API tells the driver's process id",
    ),
    Internal(
        "RAY_RAYLET_PID",
        "the fork server ends with its raylet",
        "fork servers end at once, so that every worker imports by itself; or they stay behind",
        "Ray forks its workers itself",
    ),
    Internal(
        "--raylet-name=SESSION/sockets/… (an argument of workers, behind default_worker.py)",
        "to find the folder of the session, where the node's fork server listens",
        "no fork server is found: every worker imports by itself, seven seconds of CPU each",
        "as for RAY_RAYLET_PID",
    ),
    Internal(
        "--raylet_socket_name=SESSION/sockets/raylet (an argument of raylets)",
        "to find, from a job's driver, the session's folder, where the node's fork server listens",
        "every driver imports by itself: seven seconds of CPU before each job",
        "as for RAY_RAYLET_PID",
    ),
    Internal(
        "py_modules_files (a folder of Ray's session)",
        "to tell shipped packages in PYTHONPATH, by which fork servers are told apart",
        "after a change of the code, workers are forked from a server that has imported the old one",
        "as for RAY_RAYLET_PID",
    ),
    Internal(
        "ray::… (the titles of workers)",
        "a rank that gives no sign of life is killed only where its number is still that of a worker",
        "a rank that is stopped by a signal, or deaf to SIGALRM, is found after Ray Train's ten minutes",
        "an actor can be killed by its id from another process",
    ),
    Internal(
        "ray_current_cluster (a file in Ray's folder)",
        "the address of the head that was just started",
        "`tandem cluster up` fails",
        "`ray start` can print it for a program to read",
    ),
    Internal(
        "ray_constants.SETUP_WORKER_FILENAME, setup_worker.py, RuntimeEnvContext",
        "raylets set a worker up without importing all of Ray for it (cluster/setup_worker.py)",
        "every worker process starts half a second of CPU later, or not at all",
        "Ray's own setup_worker.py imports no more than it needs",
    ),
    Internal(
        "python -m ray.scripts.scripts; the programs gcs_server, raylet and dashboard.py",
        "to start Ray by this very Python, and to know whether it still runs",
        "`tandem cluster up` fails, or takes a broken cluster for a whole one",
        "`python -m ray` exists, and `ray status` tells which daemons live",
    ),
)
