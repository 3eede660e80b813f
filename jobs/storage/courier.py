"""A run's folder on every node of its job, where no folder is shared: kept as the driver's by a courier on each node.

    driver's node              other nodes
    folder of the run    ⇄     its copy, at the same path        couriers.py, Courier (an actor bound to its node)
    notes, requests      →     read by the workers there
    logs, pulses, spool, …  ←  written by the workers there

What workers wait for at their start, the node's data among it, is brought before the copy says that it is complete
(`.here-<token>-<node>`; a node that was lost and comes back is another node, to Ray and here, and begins anew).
Couriers ask for no CPU, and end with the driver. What a node has written in the second before it is lost, is lost too.
A courier notes how far it is; where it is lost without its node, another one is started, and goes on from there.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from jobs.storage.arrival import drivers, failed, here
from jobs.storage.changes import Change, Copy, listed

LOOK_S = 0.1
DRIVERS_OWN = (
    *("checkpoints", "model", "ray", "spool", "logs", "stacks", "pulses"),
    *("paces", "rows", "faults", "parts", "profile"),
)
"""Folders of the run's folder that are nothing to workers on other nodes."""


def is_taken_back(name: str) -> bool:
    """Say whether workers remove a file of the run's folder on purpose; what else is missing there, was lost. Pure."""
    return name in ("SAVE", "STOP") or name.startswith("pulses/")


def is_note(name: str) -> bool:
    """Say whether workers on all nodes read a file of the run's folder. Pure."""
    return name.partition("/")[0] not in DRIVERS_OWN and name != "guard.log"


@dataclass(frozen=True)
class Bring:
    """What a node needs besides the run's folder, and who brings it: a function with its arguments, run on the node."""

    function: Callable[..., object]
    arguments: tuple[Any, ...] = ()


class Courier:
    """The actor of one node."""

    def __init__(self, folder: str, token: str, node: str) -> None:
        self._folder, self._token, self._node = Path(folder), token, node
        self._copy = Copy(self._folder, lambda name: True)
        self._keeping = threading.Lock()
        self._note = self._folder / f".known-{token}-{node}"
        self._kept: dict[str, list[int]] | None = None

    def is_shared(self) -> bool:
        """Say whether this node's folder is the driver's: then nothing has to be told."""
        return drivers(self._folder, self._token).exists()

    def begin(self, changes: Sequence[Change], bring: Sequence[Bring], alive: Collection[str] = ()) -> None:
        """Make the copy what the driver's folder is, and have what workers need besides; then say that it is complete.

        Args:
            alive: the ids of the nodes that live.

        Raises:
            UserError: the folder cannot be made here, or is another living node's copy too.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._take_folder(alive)
            for left in (*self._folder.glob(".here-*"), *self._folder.glob(".failed-*")):
                left.unlink()
            for name in listed(self._folder):
                (self._folder / name).unlink(missing_ok=True)
            self._copy.apply(changes)
        except OSError as error:
            raise UserError(
                f"{self._folder} cannot be written on this node: {error.strerror or error}; set TANDEM_HOME to a "
                "folder that every node can write"
            ) from error
        self._copy.adopt()
        self._keep()
        try:
            for each in bring:
                each.function(*each.arguments)
        except Exception as error:  # whatever it is: workers here must not wait for it
            failed(self._folder, self._token, self._node).write_text(str(error), encoding="utf-8")
            raise
        here(self._folder, self._token, self._node).touch()

    def _take_folder(self, alive: Collection[str]) -> None:
        mark = self._folder / f".courier-{self._token}"
        owner = mark.read_text(encoding="ascii") if mark.exists() else self._node
        if owner != self._node and owner in alive:
            raise UserError(
                f"{self._folder} is one folder for two nodes ({owner[:8]} and {self._node[:8]}), and another one than "
                "the driver's: give each node a TANDEM_HOME of its own, or all of them the same one"
            )
        mark.write_text(self._node, encoding="ascii")

    def again(self, changes: Sequence[Change]) -> None:
        """Go on where a courier of this node was lost, beside workers that run.

        Args:
            changes: what the driver had told that one last, if it has not answered.

        Raises:
            UserError: it is not known how far that one was.
        """
        try:
            self._copy.restore(json.loads(self._note.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise UserError(f"what a courier has noted in {self._note} cannot be read: {error}") from error
        self.put(changes)

    def _keep(self) -> None:
        """Note how far this is, for one that is started when this one is lost."""
        with self._keeping:
            known = self._copy.known()
            if known != self._kept:
                aside = self._note.with_suffix(".new")
                aside.write_text(json.dumps(known), encoding="utf-8")
                aside.replace(self._note)
                self._kept = known

    def put(self, changes: Sequence[Change]) -> None:
        """Put what the driver has told into the copy."""
        self._copy.apply(changes)
        self._keep()

    def take(self, hold_s: float) -> list[Change]:
        """Return what has changed here; wait for it, up to `hold_s`. What was returned before has arrived."""
        self._keep()
        enough = time.monotonic() + hold_s
        while True:
            changes = self._copy.pending()
            if changes or time.monotonic() >= enough:
                return changes
            time.sleep(LOOK_S)
