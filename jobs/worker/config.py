"""What the driver sends to each worker."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cluster.precision import Precision
from jobs.data.prepare import Prepared
from jobs.run_folder import RunFolder
from jobs.spec import JobSpec


@dataclass(frozen=True)
class WorkerConfig:
    """The same for every rank and every start of the group; pickled once, when the group is made."""

    spec: JobSpec
    precision: Precision
    """What the run computes in; the spec may say `auto`."""
    prepared: Prepared
    folder: RunFolder
    checkpoints: str
    """Where the run's checkpoints are: a path or a URI."""
    parent: Path | None
    """Directory of the model that the job starts from (a hub id is held in one too)."""
    base: Path
    """Where relative paths in the spec start."""
    storage: Path
    """The folder that all runs share."""
    token: str = ""
    """What says that a node's copy of the run's folder is complete (jobs/storage/courier.py); "" where all share it."""
    uri: str = ""
    """Of the object store that all runs share, where no folder is; "" else."""
    profile: int = 0
    """How many steps are recorded, if the job is a profile (jobs/profiled.py)."""
