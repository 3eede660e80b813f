"""What `tandem cluster up` started on this machine, as a file in Tandem's home, so that any later process finds it."""

import dataclasses
import json
import os
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from cluster import processes
from cluster.home import home


@dataclass(frozen=True)
class LocalCluster:
    """What `up` started. An empty address means that the environment names one, so none was started."""

    id: str
    token_path: Path
    ray_dir: Path
    started_at: float
    """Seconds since the epoch."""
    ray_address: str = ""
    """`host:port` of the head's GCS."""
    dashboard_url: str = ""
    mlflow_url: str = ""
    sessions: tuple[int, ...] = ()
    """Process sessions that the daemons lead."""
    daemons: tuple[int, ...] = ()
    """Pids without which the cluster is not running: GCS, the head's raylet, dashboard."""
    gcs_pid: int = 0
    gcs_command: tuple[str, ...] = ()
    """The GCS keeps its state on disk: dead alone, it is started again with the same command."""
    mlflow_pid: int = 0
    """MLflow may be away for a while: jobs go on, and `up` starts it again at the same address."""
    boot: str = ""
    """The machine's `boot_id` at that time."""
    raylets: tuple[int, ...] = ()
    """Pids of the nodes besides the head as they were started first, in the order of their addresses."""
    supervisors: tuple[int, ...] = ()
    """Pids of the processes that keep those nodes, in the same order (cluster/supervisor.py)."""

    @property
    def nodes(self) -> int:
        """Count the living nodes besides the head, with those that are being started again."""
        kept = zip_longest(self.raylets, self.supervisors, fillvalue=0)
        return sum(self.is_running(raylet) or self.is_running(supervisor) for raylet, supervisor in kept)

    def node_folder(self, number: int) -> Path:
        """Return where Ray and the supervisor of a node besides the head keep their files; the first one is 1."""
        return self.ray_dir / f"n{number}"

    def node_log(self, number: int) -> Path:
        """Return the log of such a node: what `ray start` printed, and when it was started again."""
        return self.token_path.parent / "logs" / f"ray-node-{number}.log"

    def is_running(self, pid: int) -> bool:
        """Say whether a daemon of this cluster lives under `pid`."""
        return bool(pid) and processes.is_running(pid, self.id)

    def owns(self, ray_address: str) -> bool:
        """Say whether `ray_address` is that of the head started here, as GCS address or as Jobs API URL."""
        return bool(self.ray_address) and ray_address.rstrip("/") in (self.ray_address, self.dashboard_url)


def path() -> Path:
    return home() / "cluster.json"


def write(cluster: LocalCluster) -> LocalCluster:
    """Write the state file, readable by its owner only, so that readers see the old or the new one."""
    draft = path().with_suffix(".tmp")
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump(dataclasses.asdict(cluster), file, default=str, indent=1)
    draft.replace(path())
    return cluster


def read() -> LocalCluster | None:
    """Read the state file; fields that another version of Tandem wrote and this one does not know are passed over."""
    try:
        written = json.loads(path().read_text())
    except FileNotFoundError:
        return None
    fields = {field.name: written[field.name] for field in dataclasses.fields(LocalCluster) if field.name in written}
    paths = {name: Path(fields[name]) for name in ("token_path", "ray_dir")}
    lists = {
        name: tuple(fields.get(name, ())) for name in ("sessions", "daemons", "raylets", "supervisors", "gcs_command")
    }
    return LocalCluster(**{**fields, **paths, **lists})
