"""Which folder a job writes to: one that was stopped goes on in its own, one that finished is never written again.

storage/runs/<name>-<spec digest>-<k>/   status.json   RUNNING, FINISHED, FAILED or KILLED
                                         control.json  what failures have changed (Control)
                                         attempt.json  the newest start of the worker group (Attempt)
                                         spool/        metrics on their way to MLflow
                                         checkpoints/  model/  evaluations.json
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jobs.spec import JobSpec

STOP_FILE = "STOP"
"""Made in the run's folder to ask the workers for a checkpoint and an end."""
SAVE_FILE = "SAVE"
"""Made there to ask them for a checkpoint."""


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run, over any number of attempts. `key` names the run everywhere."""

    path: Path
    resumed: bool

    @property
    def key(self) -> str:
        """The name of the folder."""
        return self.path.name

    def status(self) -> str | None:
        """Return how the run stands, if anything was noted."""
        try:
            return json.loads((self.path / "status.json").read_text(encoding="utf-8"))["status"]
        except (OSError, ValueError, KeyError):
            return None

    def write_status(self, status: str) -> None:
        """Note how the run stands."""
        partial = self.path / "status.partial"
        partial.write_text(json.dumps({"status": status}), encoding="utf-8")
        os.replace(partial, self.path / "status.json")


@dataclass(frozen=True)
class Attempt:
    """One start of the worker group, as its first rank notes it."""

    name: str
    workers: int
    micro_batch: int
    training: bool = False
    """False while it is being set up."""
    nodes: tuple[str, ...] = ()
    """Id of each rank's node."""


@dataclass(frozen=True)
class Control:
    """What failures have changed about a run; its workers read it when they start."""

    skip: tuple[int, ...] = ()
    """Steps (from 0) whose batch is left out."""
    micro_batch: int | None = None
    """Rows per forward pass, where the spec's did not fit the memory."""
    excluded: tuple[str, ...] = ()
    """Ids of nodes that get no worker any more."""


def write_note(folder: Path, note: Attempt | Control) -> None:
    """Write the newest Attempt or Control."""
    path = folder / f"{type(note).__name__.lower()}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(note)), encoding="utf-8")
    os.replace(partial, path)


def read_attempt(folder: Path) -> Attempt | None:
    """Return the newest attempt that got as far as to say so."""
    values = _read(folder / "attempt.json")
    return Attempt(**{**values, "nodes": tuple(values["nodes"])}) if values else None


def read_control(folder: Path) -> Control:
    """Return what failures have changed."""
    values = _read(folder / "control.json")
    lists = {name: tuple(values.get(name, ())) for name in ("skip", "excluded")}
    return Control(**{**values, **lists})


def claim(storage: Path, spec: JobSpec) -> RunFolder:
    """Return the folder for a new attempt at `spec`: the unfinished one of the same spec, or a new one."""
    stem = f"{spec.name}-{spec.digest()[:8]}"
    root = storage / "runs"
    numbers = [
        int(path.name.rpartition("-")[2]) for path in root.glob(f"{stem}-*") if path.name.rpartition("-")[2].isdigit()
    ]
    newest = root / f"{stem}-{max(numbers, default=0)}"
    unfinished = RunFolder(newest, resumed=True)
    if numbers and spec.checkpoint.resume == "auto" and unfinished.status() != "FINISHED":
        return unfinished
    folder = root / f"{stem}-{max(numbers, default=0) + 1}"
    folder.mkdir(parents=True)
    return RunFolder(folder, resumed=False)


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
