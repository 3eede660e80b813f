"""What the doctor knows of a cluster: plain data, as the probes return it and as `--json` prints it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.interfaces import Choice


@dataclass(frozen=True)
class Clock:
    """How far a node's clock is from the driver's."""

    offset_s: float
    """Above 0: the node is ahead."""
    error_s: float
    """The offset is right to within this: half of the round trip by which it was asked."""


@dataclass(frozen=True)
class Disk:
    """One folder that jobs write, and the disk below it."""

    folder: str
    free_bytes: int
    total_bytes: int
    write_bytes_per_s: float | None = None
    """None: not measured."""
    read_bytes_per_s: float | None = None
    how: str = ""
    """How it was kept from being the page cache that was measured."""
    error: str = ""


@dataclass(frozen=True)
class Gpu:
    """One GPU, as NVML tells."""

    name: str
    memory_bytes: int = 0
    uncorrected_errors: int | None = None
    """Of its memory, since the driver was loaded; None: NVML tells none."""
    retired_pages: int | None = None
    is_repair_pending: bool = False
    """Rows or pages wait for a reset to be replaced."""
    has_repair_failed: bool = False
    """A row could not be replaced."""
    throttled_by: tuple[str, ...] = ()
    """Why its clocks are lowered now."""
    temperature_c: int | None = None


@dataclass(frozen=True)
class Answer:
    """What MLflow said to a node."""

    url: str
    """Where a job on that node looks for it; empty: it would not know."""
    status: int = 0
    """HTTP status of the call of its API; 0: no answer."""
    text: str = ""
    """The beginning of what it said, or why it could not be asked."""


@dataclass(frozen=True)
class NodeFacts:
    """What one node said of itself."""

    node_id: str
    address: str
    """Ray's address of it."""
    host: str = ""
    """What the machine calls itself."""
    is_head: bool = False
    error: str = ""
    """Why nothing is known of it."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """By name of what has it; empty strings: it is not installed."""
    clock: Clock | None = None
    disks: tuple[Disk, ...] = ()
    resolves_to: tuple[str, ...] = ()
    """The addresses of the host's name, asked on the node itself."""
    interface: Choice | None = None
    gloo_by: str = ""
    """By what gloo would find its address in a job of Tandem's: an interface, or the address of the host's name."""
    ports: tuple[int, int] | None = None
    """The range from which the system picks ports."""
    unreached: Mapping[str, str] = field(default_factory=dict)
    """By node id, why a port that was just opened there cannot be reached from here."""
    ray_gpus: float = 0.0
    gpus: tuple[Gpu, ...] = ()
    gpus_by: str = ""
    """What told of the GPUs, or why nothing did."""
    mlflow: Answer | None = None

    @property
    def label(self) -> str:
        """How people are told of it."""
        return f"{self.host} ({self.address})" if self.host else self.address


@dataclass(frozen=True)
class Link:
    """One way between two nodes, over one TCP connection."""

    source: str
    """Node id."""
    target: str
    round_trip_s: float
    bytes_per_s: float | None = None
    """None: not measured."""


@dataclass(frozen=True)
class AllReduce:
    """A sum over all nodes, one process on each."""

    backend: str
    nbytes: int
    seconds: float
    bus_bytes_per_s: float
    """Bytes that each node sends, a second: 2 (n - 1) / n of `nbytes`, as nccl-tests counts."""
    error: str = ""


@dataclass(frozen=True)
class Storage:
    """What the nodes could write and read of each other's in one place."""

    place: str
    """As people may see it."""
    is_default: bool
    """Nobody named it."""
    asked: tuple[str, ...] = ()
    """Ids of the nodes that wrote and read."""
    not_written: Mapping[str, str] = field(default_factory=dict)
    """By node id, why the node could not write there."""
    not_read: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """By node id of the reader, by that of the writer: why it could not be read."""
    left: Mapping[str, str] = field(default_factory=dict)
    """By node id, what could not be removed again, and why."""


@dataclass(frozen=True)
class Facts:
    """What is known of a cluster."""

    nodes: tuple[NodeFacts, ...]
    links: tuple[Link, ...] = ()
    pairs_left_out: int = 0
    """Pairs of nodes that were not measured, since there are so many."""
    allreduce: AllReduce | None = None
    storage: Storage | None = None
    quick: bool = False
    """What takes long was left out."""

    def node(self, node_id: str) -> NodeFacts:
        """Return what a node said."""
        return next(node for node in self.nodes if node.node_id == node_id)


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be."""

    severity: str
    """`error`: a job would fail or be silently wrong; `warning`: it would be slow, or may fail."""
    node: str
    """Whose, as people are told of it; empty: the cluster's."""
    what: str
    why: str
    """Why that matters."""
    way_out: str
    kind: str = ""
    """What was looked at: versions, clock, names, ports, disks, gpus, mlflow, storage, network, or silent."""
