"""What a job or an endpoint asks of the machines it is to run on, as plain data: for manifests and batch scripts.

`jobs/work.py` and `serve/work.py` read it from their specs; what is made of it (cluster/kubernetes, cluster/slurm)
knows neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Group:
    """So many processes of one size, each of which runs on one node."""

    key: str
    """The key of the spec that asks for them."""
    count: int
    cpus: float
    gpus: float


@dataclass(frozen=True)
class Place:
    """A path or URI that a spec names."""

    key: str
    where: str
    written: bool = False
    """Whether something is kept there."""


@dataclass(frozen=True)
class JobWork:
    """A training, evaluation or other job."""

    name: str
    entrypoint: str
    """The command of its driver, run where `files` lie."""
    files: Mapping[str, str]
    """Relative path → text: the spec, and code of the user's own."""
    metadata: Mapping[str, str]
    workers: Group
    """Without which the job does not run."""
    places: tuple[Place, ...] = ()
    trains: bool = True
    resumes: bool = True
    """Whether the spec, submitted again, goes on from the newest checkpoint."""
    saves_every_steps: int | None = None


@dataclass(frozen=True)
class ServiceWork:
    """An endpoint."""

    name: str
    config: Mapping[str, Any]
    """What Ray Serve's REST API takes: serveConfigV2 of a RayService."""
    port: int
    drain_s: float
    """How long a replica that leaves may take, all in all."""
    groups: tuple[Group, ...]
    places: tuple[Place, ...] = ()
    said: tuple[str, ...] = field(default=())
    """What was chosen for the user, in sentences."""
