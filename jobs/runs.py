"""Which folder a job writes to: one that was stopped goes on in its own, one that finished is never written again.

storage/runs/<name>-<spec digest>-<k>/   status.json   RUNNING, FINISHED, FAILED or KILLED
                                         spool/        metrics on their way to MLflow
                                         checkpoints/  model/  evaluations.json
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from jobs.spec import JobSpec


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run, over any number of attempts. `key` names the run everywhere."""

    path: Path
    resumed: bool

    @property
    def key(self) -> str:
        """The name of the folder."""
        return self.path.name

    def write_status(self, status: str) -> None:
        """Note how the run stands."""
        partial = self.path / "status.partial"
        partial.write_text(json.dumps({"status": status}), encoding="utf-8")
        os.replace(partial, self.path / "status.json")


def claim(storage: Path, spec: JobSpec) -> RunFolder:
    """Return the folder for a new attempt at `spec`: the unfinished one of the same spec, or a new one."""
    stem = f"{spec.name}-{spec.digest()[:8]}"
    root = storage / "runs"
    numbers = [
        int(path.name.rpartition("-")[2]) for path in root.glob(f"{stem}-*") if path.name.rpartition("-")[2].isdigit()
    ]
    newest = root / f"{stem}-{max(numbers, default=0)}"
    if numbers and spec.checkpoint.resume == "auto" and _status(newest) != "FINISHED":
        return RunFolder(newest, resumed=True)
    folder = root / f"{stem}-{max(numbers, default=0) + 1}"
    folder.mkdir(parents=True)
    return RunFolder(folder, resumed=False)


def _status(folder: Path) -> str | None:
    try:
        return json.loads((folder / "status.json").read_text(encoding="utf-8"))["status"]
    except (OSError, ValueError, KeyError):
        return None
