"""A preparation by nodes that share no folder: what its tasks read and make is in an object store.

    <storage>/data/<digest>.partial/<layout>/surveys/train/000012.npz      what the first reading of a range says
                                             <learned>/task/…, learned.json
                                             <learned>/finished/<file>.json   a record of each file that is stored
              data/<digest>/<file less .arrow>.<12 digits of its SHA-256>.arrow

On the driver's node all is where it is in a storage that is a folder (jobs/data/unfinished.py), and goes to the store
besides; another node has in a folder of its own what it works on. A file of rows is named by its content, and a record
is written after its file, so that what is half written, or of another preparation, is taken by none. Whoever goes on
with a preparation that was killed, on whatever machine, finds the surveys, what the task learned, and the records.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster import stores
from cluster.errors import UserError
from jobs import progress
from jobs.checkpoint.store import Store
from jobs.data import stored, unfinished
from jobs.data.examples import Source
from jobs.data.stored import FOLDER
from jobs.data.unfinished import LEARNED, RECORDS, SURVEYS

AT_ONCE = 8
"""So many small files are brought at a time."""
LOOK_S = 60.0
"""So long a node is waited for that looks whether it sees files; a busy machine's first task takes ten seconds."""
Looks = Mapping[str, tuple[int, int]]
"""Size and time of change, in ns, of files, by their paths."""


def looks_of(source: Source) -> Looks:
    """Return how the files of a source that are on disks look here.

    Raises:
        OSError: one is not there.
    """
    paths = [single.origin for single in source.singles if "://" not in single.origin]
    return {path: _look(path) for path in paths}


def are_as(looks: Looks) -> bool:
    """Say whether files look so on this machine: what rsync, too, takes for the same file."""
    try:
        return all(_look(path) == look for path, look in looks.items())
    except OSError:
        return False


def _look(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


@dataclass(frozen=True)
class StoredWork:
    """The store's side of one preparation, for the driver and, by itself sent to them, for its tasks on any node."""

    uri: str
    """Of the storage."""
    name: str
    """Of the folder that is prepared."""
    node: str
    """The driver's Ray node."""
    layout: str = ""
    """Stands for what decides the files besides `name`, once that is known."""
    learned: str = ""
    """Stands for what the task learned, once it has."""
    known: frozenset[str] = frozenset()
    """The files of which the store has a record since before this preparation."""

    # -- the driver's ------------------------------------------------------------------------------------------------

    def laid_out(self, layout: str, place: Path) -> StoredWork:
        """Return this for files of a layout, and bring what an earlier preparation has stored of them to `place`."""
        found = replace(self, layout=hashlib.sha256(layout.encode()).hexdigest()[:16])
        store, names = Store(self.uri), Store(self.uri).tree(found._folder)
        _bring(store, found._folder, place, [name for name in names if name.startswith(f"{SURVEYS}/")])
        if not (place / LEARNED).is_file():
            whole = sorted(name.partition("/")[0] for name in names if name.endswith(f"/{LEARNED}"))
            for key in whole[:1]:
                own = [name.removeprefix(f"{key}/") for name in names if name.startswith(f"{key}/task/")]
                _bring(store, f"{found._folder}/{key}", place, [*own, LEARNED])
        return found

    def taught(self, place: Path) -> StoredWork:
        """Return this once the task has learned what is in `place`, which is stored."""
        said = (place / LEARNED).read_bytes()
        files = json.loads(said)["files"]
        found = replace(self, learned=hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16])
        store = Store(self.uri)
        names = set(store.tree(found._of_learned))
        if LEARNED not in names:
            for name in files:
                _put(store, f"{found._of_learned}/task/{name}", (place / "task" / name).read_bytes())
            _put(store, f"{found._of_learned}/{LEARNED}", said)
        noted = {Path(name).name.removesuffix(".json") for name in names if name.startswith(f"{RECORDS}/")}
        there = map(stored.file_of, store.tree(f"{FOLDER}/{self.name}"))  # somebody may have removed some
        return replace(found, known=frozenset(noted & set(there)))

    def has_survey(self, path: Path) -> None:
        """Have a survey that a task has made, perhaps elsewhere, in its place here.

        Raises:
            FileNotFoundError: it is not there any more: another preparation of the same data has come to its end.
        """
        if not path.is_file():
            _bring(Store(self.uri), f"{self._folder}/{SURVEYS}", path.parent.parent, [_of_survey(path)])

    def bring_rows(self, place: Path, files: Mapping[str, str]) -> None:
        """Have files of rows, by name and digest, in `place`: those that were made elsewhere are fetched."""
        missing = {name: digest for name, digest in files.items() if not (place / name).is_file()}
        stored.bring(Store(self.uri), self.name, missing, place)

    def bring_begun(self, place: Path, held_out: Mapping[str, str]) -> None:
        """Have what the task learned, and what is held out, in a folder of a node that is not the driver's.

        Raises:
            FileNotFoundError: it is not there any more: the preparation has come to its end.
        """
        store = Store(self.uri)
        (place / "task").mkdir(parents=True, exist_ok=True)
        if not (place / LEARNED).is_file():
            names = [name for name in store.tree(self._of_learned) if name.startswith("task/")]
            _bring(store, self._of_learned, place, [*names, LEARNED])
        self.bring_rows(place, held_out)

    def is_seen_by_all(self, source: Source) -> bool:
        """Ask all nodes whether they see the files of a source, if these are on a disk."""
        try:
            looks = looks_of(source)
        except OSError:  # whoever reads it says what is wrong
            return False
        return not looks or all(_asked_of_nodes(looks))

    # -- a task's, on any node ---------------------------------------------------------------------------------------

    def is_home(self) -> bool:
        """Say whether this is the driver's node."""
        return this_node() in ("", self.node)

    def own(self, place: Path) -> Path:
        """Return the folder that this node works in, what the task learned in it; the driver's works in `place`.

        Raises:
            FileNotFoundError: what the task learned is not stored any more: another preparation has come to its end.
        """
        if self.is_home():
            return place
        folder = self._away(place) / self.learned
        if self.learned and not (folder / "task").is_dir():
            store, aside = Store(self.uri), folder.with_name(f".{self.learned}.{os.getpid()}")
            shutil.rmtree(aside, ignore_errors=True)
            (aside / "task").mkdir(parents=True)
            names = store.tree(f"{self._of_learned}/task")
            store.read(f"{self._of_learned}/{LEARNED}")  # written last: without it, what is there may not be all
            _bring(store, f"{self._of_learned}/task", aside / "task", names)
            folder.mkdir(parents=True, exist_ok=True)
            try:
                os.rename(aside / "task", folder / "task")
            except OSError:  # another task of this node was faster
                assert (folder / "task").is_dir(), "what the task learned is brought once"
            shutil.rmtree(aside, ignore_errors=True)
        return folder

    def survey_file(self, path: Path, place: Path) -> Path:
        """Return where this node has a range's survey, or will have it; `path`: where the driver's has it."""
        return path if self.is_home() else self._away(place) / SURVEYS / _of_survey(path)

    def fetch_survey(self, path: Path) -> bool:
        """Have a survey where `survey_file` says, if it is stored; say whether it is there.

        Raises:
            OSError: the store does not answer.
        """
        if path.is_file():
            return True
        try:
            _bring(Store(self.uri), f"{self._folder}/{SURVEYS}", path.parent.parent, [_of_survey(path)])
        except FileNotFoundError:
            return False
        return True

    def keep_survey(self, path: Path) -> None:
        """Store a survey, unless it is stored."""
        store, name = Store(self.uri), f"{self._folder}/{SURVEYS}/{_of_survey(path)}"
        if not store.exists(name):
            _put(store, name, path.read_bytes())

    def finished(self, place: Path, name: str) -> dict[str, Any] | None:
        """Return the record of a file of rows that is stored, or is whole on the driver's node; None: there is none."""
        if name in self.known:
            with suppress(FileNotFoundError):  # another preparation of the same data has come to its end
                record: dict[str, Any] = json.loads(Store(self.uri).read(self._record(name)))
                return record
        record_here = unfinished.finished(place, name) if self.is_home() else None
        if record_here is not None:
            self.keep(place, name, record_here)
        return record_here

    def keep(self, place: Path, name: str, record: Mapping[str, Any]) -> None:
        """Store a file of rows that is whole in `place`, then its record; it stays on the driver's node alone."""
        store, path = Store(self.uri), place / name
        if record["digest"]:
            target = f"{FOLDER}/{self.name}/{stored.object_of(name, record['digest'])}"
            stores.repeated(lambda: store.write(target, stored.chunks(path)))
        _put(store, self._record(name), json.dumps(record).encode())
        if self.is_home():
            unfinished.keep_record(place, name, record)
        else:
            path.unlink(missing_ok=True)

    @property
    def _folder(self) -> str:
        return f"{FOLDER}/{self.name}.partial/{self.layout}"

    @property
    def _of_learned(self) -> str:
        return f"{self._folder}/{self.learned}"

    def _record(self, name: str) -> str:
        return f"{self._of_learned}/{RECORDS}/{name}.json"

    def _away(self, place: Path) -> Path:
        """Nodes of one machine may have one home: each has a folder of its own in it.

        Raises:
            UserError: it cannot be made on this node.
        """
        folder = place.parent / stored.away(self.name) / this_node()[:16] / self.layout
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{folder} cannot be written on the node {socket.gethostname()}: {error.strerror or error}; set "
                "TANDEM_HOME to a folder that every node can write"
            ) from error
        return folder


def this_node() -> str:
    """Return the Ray node that this process is on, "" for one that is not connected."""
    import ray

    return str(ray.get_runtime_context().get_node_id()) if ray.is_initialized() else ""


def _of_survey(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def _bring(store: Store, folder: str, place: Path, names: Iterable[str]) -> None:
    """Have small files of the store in a folder, the last one when the others are there; what is there stays."""

    def one(name: str) -> None:
        if not (place / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            unfinished.write(place / name, store.read(f"{folder}/{name}"))

    *first, last = [*names] or [""]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(one, first))
    if last:
        one(last)


def _put(store: Store, name: str, content: bytes) -> None:
    stores.repeated(lambda: store.write(name, [content]))


def _asked_of_nodes(looks: Looks) -> list[bool]:
    """Return for each other node whether files look there as here."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = this_node()
    asked = []
    for node in ray.nodes():
        if node["Alive"] and node["NodeID"] != here and node["Resources"].get("CPU"):
            bound = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked.append(ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=bound)(are_as).remote(looks))
    done, late = ray.wait(asked, num_returns=len(asked), timeout=LOOK_S) if asked else ([], [])
    if late:
        progress.say(f"{len(late)} nodes did not say within {LOOK_S:.0f} s whether they see the data")
    answers = [False] * len(late)
    for reference in done:
        try:
            answers.append(bool(ray.get(reference)))
        except ray.exceptions.RayError:  # it is lost
            answers.append(False)
    return answers
