"""A run's notes in an object store, kept there as they are in the folder of the run on the driver's node.

    <storage>/runs/<key>/status.json, failures.jsonl, spool/, logs/, …     as in jobs/run_folder.py
                         checkpoints/, model/, lease/                      written there by others

One process writes them: the one that has the run's lease (jobs/store_lease.py). Small files are stored within a second
or two of their change; those that grow, when they have grown by a tenth or for half a minute, since a store takes a
file whole only. While the store does not answer, everything is kept here, and tried again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import UserError
from jobs.checkpoint.store import Store
from jobs.storage.changes import GROWING, Look, listed

LOOK_S = 1.0
GROWN = 1.1
WAITS_S = 30.0
"""So long something may have been added to a file before it is stored anew."""
PATIENCE_S = 120.0
"""So long the end of a job waits for a store that does not answer."""
OF_OTHERS = ("checkpoints", "model", "lease", "ray", "pulses", "paces", "faults", "rows", "shards", "arrivals.beat")
"""Folders of a run that are stored by others, or are nothing to a later attempt."""


class NotKept(UserError):
    """What the job has noted could not be stored."""

    exit_code = 1


@dataclass(frozen=True)
class Stored:
    """A file as it was when it was stored."""

    look: Look
    at_s: float


def due(found: Mapping[str, Look], stored: Mapping[str, Stored], now_s: float, *, final: bool) -> list[str]:
    """Return which files are to be stored now, small ones that say how the run stands first. Pure.

    Args:
        found: how the files are.
        stored: how they were when they were stored last.
        final: all that has changed; else what grows may wait.
    """

    def is_due(name: str, look: Look) -> bool:
        before = stored.get(name)
        if before is None or final or not name.endswith(GROWING):
            return before is None or before.look != look
        grown = look.size > GROWN * before.look.size
        return before.look != look and (grown or now_s - before.at_s >= WAITS_S)

    wanted = [name for name, look in found.items() if name.partition("/")[0] not in OF_OTHERS and is_due(name, look)]
    return sorted(wanted, key=lambda name: (name.endswith(GROWING), name))


class Keeper:
    """Keeps one run's notes."""

    def __init__(
        self,
        place: str,
        folder: Path,
        say: Callable[[str], object] = print,
        is_mine: Callable[[], bool] = lambda: True,
    ) -> None:
        """Take the storage's URI and the run's folder here.

        Args:
            say: is told of a store that does not answer.
            is_mine: whether this process still has the run; asked before anything is stored.
        """
        self._store, self._folder, self._say, self._is_mine = Store(place), folder, say, is_mine
        self._prefix = f"runs/{folder.name}"
        self._stored: dict[str, Stored] = {}
        self._failing: str | None = None
        self._ending = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="tandem-keeper", daemon=True)

    def bring(self, *, newest: bool = False, own: Collection[str] = ()) -> None:
        """Make the folder here what is stored of the run; what an earlier attempt has left here is replaced.

        Args:
            newest: nobody has had the run since that attempt: what it has left here, perhaps while the store was away,
                stays, and is stored.
            own: files here that are this attempt's, whatever is stored under their names.

        Raises:
            OSError: the store does not answer.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        if newest:
            return  # what is stored and not here stays, too: it may have been lost here
        names = [name for name in self._names() if name not in own]
        for left in listed(self._folder).keys() - {*names, *own}:
            (self._folder / left).unlink(missing_ok=True)
        for name in names:
            path = self._folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self._store.read(f"{self._prefix}/{name}"))
        now = time.monotonic()
        self._stored = {name: Stored(look, now) for name, look in listed(self._folder).items() if name in set(names)}

    def _names(self) -> list[str]:
        """List the notes that are stored."""
        return [name for name in self._store.tree(self._prefix) if name.partition("/")[0] not in OF_OTHERS]

    def start(self) -> None:
        """Begin to store what changes."""
        self._thread.start()

    def settle(self, patience_s: float = PATIENCE_S) -> None:
        """Return when all that is in the folder now is stored.

        Raises:
            NotKept: the store does not take it.
        """
        enough = time.monotonic() + patience_s
        while (problem := self.look(final=True)) is not None:
            if time.monotonic() >= enough:
                raise NotKept(
                    f"what the run has noted could not be stored in {self._store.locate(self._prefix)}: {problem}; it "
                    f"is in {self._folder} on this node: mend that, and submit the same spec again on this node"
                )
            time.sleep(LOOK_S)

    def stop(self) -> None:
        """End; what has changed since `settle` is left."""
        self._ending.set()

    def _run(self) -> None:
        while not self._ending.wait(LOOK_S):
            self.look()

    def look(self, *, final: bool = False) -> str | None:
        """Store what is due, and remove what is gone; return why that did not work."""
        with self._lock:
            try:
                self._pass(final)
            except Exception as error:  # whatever a store's client throws: the notes wait here
                problem = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                if self._failing is None:
                    self._say(f"the storage does not take the run's notes, which wait here until it does: {problem}")
                self._failing = problem
                return problem
            if self._failing is not None:
                self._say("the storage takes the run's notes again")
                self._failing = None
            return None

    def _pass(self, final: bool) -> None:
        found = listed(self._folder)
        wanted, gone = due(found, self._stored, time.monotonic(), final=final), self._stored.keys() - found.keys()
        if (wanted or gone) and not self._is_mine():
            raise OSError("another job has the run, and its notes are the ones that count")
        for name in wanted:
            with suppress(FileNotFoundError):
                content = (self._folder / name).read_bytes()
                self._store.write(f"{self._prefix}/{name}", [content])
                self._stored[name] = Stored(found[name], time.monotonic())
        for name in gone:
            self._store.remove_file(f"{self._prefix}/{name}")
            del self._stored[name]
