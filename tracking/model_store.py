"""A model's folder in an object store: put there whole, and fetched once a node with its digests checked.

    s3://bucket/runs/x/model/config.json, tandem.json, model.safetensors, …      the files, under their names
                             folder.json     written last: every file's size and SHA-256; without it there is no model
                             upload.json     while the upload is not finished: what it may have left there

    $TANDEM_HOME/cache/models/folder-<digest>/        the folder on a node, but for its weights: `weights.json` there
                                                      says where those are (cluster/weights_cache.py fetches them)
                              folder-<digest>.json    where it came from, and its folder.json

The digest of folder.json stands for the whole model: whoever has it from elsewhere (a version's tags in the registry)
is given these files or none. All of the cache may be removed when nothing is loaded from it.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster import store_uri, stored_weights, stores, weights_cache
from cluster.home import home
from cluster.stored_weights import Stored, StoredFile
from tracking import manifest
from tracking.errors import TrackingError
from tracking.folder_manifest import MANIFEST, StoredFolder
from tracking.store_folder import Folder, partial_of

UPLOADING = "upload.json"
SAID_AFTER_S = 2.0


@dataclass(frozen=True)
class _Cached:
    """Where a folder is on this node, or would be."""

    uri: str
    digest: str

    @property
    def path(self) -> Path:
        key = hashlib.sha256(f"{self.uri}\n{self.digest}".encode()).hexdigest()[:32]
        return home() / "cache" / "models" / f"folder-{key}"

    @property
    def note(self) -> Path:
        return self.path.with_suffix(".json")

    def found(self) -> Path | None:
        """Return the folder, where it is here and each of its files has its size."""
        try:
            noted = json.loads(self.note.read_text(encoding="utf-8"))
            files = StoredFolder.parsed(str(noted["folder"]), str(self.note)).here
        except (OSError, ValueError, KeyError, TypeError, TrackingError):
            return None
        whole = all(_size(self.path / name) == file.bytes for name, file in files.items())
        return self.path if whole and self.path.is_dir() else None


def fetched(uri: str, digest: str | None = None) -> Path:
    """Return a model's folder on this node; its large weights stay in the store until they are asked for.

    Args:
        digest: of the folder, where it is known from elsewhere; None: whatever is there now.

    Raises:
        UserError: there is none, a file is missing, damaged or another one, or the disk has no room.
    """
    uri = store_uri.checked(uri)
    if digest is not None and (here := _Cached(uri, digest).found()) is not None:
        return here
    there = Folder(uri)
    folder = _read(there, digest)
    cached = _Cached(uri, folder.digest)
    cached.path.parent.mkdir(parents=True, exist_ok=True)
    with weights_cache.alone(cached.path.with_suffix(".lock"), there.shown()):
        return cached.found() or _fetch(there, folder, cached)


def portable(folder: Path) -> str:
    """Return what names a folder on every node, for `here`: where it was fetched from, or its path."""
    try:
        noted = json.loads(folder.with_suffix(".json").read_text(encoding="utf-8"))
        reference = _Cached(str(noted["uri"]), str(noted["digest"]))
    except (OSError, ValueError, KeyError, TypeError):
        return str(folder)
    return f"{reference.uri}#{reference.digest}" if reference.path == folder.absolute() else str(folder)


def here(reference: str) -> Path:
    """Return the folder that `portable` named, perhaps on another node: fetched, where it lies in a store.

    Raises:
        UserError: as `fetched`.
    """
    if not store_uri.is_store(reference):
        return Path(reference)
    uri, _, digest = reference.partition("#")
    return fetched(uri, digest or None)


def located(place: str) -> Path | None:
    """Return the folder of a model that another one names: as `here`, and None for a hub id.

    Raises:
        UserError: as `fetched`.
    """
    return here(place) if store_uri.is_store(place) or Path(place).is_absolute() else None


def is_here(reference: str) -> bool:
    """Say whether `here` has nothing to fetch, and neither have the weights: the store is not asked."""
    uri, _, digest = reference.partition("#")
    folder = _Cached(uri, digest).found() if store_uri.is_store(reference) else Path(reference)
    return folder is not None and weights_cache.is_here(folder)


def shown(reference: str) -> str:
    """Return where `here` has a folder from, for people. Pure."""
    return stores.shown(reference.partition("#")[0]) if store_uri.is_store(reference) else reference


def verify(uri: str, digest: str) -> Path:
    """Read a model in its store whole, and compare each file with its digest; return the folder on this node.

    Raises:
        UserError: one is missing or another one.
    """
    there = Folder(store_uri.checked(uri))
    for name, file in _read(there, digest).here.items():
        there.check(name, file, there.digest(name))
    folder = fetched(uri, digest)
    stored_weights.verify(folder)
    return folder


def _read(there: Folder, digest: str | None) -> StoredFolder:
    """Return what is said of the folder in the store.

    Raises:
        UserError: it says nothing, or is another one than the digest stands for.
    """
    text = there.read(MANIFEST)
    if text is None:
        raise TrackingError(
            f"no {MANIFEST} at {there.shown()}: no model was put there whole. Put one there with `tandem tracking "
            "upload FOLDER URI`"
        )
    folder = StoredFolder.parsed(text, there.shown(MANIFEST))
    if digest is not None and folder.digest != digest:
        raise TrackingError(
            f"{there.shown()} holds another model than was registered (SHA-256 of {MANIFEST} {folder.digest[:12]}, "
            f"not {digest[:12]}): bring that back, or register what is there now as a new version"
        )
    return folder


def _fetch(there: Folder, folder: StoredFolder, cached: _Cached) -> Path:
    """Fetch all but the weights; the caller is the only process of this node that does."""
    for left in cached.path.parent.glob(f".{cached.path.name}.*.partial"):  # of processes that were killed
        shutil.rmtree(left, ignore_errors=True)
    _check_room(there, folder, cached.path.parent)
    partial = partial_of(cached.path)
    progress, files = _Progress(there.shown(), sum(file.bytes for file in folder.here.values())), folder.here
    try:
        partial.mkdir()
        for name, file in sorted(files.items()):
            target = partial / name
            target.parent.mkdir(parents=True, exist_ok=True)
            there.check(name, file, there.fetch(name, target, progress.add))
        if folder.weights:
            _stored(there.uri, folder).write(partial)
        _note(cached, folder)
        if cached.path.exists():  # something of it was removed
            shutil.rmtree(cached.path, ignore_errors=True)
        partial.rename(cached.path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return cached.path


def _stored(uri: str, folder: StoredFolder) -> Stored:
    """Return what `weights.json` says of weights that lie beside the folder's other files in the store."""
    store, name = store_uri.split(uri)
    files = {
        each: StoredFile(file.bytes, file.sha256, file.elements or 0) for each, file in sorted(folder.weights.items())
    }
    return Stored(store, name, files)


def _note(cached: _Cached, folder: StoredFolder) -> None:
    noted = {"uri": cached.uri, "digest": cached.digest, "folder": folder.text}
    partial = cached.note.with_name(f".{cached.note.name}.{secrets.token_hex(4)}.partial")
    partial.write_text(json.dumps(noted) + "\n", encoding="utf-8")
    partial.replace(cached.note)


def _check_room(there: Folder, folder: StoredFolder, disk: Path) -> None:
    needed, free = sum(file.bytes for file in folder.here.values()), shutil.disk_usage(disk).free
    if needed > free:
        raise TrackingError(
            f"{needed / 1e9:.3g} GB of {there.shown()} do not fit in {disk}, which has {free / 1e9:.3g} GB free: "
            f"remove {disk.parent}, whose contents are fetched again when they are wanted, or set TANDEM_HOME to a "
            "folder on a larger disk"
        )


class _Progress:
    """Says how far a transfer is, where it takes longer than two seconds."""

    def __init__(self, what: str, total: int, verb: str = "fetching") -> None:
        self._what, self._total, self._verb, self._done = what, total, verb, 0
        self._next = time.monotonic() + SAID_AFTER_S

    def add(self, count: int) -> None:
        self._done += count
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + weights_cache.SAID_EVERY_S
            _say(f"{self._verb} {self._what}: {self._done / 1e6:,.1f} of {self._total / 1e6:,.1f} MB")


def put(folder: Path, uri: str) -> str:
    """Bring a model's folder to a store, and return its digest. Doing it again changes nothing.

    Weights that lie in a store already stay where they are. What `tandem.json` lists is compared with it on the way.

    Raises:
        UserError: another model is there, or files that no unfinished upload left; the folder is no whole model; or
            the store does not take it.
    """
    there = Folder(store_uri.checked(uri))
    what = _described(folder)
    if (text := there.read(MANIFEST)) is not None and text != what.text:
        raise TrackingError(
            f"{there.shown()} holds another model already, which is never overwritten: name another folder"
        )
    found = there.sizes()
    _begin(there, what, found, is_complete=text is not None)
    progress = _Progress(there.shown(), sum(file.bytes for file in what.files.values()), "uploading to")
    for name, file in sorted(what.files.items()):
        if found.get(name) != file.bytes or there.digest(name) != (file.bytes, file.sha256):
            there.send(folder / name, name, progress.add)
            sent = there.digest(name)
            there.check(name, file, sent, f"{folder / name} changed while it was uploaded, or the store did")
        else:
            progress.add(file.bytes)
    there.write(MANIFEST, what.text)
    if there.read(MANIFEST) != what.text:
        raise TrackingError(f"{there.shown()}: another model was put there at the same time: name another folder")
    there.forget(UPLOADING)
    return what.digest


def _begin(there: Folder, what: StoredFolder, found: Mapping[str, int], is_complete: bool) -> None:
    """Note what the upload will write; refuse files there that no upload did.

    Raises:
        UserError: there are such files.
    """
    if is_complete:
        return
    left = _names_of(there.read(UPLOADING))
    strange = sorted(set(found) - left - {UPLOADING, MANIFEST})
    if strange:
        raise TrackingError(
            f"{there.shown(strange[0])} is there{f', and {len(strange) - 1} more files' if len(strange) > 1 else ''}, "
            "and no upload of Tandem's left it: name a folder that is empty"
        )
    there.write(UPLOADING, json.dumps({"files": sorted(left | set(what.files))}) + "\n")


def _names_of(text: str | None) -> set[str]:
    try:
        return {str(name) for name in json.loads(text or "{}").get("files", [])}
    except (ValueError, AttributeError, TypeError):
        return set()


def _described(folder: Path) -> StoredFolder:
    """Digest a model's folder, and compare it with its `tandem.json` and `weights.json`.

    Raises:
        UserError: it is not what these say, or is no folder.
    """
    if not folder.is_dir():
        raise TrackingError(f"no model directory at {folder.absolute()}")
    elsewhere = stored_weights.read(folder)
    what = StoredFolder.of(folder, lazily=elsewhere is None, without={MANIFEST, UPLOADING})
    if not what.files:
        raise TrackingError(f"{folder.absolute()} holds no files")
    contract = manifest.read(folder).files if (folder / manifest.FILE_NAME).exists() else {}
    stored = dict(elsewhere.files) if elsewhere is not None else {}
    said = [(manifest.FILE_NAME, name, (file.bytes, file.sha256)) for name, file in contract.items()]
    said += [(stored_weights.FILE_NAME, name, (file.bytes, file.sha256)) for name, file in stored.items()]
    for by, name, expected in said:
        own = what.files.get(name)
        if own is not None and (own.bytes, own.sha256) != expected:
            raise TrackingError(f"{folder / name} is not what {by} says of it: export or copy the model again")
    return what.without(set(stored))


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _say(sentence: str) -> None:
    """Print to the log of this process; what commands answer is on the other stream."""
    print(sentence, file=sys.stderr, flush=True)
