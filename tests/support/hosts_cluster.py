"""Ray and MLflow on hosts of tests/support/hosts.py, with token authentication and Tandem's settings for Ray's health.

    with hosts.up(3) as three:
        cluster = hosts_cluster.start(three)            # host1: Ray's head and MLflow; the others join it
        cluster.tandem("doctor", "--json")              # on host1, as a user there would; a CompletedProcess
        cluster.tandem("jobs", "submit", "/shared/job.yaml", host=three[1])
        hosts_cluster.start_worker(three[2], cluster)   # once more, after it was declared dead

All of it ends with the hosts.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cluster.ray_process_internals import HEAD_SETTINGS, START_MODULE
from tests.support.hosts import Host

TOKEN = "/root/.ray-token"
SECRET = "0123456789abcdef" * 4
STORE_BYTES = 128 << 20
PATIENT = {"RAY_agent_register_timeout_ms": "120000"}
"""A raylet ends if its agent has not started by then: on a busy machine that takes longer than Ray's 15 s."""


@dataclass
class Cluster:
    """Ray over hosts."""

    head: Host
    ray_address: str
    environment: dict[str, str] = field(default_factory=dict)
    """With what a user's processes find Ray and MLflow."""

    def tandem(
        self,
        *arguments: str,
        host: Host | None = None,
        env: Mapping[str, str] | None = None,
        timeout_s: float = 300,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run the `tandem` command on a host, the head's if none is named; see `Host.run`."""
        where, variables = host or self.head, {**self.environment, **(env or {})}
        command = [sys.executable, "-m", "tandem", *arguments]
        return where.run(*command, env=variables, timeout_s=timeout_s, check=check)


def start(
    members: Sequence[Host],
    cpus: int = 1,
    mlflow: bool = True,
    allowed_hosts: str | None = None,
    env: Mapping[str, str] | None = None,
    head_cpus: int | None = None,
) -> Cluster:
    """Start Ray's head on the first of the hosts and a worker node on each other, and MLflow on the first.

    Args:
        cpus: that each of them offers.
        allowed_hosts: the Host headers that MLflow accepts; None: its default, which has private addresses.
        env: what the nodes and a user's processes have in their environment besides, as credentials.
        head_cpus: that the head offers, if other than the others.
    """
    head = members[0]
    ray_address = f"{head.address}:6379"
    settings = {**HEAD_SETTINGS, **PATIENT, **token(head), **(env or {})}
    found = Cluster(head, ray_address, {"RAY_ADDRESS": ray_address, **settings})
    if mlflow:
        found.environment["MLFLOW_TRACKING_URI"] = f"http://{head.address}:5000"
    start_head(found, cpus if head_cpus is None else head_cpus, mlflow, allowed_hosts)
    for host in members[1:]:
        start_worker(host, found, cpus)
    return found


def start_head(cluster: Cluster, cpus: int = 1, mlflow: bool = True, allowed_hosts: str | None = None) -> None:
    """Start Ray's head and MLflow on the head's host; once more, after all that ran there has ended."""
    head = cluster.head
    server = start_mlflow(head, allowed_hosts) if mlflow else None
    _ray(head, cluster, cpus, "--head", "--port=6379", "--dashboard-host=127.0.0.1")
    if server is not None:
        wait_for_mlflow(head, server)


def start_worker(host: Host, cluster: Cluster, cpus: int = 1, env: Mapping[str, str] | None = None) -> None:
    """Have a host join the cluster as a node of so many CPUs; return once Ray says it did.

    Args:
        env: variables of the node's processes besides, which its jobs inherit.
    """
    token(host)
    _ray(host, cluster, cpus, f"--address={cluster.ray_address}", env=env)


def stop_ray(host: Host) -> None:
    """End Ray on a host, as `ray stop` does there."""
    host.run(sys.executable, "-m", "cluster.supervisor", "stop")
    host.run(sys.executable, "-m", START_MODULE, "stop", "--force")


def start_mlflow(host: Host, allowed_hosts: str | None = None) -> subprocess.Popen[str]:
    """Start an MLflow server on a host, for all of its addresses, on port 5000; it takes some seconds to answer."""
    allowed = ["--allowed-hosts", allowed_hosts] if allowed_hosts else []
    where = ["--root", "/root/mlflow", "--host", "0.0.0.0", "--port", "5000"]
    return host.start(sys.executable, "-m", "tracking.server", *where, *allowed, log=host.path("/root/mlflow.log"))


def wait_for_mlflow(host: Host, server: subprocess.Popen[str], timeout_s: float = 120) -> None:
    """Wait until the server answers."""
    asked = "import sys; from cluster import daemons; sys.exit(not daemons.answers('http://127.0.0.1:5000/health'))"
    deadline = time.monotonic() + timeout_s
    while host.run(sys.executable, "-c", asked, check=False).returncode:
        said = host.path("/root/mlflow.log").read_text()[-2000:]
        assert server.poll() is None, f"MLflow ended: {said}"
        assert time.monotonic() < deadline, f"MLflow does not answer: {said}"


def token(host: Host) -> dict[str, str]:
    """Write the cluster's token on a host; return the variables by which Ray finds it there."""
    path = host.path(TOKEN)
    path.write_text(SECRET)
    path.chmod(0o600)
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": TOKEN}


def _ray(host: Host, cluster: Cluster, cpus: int, *options: str, env: Mapping[str, str] | None = None) -> None:
    """Run `ray start`, which ends when the node is up; RAY_ADDRESS would keep a head from starting."""
    variables = {name: value for name, value in cluster.environment.items() if name != "RAY_ADDRESS"}
    given = [f"--node-ip-address={host.address}", f"--num-cpus={cpus}", f"--object-store-memory={STORE_BYTES}"]
    command = [sys.executable, "-m", START_MODULE, "start", *options, *given, "--disable-usage-stats"]
    if host is not cluster.head:  # as ray-cluster.yaml starts workers: one that was declared dead joins again
        command = [
            sys.executable,
            "-m",
            "cluster.supervisor",
            "start",
            "--address",
            cluster.ray_address,
            "--",
            *command,
        ]
    host.run(*command, env={**variables, **(env or {})})
