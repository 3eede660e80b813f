"""The daemons of the local cluster: their commands, their environment, and how to wait for them."""

import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Collection, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from cluster.processes import MARKER, is_running
from cluster.ray_process_internals import GCS_STORAGE, GCS_STORAGE_PATH, HEAD_SETTINGS, START

START_TIMEOUT_S = 120.0
SETUP_WORKER = Path(__file__).absolute().with_name("setup_worker.py")
"""What raylets run before each worker, from a copy of their own: a checkout may change while a cluster is up."""
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
NODE_STORE_BYTES = 512 * 1024**2
"""Further nodes share the machine's memory with the head, so their object stores are small."""


def token_environment(token_path: Path) -> dict[str, str]:
    """Return the variables by which Ray's processes and clients find the cluster's token."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_path)}


def write_token(path: Path) -> None:
    """Create the token file with mode 0600, or keep the one that is there and tighten its mode."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        path.chmod(0o600)
        return
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))


def environment(cluster_id: str, token_path: Path) -> dict[str, str]:
    """Return the environment of every daemon: the caller's, the cluster's marker, and the token alone for a secret."""
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_TOKEN"}
    # A job's entry point is a shell line, `python -m …`: that python must be this one, also in a venv not activated.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    if modules := inherited.get("PYTHONPATH"):  # the daemons run elsewhere
        inherited["PYTHONPATH"] = os.pathsep.join(os.path.abspath(part) for part in modules.split(os.pathsep) if part)
    return {**inherited, "PATH": path, MARKER: cluster_id, **HEAD_SETTINGS, **token_environment(token_path)}


def head_environment(ray_dir: Path) -> dict[str, str]:
    """Return what the head needs besides: its metadata on disk, where this build of Ray can do so."""
    if sys.platform != "linux":
        return {}
    return {GCS_STORAGE: "rocksdb", GCS_STORAGE_PATH: str(ray_dir / "gcs")}


def head_command(
    address: str, ports: Mapping[str, int], ray_dir: Path, cpus: int | None, gpus: int | None
) -> list[str]:
    """Build `ray start --head` for loopback; ports that are not named here are picked by the system."""
    options = {
        "node-ip-address": address,
        "port": ports["Ray"],
        "dashboard-host": "127.0.0.1",
        "dashboard-port": ports["the dashboard"],
        "ray-client-server-port": ports["Ray Client"],
        "temp-dir": ray_dir,
        "num-cpus": cpus,
        "num-gpus": gpus,
    }
    return _ray_start(["--head"], options)


def node_command(head: str, address: str, temp_dir: Path, cpus: int, gpus: int) -> list[str]:
    """Build `ray start` for one more node on this machine, with an address, resources and a folder of its own.

    In one folder, a node that unpacks a job's code would take it away from the nodes that run with it already.
    """
    options = {
        "address": head,
        "node-ip-address": address,
        "num-cpus": cpus,
        "num-gpus": gpus,
        "temp-dir": temp_dir,
        "object-store-memory": NODE_STORE_BYTES,
    }
    return _ray_start([], options)


def mlflow_command(root: Path, port: int) -> list[str]:
    """Build the command of the MLflow server; it is named by module, since `cluster` imports no other folder."""
    return [sys.executable, "-m", "tracking.server", "--root", str(root), "--host", "127.0.0.1", "--port", str(port)]


def loopback_address(number: int) -> str:
    """Return an address for node `number`, the head being 0: 127.0.0.2 upwards, else 127.0.0.1 for all.

    Ray replaces 127.0.0.1 by the address of the network interface, so it is only the second choice, for systems that
    answer to no other loopback address.
    """
    address = f"127.0.{number // 250}.{number % 250 + 2}"
    return address if can_bind(address) else "127.0.0.1"


def runs(command: Sequence[str], programs: Collection[str]) -> bool:
    """Say whether a command line runs one of `programs`, itself or through Python."""
    return any(Path(part).name in programs for part in command[:3])


def start_ray(command: Sequence[str], env: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Run `ray start`, which ends when its daemons are up, in a session of its own.

    It starts beside its log, not in the user's folder: processes of jobs and replicas that get no folder of their own
    start where the raylet did, and Python would look there first, also for Tandem's own packages.
    """
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            env=env,
            cwd=log.parent,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def start_daemon(command: Sequence[str], env: Mapping[str, str], log: Path, folder: Path) -> tuple[int, int]:
    """Start `command` in `folder` as nobody's child, in a session of its own; return its pid and the session's id.

    A shell starts it and ends, so that a long-lived caller (a test session, a notebook) need not wait for it.
    """
    script = '"$@" >"$0" 2>&1 </dev/null & echo $!'
    shell = subprocess.Popen(
        ["/bin/sh", "-c", script, str(log), *command],
        env=env,
        cwd=folder,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    pid, _ = shell.communicate()
    return int(pid), shell.pid


def wait_for_ray(process: subprocess.Popen[bytes], what: str, log: Path) -> None:
    """Wait until `ray start` has ended well. Raises UserError with the end of its log when it has not."""
    try:
        exit_code = process.wait(timeout=START_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise UserError(f"{what} did not start within {START_TIMEOUT_S:.0f} s; {tail(log)}") from None
    if exit_code != 0:
        raise UserError(f"{what} did not start (exit code {exit_code}); {tail(log)}")


def wait_for_mlflow(url: str, pid: int, cluster_id: str, log: Path) -> None:
    """Wait until the MLflow server answers. Raises UserError with the end of its log when it ends or stays silent."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not answers(f"{url}/health"):
        if not is_running(pid, cluster_id) or time.monotonic() > deadline:
            raise UserError(f"MLflow did not start on {url}; {tail(log)}")
        time.sleep(0.1)


def listens(address: str, timeout_s: float = 1.0) -> bool:
    """Say whether somebody takes connections at `address`, a `host:port`."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout_s).close()
    except (OSError, ValueError):
        return False
    return True


def answers(url: str) -> bool:
    """Say whether a GET of `url` succeeds. Loopback is reached past any HTTP proxy that the environment names."""
    direct = [urllib.request.ProxyHandler({})] if "://127." in url else []
    opener = urllib.request.build_opener(*direct)
    try:
        with opener.open(url, timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def is_unknown_name(url: str) -> bool:
    """Say whether the MLflow server at `url` refuses the name in it. Its /health answers to any."""
    try:
        urllib.request.urlopen(f"{url.rstrip('/')}/api/2.0/mlflow/experiments/search?max_results=1", timeout=2).close()
    except urllib.error.HTTPError as error:
        return error.code == HTTPStatus.FORBIDDEN and b"Invalid Host header" in error.read()
    except (OSError, ValueError):
        return False
    return False


def stop_jobs(dashboard_url: str, token_path: Path) -> int:
    """Ask every submitted job that has not ended to stop; return how many were asked, 0 when the head is silent.

    Through the Jobs API, since it gives a driver time: the driver's shell ends at the first signal, and Ray kills what
    outlives it within a second unless it was Ray that sent the signal.
    """
    try:
        jobs = _call(f"{dashboard_url}/api/jobs/", token_path)
        running = [job["submission_id"] for job in jobs if job["submission_id"] and job["status"] not in ENDED]
        for submission_id in running:
            _call(f"{dashboard_url}/api/jobs/{submission_id}/stop", token_path, "POST")
    except (OSError, ValueError):
        return 0
    return len(running)


def _call(url: str, token_path: Path, method: str = "GET") -> Any:
    headers = {"Authorization": f"Bearer {token_path.read_text().strip()}"}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, headers=headers, method=method), timeout=5) as response:
        return json.load(response)


def _ray_start(flags: Sequence[str], options: Mapping[str, object]) -> list[str]:
    """Give Ray's fixed defaults (agent port 52365, worker ports from 10002) up for ports that cannot collide.

    What raylets run before each worker is copied into their folder.
    """
    free = {"dashboard-agent-listen-port": 0, "min-worker-port": 0, "max-worker-port": 0}
    given = [f"--{name}={value}" for name, value in {**options, **free}.items() if value is not None]
    setup = _copied(SETUP_WORKER, Path(str(options["temp-dir"])))
    return [sys.executable, "-c", START, str(setup), "start", *flags, "--disable-usage-stats", *given]


def _copied(file: Path, folder: Path) -> Path:
    """Copy a file into a folder, whole or not at all, and return the copy."""
    folder.mkdir(parents=True, exist_ok=True)
    half, copy = folder / f".{file.name}.{os.getpid()}", folder / file.name
    half.write_bytes(file.read_bytes())
    return half.replace(copy)


def can_bind(address: str) -> bool:
    """Say whether `address` is one of this machine."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def tail(log: Path, lines: int = 15) -> str:
    """Return the end of a log, for an error's text."""
    text = log.read_text(errors="replace").splitlines() if log.exists() else []
    return "\n".join([f"the end of {log}:", *text[-lines:]])
