"""What a run has learned from each source of a mixture so far: rows, and terms of the loss.

The thread that fetches rows tells what each step has; it counts once the step is done, so that steps that are left out
do not. A checkpoint notes the sums: a run that goes on adds to them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from jobs.data.mixture import Mixed, Part
from jobs.data.rows import Rows

EVERY_STEPS = 50
"""So often the shares are written down, besides at the end."""

Noted = Mapping[str, Sequence[int]]
"""Name of a source → rows, and terms of the loss, of it that were learned from."""


@dataclass
class Learned:
    """One rank's; all count the same, the whole batch of each step."""

    parts: tuple[Part, ...]
    rows: np.ndarray
    """By source, int64 (K,)."""
    targets: np.ndarray
    """Terms of the loss by source, int64 (K,)."""
    _fetched: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    def fetched(self, step: int, order: Mixed, chosen: np.ndarray, rows: Rows) -> int:
        """Take what the batch of a step holds; return how many terms of the loss that is.

        Args:
            chosen: its row numbers, int64 (G,).
        """
        apart = order.apart(chosen)
        targets = np.array([rows.targets(each) for each in apart], dtype=np.int64)
        self._fetched[step] = (np.array(list(map(len, apart)), dtype=np.int64), targets)
        return int(targets.sum())

    def end_step(self, step: int) -> None:
        """Count a step: the model has learned from it."""
        rows, targets = self._fetched.pop(step)
        self.rows, self.targets = self.rows + rows, self.targets + targets

    def metrics(self) -> dict[str, float]:
        """Return the share of each source of what was learned from so far, 0 … 1."""
        by_rows, by_targets = _shares(self.rows), _shares(self.targets)
        named = [part.name for part in self.parts]
        rows = {f"share_of_rows/{name}": share for name, share in zip(named, by_rows, strict=True)}
        return rows | {f"share_of_targets/{name}": share for name, share in zip(named, by_targets, strict=True)}

    def noted(self) -> dict[str, list[int]]:
        """Return what a checkpoint keeps."""
        both = zip(self.rows.tolist(), self.targets.tolist(), strict=True)
        return {part.name: list(sums) for part, sums in zip(self.parts, both, strict=True)}

    def said(self) -> str:
        """Say what each source gave in the end."""
        told = [
            f"{part.name} {rows:.4g} % ({targets:.4g} %), {count / part.rows:.3g} passes"
            for part, rows, targets, count in zip(
                self.parts, 100 * _shares(self.rows), 100 * _shares(self.targets), self.rows.tolist(), strict=True
            )
        ]
        return f"learned from each source, of all rows (of all terms of the loss): {'; '.join(told)}"


def begin(parts: tuple[Part, ...], before: Noted) -> Learned | None:
    """Return what counts; None where nothing is mixed.

    Args:
        before: what the checkpoint says that the run goes on from.
    """
    if not parts:
        return None
    sums = np.array([before.get(part.name, (0, 0)) for part in parts], dtype=np.int64)
    return Learned(parts, sums[:, 0], sums[:, 1])


def _shares(sums: np.ndarray) -> np.ndarray:
    """Return what each sum is of all, float64 (K,)."""
    found: np.ndarray = sums / max(int(sums.sum()), 1)
    return found
