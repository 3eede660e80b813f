"""Where `model.export` has the weights go: streamed to a store, read back, and named by the folder of their model.

    with elsewhere.begun(root, …) as place:         None without model.export; else a new folder of the store
        place.stream(name), …                       weights, as jobs/worker/weight_stream.py writes them
        place.name(directory, files)                weights.json: with the folder's rename the model has them

    <model.export>/<run>/<8 hex digits>/model-00001-of-00003.safetensors

Each attempt writes into a folder of its own, so that nothing is ever written over. Which ones a run has begun is noted
before (exports.json), and those that came to nothing are removed by the next attempt, or by the one that fails.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from cluster import stored_weights
from cluster.errors import UserError
from cluster.stored_weights import StoredFile
from cluster.stores import repeated
from jobs.checkpoint import resume
from jobs.checkpoint.store import CHUNK_BYTES, Store
from jobs.notes import DamagedNote, read, write
from jobs.run_folder import RunFolder
from jobs.worker import weight_files
from jobs.worker.export import WrongExport
from jobs.worker.fault_injection import turned
from jobs.worker.weight_files import WeightFiles

NOTE = "exports.json"


class StoreFailed(UserError):
    """The store does not take the weights."""

    exit_code = 1


class Elsewhere:
    """The folder of one export in a store."""

    def __init__(self, root: str, folder: str) -> None:
        self._root, self._folder = root, folder
        self._store = Store(root)

    def stream(self, name: str) -> AbstractContextManager[Any]:
        """Open a new file, which has a `write`; at the context's end it is stored."""
        return self._store.stream(f"{self._folder}/{name}")

    def again(self, name: str) -> None:
        """Remove what a write that failed has left, so that the file can be written again."""
        with suppress(OSError):
            self._store.remove_files(self._folder, name)

    def digest(self, name: str) -> str:
        """Return the SHA-256 (hex) of what is read back."""
        return self._store.digest(f"{self._folder}/{name}").sha256

    def locate(self, name: str = "") -> str:
        """Return where a file is, for people."""
        return stored_weights.Stored(self._root, self._folder, {}).uri(name)

    def weights(self, directory: Path, names: Set[str]) -> Callable[[], WeightFiles]:
        """Return what opens the weights of a model's folder, to be read from here by ranges."""
        return lambda: WeightFiles(directory, self._opened, names)

    def _opened(self, path: Path) -> Opened:
        """Open a file; `path` is where it would be if it were in the model's folder."""
        return Opened(self._store.open(f"{self._folder}/{path.name}"))

    def name(self, directory: Path, files: Mapping[str, StoredFile]) -> None:
        """Say in the folder of a model that its weights are here."""
        stored_weights.Stored(self._root, self._folder, files).write(directory)

    def move(self, directory: Path) -> None:
        """Bring the weights of a model's folder here, read them back, and leave the folder without them.

        Raises:
            StoreFailed: the store does not take them.
            WrongExport: they are not read back as they were written.
        """
        files = {}
        for path in sorted(directory.glob("*.safetensors")):
            count = sum(entry.numel for entry in weight_files.entries(path).values())
            try:
                digest = repeated(lambda path=path: self._put(path))  # type: ignore[misc]
                found = self.digest(path.name)
            except OSError as error:
                raise failed(self.locate(), str(error)) from None
            if found != digest:
                raise WrongExport(f"{self.locate(path.name)} does not read back as it was written")
            files[path.name] = StoredFile(path.stat().st_size, digest, count)
        self.name(directory, files)
        for name in files:
            (directory / name).unlink()

    def _put(self, path: Path) -> str:
        self.again(path.name)
        digest = hashlib.sha256()
        with path.open("rb") as file, self.stream(path.name) as target:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
                target.write(chunk)
        return digest.hexdigest()

    def damage(self, name: str) -> None:
        """Change a file as the fault of a test does."""
        at = f"{self._folder}/{name}"
        self._store.write(at, [turned(self._store.read(at))])


class Opened:
    """A file of a store that is open to be read by ranges."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.size = int(file.size())

    def read_into(self, block: memoryview, offset: int) -> int:
        """Fill in what is there from `offset` on."""
        content = self._file.read_at(len(block), offset)
        block[: len(content)] = content
        return len(content)

    def close(self) -> None:
        """Close it."""
        self._file.close()


def failed(place: str, reason: str) -> StoreFailed:
    """Return the error of weights that could not be written. Pure."""
    return StoreFailed(
        f"model.export: the weights could not be written to {place}: {reason}. The trained state is kept as a "
        "checkpoint where one can be saved: mend that, and submit the same spec again to go on"
    )


@contextmanager
def begun(
    root: str | None, folder: RunFolder, first: bool, check_newest: Callable[[], object]
) -> Iterator[Elsewhere | None]:
    """Yield where the weights of this export go; None: into the folder of the model. Collective.

    What earlier attempts of the run have left in a store is removed; and this one, if it fails.

    Args:
        root: `model.export`.
        first: whether this rank removes; of several, one.
        check_newest: raises where a newer attempt works on the run, which may be writing.
    """
    if first and (root is not None or noted(folder)):
        check_newest()
        remove_left(folder)
    known = frozenset(noted(folder)) if first else frozenset[tuple[str, str]]()
    if root is None:
        yield None
    else:
        name = resume.gathered(f"{folder.key}/{secrets.token_hex(4)}")[0]
        if first:
            note(folder, [*noted(folder), (root, name)])
        try:
            yield Elsewhere(root, name)
        except BaseException:
            if first:
                remove_left(folder, {(root, name)})
            raise
    if first:
        remove_left(folder, known)


def remove_left(folder: RunFolder, among: Set[tuple[str, str]] | None = None) -> None:
    """Remove what exports of a run have left in a store, but for the weights that its model has.

    What cannot be removed stays noted for the next attempt, and is said.

    Args:
        among: only of these, as `noted` returns them: what is noted later, a newer attempt is writing; None: all.
    """
    stored = stored_weights.read(folder.model)
    kept = None if stored is None else (stored.store, stored.folder)
    left = []
    for each in noted(folder):
        if each == kept or (among is not None and each not in among):
            left.append(each)
            continue
        try:
            Store(each[0]).remove(each[1])
        except (OSError, ValueError) as error:
            left.append(each)
            place = stored_weights.Stored(*each, {}).uri()
            print(f"what an export has left in {place} could not be removed: {error}", flush=True)
    if left != noted(folder):
        note(folder, left)


def noted(folder: RunFolder) -> list[tuple[str, str]]:
    """Return what exports of a run have begun in a store, and not removed: the store, and the folder in it."""
    path = folder.path / NOTE
    try:
        return [(str(store), str(place)) for store, place in read(path).get("begun", ())]
    except (TypeError, ValueError) as error:
        raise DamagedNote(path, str(error)) from error


def note(folder: RunFolder, begun: Sequence[tuple[str, str]]) -> None:
    """Note them, before anything is written there."""
    write(folder.path / NOTE, {"begun": begun})
