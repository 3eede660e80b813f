"""How fast the ranks of a run work by themselves, and which nodes were slow: files in the run's folder.

paces/<attempt>-rank-<n>   the newest window of a rank (Pace)       workers → driver
stragglers.jsonl           what was said of slow nodes, in order    driver → post-mortem page
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jobs.notes import lines


@dataclass(frozen=True)
class Pace:
    """What a rank took for a step in its newest window: averages over the window's steps, so that stutters count."""

    node: str
    """Id of its node."""
    window: int
    """Number of the window in this attempt, from 1."""
    step: int
    """The last one of the window."""
    own_s: float
    """Seconds in which it worked, and waited for no other rank."""
    step_s: float
    """Seconds of the whole step: the same on all ranks, since they wait for each other."""
    rows: float
    """Rows that it worked on."""


@dataclass(frozen=True)
class Paces:
    """Those of one run; `path` is its folder."""

    path: Path

    def write(self, attempt: str, rank: int, pace: Pace) -> None:
        """Put a rank's newest window in place of the one before. Whoever reads half of it looks again."""
        folder = self.path / "paces"
        folder.mkdir(exist_ok=True)
        (folder / f"{attempt}-rank-{rank}").write_text(json.dumps(asdict(pace)), encoding="ascii")

    def of(self, attempt: str) -> dict[int, Pace]:
        """Return the newest window of each rank of an attempt that has told one, by rank."""
        found = {}
        for path in (self.path / "paces").glob(f"{attempt}-rank-*"):
            with suppress(OSError, ValueError, TypeError):  # it is being written
                found[int(path.name.rpartition("-")[2])] = Pace(**json.loads(path.read_text(encoding="ascii")))
        return found

    def stragglers(self) -> list[dict[str, Any]]:
        """Return what was said of slow nodes, oldest first: `time`, `node`, `step`, `said`."""
        return [entry for entry in lines(self.path / "stragglers.jsonl") if isinstance(entry, dict)]

    def add_straggler(self, entry: dict[str, Any]) -> None:
        """Add something to that."""
        with (self.path / "stragglers.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def clear(self) -> None:
        """Forget all: another attempt at the job begins."""
        for left in (*(self.path / "paces").glob("*-rank-*"), self.path / "stragglers.jsonl"):
            left.unlink(missing_ok=True)
