"""The embedded cluster on this machine: a Ray head, further Ray nodes and an MLflow server, all on loopback.

    cluster = up(nodes=1, progress=print)
    state() == cluster
    down()

What runs is written to `cluster.json` in Tandem's home, so any later process finds it and can end it.
"""

import dataclasses
import fcntl
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from cluster import daemons, ports, processes, ray_process_internals, record, supervisor
from cluster.daemons import token_environment
from cluster.errors import UserError
from cluster.home import home
from cluster.record import LocalCluster

__all__ = ["LocalCluster", "down", "state", "token_environment", "up"]

DAEMON_GRACE_S = 2.0
"""Ray's agents, workers and MLflow end within it; its GCS server does not end on SIGTERM within 15 s."""
DEFAULT_PORTS = {"Ray": 6379, "the dashboard": 8265, "Ray Client": 10001, "MLflow": 5000}
SOCKET_PATH_BYTES = 107 if sys.platform == "linux" else 103
"""The longest path of a Unix socket (`sun_path` in unix(7), less its final zero)."""
LONGEST_SOCKET = "/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store.999"

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What the user asks of `up`; None leaves the choice to Ray or to `ports.choose`."""

    nodes: int = 0
    cpus: int | None = None
    gpus: int | None = None
    cpus_per_node: int = 1
    gpus_per_node: int = 0
    ray_port: int | None = None
    dashboard_port: int | None = None
    mlflow_port: int | None = None


def up(nodes: int = 0, cpus: int | None = None, *, progress: Progress = lambda _: None, **options: Any) -> LocalCluster:
    """Start what is missing of the local cluster, and return it; when nothing is missing, change nothing.

    `options` are the other fields of `Options`. `RAY_ADDRESS` and `MLFLOW_TRACKING_URI` each stand for a part that
    need not be started. Raises UserError when a port that was asked for is in use, or when a daemon does not start;
    then nothing that this call started is left running.
    """
    wanted = Options(nodes=nodes, cpus=cpus, **options)
    _create_home()
    with _locked():
        cluster = state() or _restart_gcs(progress)
        if cluster is not None:
            return _start_missing(cluster, wanted, progress)
        before = record.read()  # what a crash or an interrupted start may have left
        if before is not None and before.ray_address:
            progress(
                "the cluster that was here has lost its head: what is left of it ends, and a new one takes its place"
            )
        _end_recorded(job_grace_s=0)
        cluster = LocalCluster(
            secrets.token_hex(8), home() / "auth_token", home() / "ray", time.time(), boot=processes.boot_id()
        )
        try:
            return _start_missing(cluster, wanted, progress, before)
        except BaseException:
            _end_recorded(job_grace_s=0)
            raise


def down(job_grace_s: float = 10.0) -> int:
    """End every process that `up` started and what those started; return how many that was.

    Jobs that still run are asked to stop first and get `job_grace_s` for it. Raises UserError if a process stays.
    """
    if not record.path().exists():
        return 0
    with _locked():
        return _end_recorded(job_grace_s)


def state() -> LocalCluster | None:
    """Return the local cluster, or None when there is none or when one of Ray's main processes is gone."""
    cluster = record.read()
    if cluster is None or not (cluster.daemons or _is_mlflow_running(cluster)):
        return None
    is_whole = all(cluster.is_running(pid) for pid in cluster.daemons)
    return cluster if is_whole else None


def is_mlflow_up(url: str) -> bool:
    """Say whether an MLflow server answers at `url`; a tracking URI that is no http address needs no server."""
    return not url.startswith("http") or daemons.answers(f"{url.rstrip('/')}/health")


def _start_missing(
    cluster: LocalCluster, wanted: Options, progress: Progress, before: LocalCluster | None = None
) -> LocalCluster:
    """Start MLflow and the head side by side, since each takes seconds of imports; then the further nodes.

    Sessions are recorded before anything in them runs for long, daemons only at the end: an interrupted start can be
    cleaned up, and is never taken for a cluster. Jobs and people know the ports that were: of `before`, a cluster that
    died, or of this one's own MLflow.
    """
    needs_head = not cluster.ray_address and not os.environ.get("RAY_ADDRESS")
    needs_mlflow = not _is_mlflow_running(cluster) and not os.environ.get("MLFLOW_TRACKING_URI")
    daemons.write_token(cluster.token_path)
    with closing(ports.Ports(note=progress)) as reserved:
        usual = {**DEFAULT_PORTS, **_ports_of(before or cluster)}
        chosen = _choose_ports(reserved, wanted, usual, needs_head, needs_mlflow)
        progress(_announcement(needs_head, needs_mlflow))
        mlflow_pid, head = 0, None
        if needs_mlflow:
            cluster, mlflow_pid = _start_mlflow(cluster, chosen["MLflow"])
        if needs_head:
            cluster, head = _start_head(cluster, wanted, chosen)
        if head is not None:
            cluster = _finish_head(cluster, head, chosen)
            progress(f"Ray head on {cluster.ray_address}, dashboard on {cluster.dashboard_url}")
        if needs_mlflow:
            cluster = _finish_mlflow(cluster, mlflow_pid, chosen["MLflow"])
            progress(f"MLflow on {cluster.mlflow_url}")
    if cluster.ray_address and wanted.nodes > cluster.nodes:
        cluster = _start_nodes(cluster, wanted, progress)
    return record.write(cluster) if cluster.daemons or cluster.mlflow_pid else cluster


def _restart_gcs(progress: Progress) -> LocalCluster | None:
    """Start the GCS again if it alone is dead: it finds its state on disk, and the raylets wait for it for 60 s."""
    cluster = record.read()
    if cluster is None or not cluster.gcs_command or not (cluster.ray_dir / "gcs").exists():
        return None
    if [pid for pid in cluster.daemons if not cluster.is_running(pid)] != [cluster.gcs_pid]:
        return None
    progress("starting Ray's GCS again …")
    env = {**daemons.environment(cluster.id, cluster.token_path), **daemons.head_environment(cluster.ray_dir)}
    pid, session = daemons.start_daemon(list(cluster.gcs_command), env, _log("ray-gcs"), cluster.ray_dir)
    alive = [old for old in cluster.daemons if old != cluster.gcs_pid]
    return record.write(dataclasses.replace(_with_session(cluster, session), gcs_pid=pid, daemons=(pid, *alive)))


def _ports_of(cluster: LocalCluster) -> dict[str, int]:
    """Return the ports that a cluster had, by their names in DEFAULT_PORTS. Pure."""
    addresses = {
        "Ray": f"//{cluster.ray_address}",
        "the dashboard": cluster.dashboard_url,
        "MLflow": cluster.mlflow_url,
    }
    found = {name: urlsplit(address).port for name, address in addresses.items()}
    return {name: port for name, port in found.items() if port}


def _is_mlflow_running(cluster: LocalCluster) -> bool:
    return cluster.is_running(cluster.mlflow_pid)


def _announcement(needs_head: bool, needs_mlflow: bool) -> str:
    parts = [name for name, is_needed in (("a Ray head", needs_head), ("MLflow", needs_mlflow)) if is_needed]
    return f"starting {' and '.join(parts)} …" if parts else "Ray and MLflow are there already"


def _choose_ports(
    reserved: ports.Ports, wanted: Options, usual: Mapping[str, int], needs_head: bool, needs_mlflow: bool
) -> dict[str, int]:
    explicit = [("MLflow", wanted.mlflow_port)] if needs_mlflow else []
    if needs_head:
        explicit += [("Ray", wanted.ray_port), ("the dashboard", wanted.dashboard_port), ("Ray Client", None)]
    requests = [(name, usual[name], port) for name, port in explicit]
    explicit_first = sorted(requests, key=lambda request: request[2] is None)
    return {name: reserved.choose(name, default, port) for name, default, port in explicit_first}


def _start_mlflow(cluster: LocalCluster, port: int) -> tuple[LocalCluster, int]:
    root = home() / "mlflow"
    root.mkdir(exist_ok=True)
    env = daemons.environment(cluster.id, cluster.token_path)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), env.get("PYTHONPATH")]))
    pid, session = daemons.start_daemon(daemons.mlflow_command(root, port), env, _log("mlflow"), root)
    return record.write(_with_session(cluster, session)), pid


def _finish_mlflow(cluster: LocalCluster, pid: int, port: int) -> LocalCluster:
    url = f"http://127.0.0.1:{port}"
    daemons.wait_for_mlflow(url, pid, cluster.id, _log("mlflow"))
    return dataclasses.replace(cluster, mlflow_url=url, mlflow_pid=pid)


def _start_head(
    cluster: LocalCluster, wanted: Options, chosen: dict[str, int]
) -> tuple[LocalCluster, subprocess.Popen[bytes]]:
    cluster = record.write(dataclasses.replace(cluster, ray_dir=_new_ray_dir()))
    address = daemons.loopback_address(0)
    command = daemons.head_command(address, chosen, cluster.ray_dir, cpus=wanted.cpus, gpus=wanted.gpus)
    env = {**daemons.environment(cluster.id, cluster.token_path), **daemons.head_environment(cluster.ray_dir)}
    process = daemons.start_ray(command, env, _log("ray-head"))
    return record.write(_with_session(cluster, process.pid)), process


def _finish_head(cluster: LocalCluster, process: subprocess.Popen[bytes], chosen: dict[str, int]) -> LocalCluster:
    daemons.wait_for_ray(process, "the Ray head", _log("ray-head"))
    address = (cluster.ray_dir / ray_process_internals.CURRENT_CLUSTER).read_text().strip()
    pids = _pids(cluster, process.pid, ray_process_internals.HEAD_PROGRAMS)
    gcs = next(pid for pid in pids if daemons.runs(psutil.Process(pid).cmdline(), (ray_process_internals.GCS_PROGRAM,)))
    return dataclasses.replace(
        cluster,
        ray_address=address,
        dashboard_url=f"http://127.0.0.1:{chosen['the dashboard']}",
        daemons=(*cluster.daemons, *pids),
        gcs_pid=gcs,
        gcs_command=tuple(psutil.Process(gcs).cmdline()),
    )


def _start_nodes(cluster: LocalCluster, wanted: Options, progress: Progress) -> LocalCluster:
    """Start the missing nodes side by side, each with a new address. Those that run keep their resources."""
    missing = wanted.nodes - cluster.nodes
    progress(f"starting {missing} more Ray node{'s' if missing > 1 else ''} …")
    env = daemons.environment(cluster.id, cluster.token_path)
    started = []
    for number in range(len(cluster.raylets) + 1, len(cluster.raylets) + missing + 1):
        address, folder = daemons.loopback_address(number), cluster.node_folder(number)
        command = daemons.node_command(cluster.ray_address, address, folder, wanted.cpus_per_node, wanted.gpus_per_node)
        log = cluster.node_log(number)
        node = supervisor.Node(tuple(command), cluster.ray_address, folder, log, record.path(), cluster.id)
        pid, session = supervisor.begin(node, env)
        started.append((number, node, pid))
        cluster = _with_session(cluster, session)
    for number, node, pid in started:
        raylet = supervisor.wait(node, pid, f"Ray node {number}")
        kept = (*cluster.raylets, raylet), (*cluster.supervisors, pid)
        cluster = dataclasses.replace(cluster, raylets=kept[0], supervisors=kept[1])
        progress(f"Ray node {number} on {daemons.loopback_address(number)}")
    return cluster


def _pids(cluster: LocalCluster, session: int, programs: Collection[str]) -> tuple[int, ...]:
    """Find the processes of one session that run one of `programs`."""
    running = processes.members(cluster.id, [session], cluster.started_at, cluster.boot)
    in_session = [process for process in running if os.getsid(process.pid) == session]
    return tuple(process.pid for process in in_session if daemons.runs(process.cmdline(), programs))


def _end_recorded(job_grace_s: float) -> int:
    """End what the state file names, then forget it. What Ray left in a folder outside the home goes as well."""
    cluster = record.read()
    if cluster is None:
        return 0

    def find() -> list[psutil.Process]:
        return processes.members(cluster.id, cluster.sessions, cluster.started_at, cluster.boot)

    if job_grace_s and daemons.stop_jobs(cluster.dashboard_url, cluster.token_path):
        processes.wait_for_job_drivers(find, job_grace_s)
    ended = processes.end(find, DAEMON_GRACE_S)
    if left := find():
        raise UserError(f"these processes of the cluster do not end: {[process.pid for process in left]}")
    if cluster.ray_dir.parent != home():
        shutil.rmtree(cluster.ray_dir, ignore_errors=True)
    record.path().unlink()
    return ended


def _new_ray_dir() -> Path:
    """Return a folder for Ray's sessions: in the home, emptied of older ones, or a short one if sockets need that."""
    folder = home() / "ray"
    if len(os.fsencode(folder)) + len(LONGEST_SOCKET) > SOCKET_PATH_BYTES:
        return Path(tempfile.mkdtemp(prefix="tandem-"))
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def _create_home() -> None:
    (home() / "logs").mkdir(mode=0o700, parents=True, exist_ok=True)
    home().chmod(0o700)


def _log(name: str) -> Path:
    return home() / "logs" / f"{name}.log"


def _with_session(cluster: LocalCluster, session: int) -> LocalCluster:
    return dataclasses.replace(cluster, sessions=(*cluster.sessions, session))


@contextmanager
def _locked() -> Iterator[None]:
    """Let one process at a time start or end the cluster of this home; others wait."""
    with (home() / "cluster.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
