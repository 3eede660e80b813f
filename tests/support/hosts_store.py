"""Hosts that share no folder, a cluster over them, and an S3 server on one more: what a run without a folder needs.

with hosts_store.up() as site:
    found = site.job(spec)                      # submitted and followed on host1, to its end
    site.objects("runs/")                       # what is stored, as the server's own API lists it
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen, TimeoutExpired
from typing import Any

import yaml

from jobs.worker.fault_injection import VARIABLE
from tests.support import hosts, hosts_cluster, moto_server
from tests.support.hosts import Host, Hosts
from tests.support.hosts_cluster import Cluster

PORT = 9000
LIST = """
import sys
from pyarrow import fs
files, path = fs.FileSystem.from_uri(sys.argv[1])
for info in files.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True)):
    if info.type == fs.FileType.File:
        print(info.path.removeprefix(path + "/"))
"""
READ = """
import sys
from pyarrow import fs
files, path = fs.FileSystem.from_uri(sys.argv[1])
sys.stdout.write(files.open_input_file(path).read().decode())
"""


@dataclass
class Job:
    """A job that ended."""

    code: int
    """0: it finished."""
    log: str
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def run(self) -> str:
        """The key of its run."""
        found = re.search(r"^tandem: run (\S+) ", self.log, re.MULTILINE)
        assert found, self.log[-3000:]
        return found[1]


class Following:
    """A job that is followed while it runs."""

    def __init__(self, site: Site, process: Popen[str], shown: Path) -> None:
        self._site, self._process, self._shown = site, process, shown

    @property
    def name(self) -> str:
        """The id of the job, once it has one."""
        hosts.wait_for_text(self._shown, "\n", self._process)
        return self._shown.read_text().split()[0]

    @property
    def is_running(self) -> bool:
        """Whether it is still followed."""
        return self._process.poll() is None

    def until(self, text: str, timeout_s: float = 200) -> None:
        """Wait until it has shown something."""
        hosts.wait_for_text(self._shown, text, self._process, timeout_s)

    def until_step(self, step: int, timeout_s: float = 200) -> None:
        """Wait until it has trained for so many steps."""
        enough = time.monotonic() + timeout_s
        while max([0, *map(int, re.findall(r"training (\d+)/", self._shown.read_text()))]) < step:
            assert self._process.poll() is None, self._shown.read_text()[-3000:]
            assert time.monotonic() < enough, self._shown.read_text()[-3000:]
            time.sleep(0.1)

    def end(self, timeout_s: float = 300) -> Job:
        """Wait until it has ended."""
        try:
            code = self._process.wait(timeout_s)
        except TimeoutExpired:
            hosts.end(self._process)
            raise AssertionError(self._shown.read_text()[-3000:]) from None
        log = self._site.log(self.name)
        results = re.findall(r"^tandem: result (\{.*\})$", log, re.MULTILINE)
        return Job(code, log, json.loads(results[-1]) if results else {})


class Site:
    """The hosts, the cluster and the store."""

    def __init__(self, made: Hosts, members: Sequence[Host], cluster: Cluster) -> None:
        self.links, self.hosts, self.cluster = made, members, cluster
        self._followed = 0

    @property
    def storage(self) -> str:
        """The URI that jobs get as their storage."""
        return self.uri("tandem")

    def follow(self, spec: Mapping[str, Any], home: str = "/root/home", host: int = 0, fault: str = "") -> Following:
        """Submit a job on a host, and follow it.

        Args:
            home: the job's TANDEM_HOME, on all hosts.
            fault: what its workers inject (jobs/worker/fault_injection.py).
        """
        self._followed += 1
        where, name = self.hosts[host], f"job{self._followed}"
        where.path("/root/specs").mkdir(exist_ok=True)
        where.path(f"/root/specs/{name}.yaml").write_text(yaml.safe_dump(dict(spec)))
        command = [sys.executable, "-m", "tandem", "jobs", "submit", f"/root/specs/{name}.yaml", "--follow"]
        shown = where.path(f"/root/{name}.log")
        env = {**self.cluster.environment, "TANDEM_HOME": home, **({VARIABLE: fault} if fault else {})}
        return Following(self, where.start(*command, env=env, log=shown), shown)

    def job(self, spec: Mapping[str, Any], home: str = "/root/home") -> Job:
        """Submit a job on host1, and wait until it has ended."""
        return self.follow(spec, home).end()

    def log(self, name: str) -> str:
        """Return what a job has printed until now."""
        return self.tandem("jobs", "logs", name)

    def objects(self, below: str = "") -> list[str]:
        """List what is stored, by the names below the storage."""
        found = self.hosts[0].python(LIST, self.storage, env=moto_server.ENVIRONMENT).splitlines()
        return sorted(name for name in found if name.startswith(below))

    def read(self, name: str) -> str:
        """Return what is stored under a name."""
        return self.hosts[0].python(READ, self.uri(f"tandem/{name}"), env=moto_server.ENVIRONMENT)

    def losses(self, run: str) -> dict[int, float]:
        """Return the loss of each step, as the stored spool of a run has it."""
        return {each["step"]: each["metrics"]["loss"] for each in self._steps(run)}

    def times(self, run: str) -> list[tuple[int, float]]:
        """Return when each step was done, in seconds since the epoch; a step that was done again comes twice."""
        return [(each["step"], each["time_ms"] / 1000) for each in self._steps(run)]

    def _steps(self, run: str) -> list[dict[str, Any]]:
        records = [json.loads(line) for line in self.read(f"runs/{run}/spool/rank-0.jsonl").splitlines()]
        return [each for each in records if "loss" in each.get("metrics", {})]

    def tandem(self, *arguments: str) -> str:
        """Run the `tandem` command on host1; return what it printed."""
        return self.cluster.tandem(*arguments, env={"TANDEM_HOME": "/root/home"}).stdout

    def uri(self, place: str) -> str:
        """Return the URI of a place in the bucket."""
        address = self.links[-1].address
        return f"s3://bucket/{place}?endpoint_override={address}:{PORT}&scheme=http&region=us-east-1"


@contextmanager
def up(count: int = 3, cpus: int = 1) -> Iterator[Site]:
    """Make hosts without a shared folder, a cluster over all of them, and an S3 server on one that is not in it.

    MLflow is known by a name, the first host's.
    """
    with hosts.up(count + 1, shared=False) as made:
        _start_store(made[-1])
        members = made[:-1]
        cluster = hosts_cluster.start(members, cpus=cpus, env=moto_server.ENVIRONMENT)
        cluster.environment["MLFLOW_TRACKING_URI"] = f"http://{made[0].name}:5000"
        yield Site(made, members, cluster)


def _start_store(host: Host) -> None:
    log = host.path("/root/s3.log")
    process = host.start(sys.executable, "-c", moto_server.SERVER, "0.0.0.0", str(PORT), log=log)
    hosts.wait_for_text(log, "port ", process)
    make = "import sys; from pyarrow import fs; fs.S3FileSystem(endpoint_override=sys.argv[1], scheme='http', "
    make += "region='us-east-1', allow_bucket_creation=True).create_dir('bucket')"
    host.python(make, f"127.0.0.1:{PORT}", env=moto_server.ENVIRONMENT)
