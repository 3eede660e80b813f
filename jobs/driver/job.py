"""A job as its driver sees it: what the phases share."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from cluster import stores
from cluster.doctor.quick import QuickLook
from cluster.precision import Precision
from jobs import lease, progress
from jobs.data.prepare import Prepared
from jobs.driver import storage
from jobs.driver.stopping import Stop
from jobs.driver.stored import Stored
from jobs.run_folder import RunFolder
from jobs.spec import JobSpec
from tracking.run import Run
from tracking.spool import SpoolSender


def lost(folder: RunFolder) -> NoReturn:
    """End at once: another job has taken the run over, and whatever this one still writes would be wrong."""
    progress.say(f"error: another job has taken the run {folder.key} over, since this one gave no sign of life")
    os._exit(1)


def end_if_lost(folder: RunFolder) -> None:
    """Return if this job still owns its run: asked before what a newer owner may have done is replaced."""
    with suppress(OSError):  # a store that does not answer: that is not to have lost the run
        if folder.lease and lease.newest(folder.path) != folder.lease:
            lost(folder)


@dataclass(frozen=True)
class Part:
    """What makes a job a sweep's trial."""

    REQUEST: ClassVar = "trial.json"
    """What it is to do, in its folder."""
    LOG: ClassVar = "driver.log"
    """What its driver printed, there too."""
    folder: Path
    """The folder of its run."""
    tags: Mapping[str, str]
    """Tags of its run, besides the usual ones."""
    model: str
    """What its model is called, should it be the one that is registered."""
    origin: Mapping[str, Any]
    """What the model's manifest says of the sweep."""


@dataclass
class Job:
    """What the phases share."""

    spec: JobSpec
    base: Path
    """Where relative paths in the spec start."""
    storage: Path
    folder: RunFolder
    sender: SpoolSender
    parent: Path | str | None
    """Directory (or hub id) of the model the job starts from."""
    placed: Mapping[str, int]
    """How many workers each node takes, by node id."""
    precision: Precision
    """What the workers compute in."""
    stop: Stop
    """Whether it was asked to end."""
    parent_uri: str | None = None
    """The same as others name it, an alias replaced by the version that it meant: `models:/name/3`."""
    steps: int = 0
    """Optimiser steps of the run, once they are known."""
    part: Part | None = None
    """Of a sweep's trial."""
    profile: int = 0
    """How many steps are recorded, if it is a profile: it leaves no model."""
    stored: Stored | None = None
    """What of it is kept in an object store; None where its storage is a folder."""
    nodes: QuickLook = field(default_factory=lambda: QuickLook(()))
    """Whether the nodes that take its workers fit together: it is looked at meanwhile."""

    def check_nodes(self) -> None:
        """Say what is to be said of the nodes, before work begins that spans them.

        Raises:
            UserError: they do not fit together.
        """
        for warning in self.nodes.settle():
            progress.say(f"warning: {warning}")

    def track(self, call: Callable[[Run], object]) -> None:
        """Have `call(run)` made once the tracking server answers; the job goes on without waiting for it."""
        self.sender.defer(call)

    def on_nodes(self, prepared: Prepared | None) -> AbstractContextManager[str]:
        """Have all nodes that may work for it reach its folder, data and parent; give what they wait for."""
        if self.stored is None:
            return nullcontext("")
        parent = Path(self.parent) if isinstance(self.parent, Path) else None
        return self.stored.on_nodes(self.spec, prepared, parent)

    @property
    def checkpoints(self) -> str:
        """Where the run's checkpoints are: a path or a URI."""
        if elsewhere := storage.checkpoints_root(self.spec, self.base):
            return stores.joined(elsewhere, self.folder.key)
        return self.stored.checkpoints if self.stored else str(self.folder.checkpoints)
