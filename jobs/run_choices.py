"""What a run has chosen where its spec says `auto`: noted in its folder, so that it goes on as it began.

    zero.json           ZeRO stage, and with which offload     driver → driver of a later attempt
    micro_batches.json  rows, by the number of workers         first rank → first rank of a later group, driver

The precision is older and has its own note (jobs/run_folder.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.notes import DamagedNote, read, write


@dataclass(frozen=True)
class Choices:
    """Those of one run. `path` is its folder."""

    path: Path

    def zero_stage(self, offload: str) -> int | None:
        """Return the ZeRO stage that was chosen with this offload; None where nothing was, or with another.

        Raises:
            DamagedNote: the note holds something else.
        """
        values = read(path := self.path / "zero.json")
        if not values or values.get("offload") != offload:
            return None
        if (stage := values.get("zero_stage")) not in (0, 1, 2, 3) or isinstance(stage, bool):
            raise DamagedNote(path, f"it says stage {stage!r}, not 0, 1, 2 or 3")
        return int(stage)

    def keep_zero_stage(self, stage: int, offload: str) -> None:
        """Note the ZeRO stage that was chosen, for attempts to come."""
        write(self.path / "zero.json", {"zero_stage": stage, "offload": offload})

    def micro_batches(self) -> dict[int, int]:
        """Return the rows of a micro-batch that were chosen, by the number of workers, in the order of choice.

        Raises:
            DamagedNote: the note holds something else.
        """
        values = read(path := self.path / "micro_batches.json")
        if not all(workers.isdigit() and isinstance(rows, int) and rows > 0 for workers, rows in values.items()):
            raise DamagedNote(path, f"it says {values}, not numbers of rows by numbers of workers")
        return {int(workers): rows for workers, rows in values.items()}

    def keep_micro_batch(self, workers: int, rows: int) -> None:
        """Note the rows of a micro-batch that were chosen for so many workers, for groups to come."""
        others = {of: chosen for of, chosen in self.micro_batches().items() if of != workers}
        write(self.path / "micro_batches.json", {**others, workers: rows})

    def found(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Return what was chosen so far, nested as in a spec.

        Args:
            asked: the spec, resolved.
        """
        training, found = asked.get("training") or {}, dict[str, Any]()
        if training.get("micro_batch_size") == "auto" and (rows := list(self.micro_batches().values())):
            found["micro_batch_size"] = rows[-1]
        if (deepspeed := _open(training.get("deepspeed"))) is not None:
            stage = self.zero_stage(deepspeed["offload"])
            found |= {} if stage is None else {"deepspeed": {"zero_stage": stage}}
        return {"training": found} if found else {}


def without_open(params: dict[str, Any]) -> dict[str, Any]:
    """Return a resolved spec without what is `auto` and chosen later: MLflow never changes a param. Pure."""
    training = params.get("training")
    if not training:
        return params
    kept = {key: value for key, value in training.items() if key != "micro_batch_size" or value != "auto"}
    if (deepspeed := _open(kept["deepspeed"])) is not None:
        kept["deepspeed"] = {key: value for key, value in deepspeed.items() if key != "zero_stage"}
    return {**params, "training": kept}


def merged(params: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings with what was found put in. Pure."""
    inner = {key: merged(params.get(key) or {}, value) for key, value in found.items() if isinstance(value, Mapping)}
    return {**params, **found, **inner}


def _open(deepspeed: Any) -> Mapping[str, Any] | None:
    """Return a section that leaves its stage open; None for others, and for the name of a JSON."""
    return deepspeed if isinstance(deepspeed, Mapping) and deepspeed.get("zero_stage") == "auto" else None
