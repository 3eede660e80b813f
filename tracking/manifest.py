"""The model contract, `tandem.json`: what jobs/ writes beside the weights and serve/ reads before it loads them."""

import hashlib
import os
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster import stored_weights
from cluster.names import check_name
from tracking.errors import TrackingError

FILE_NAME = "tandem.json"
FORMAT = 1
_CHUNK_BYTES = 1 << 20


class FileDigest(BaseModel):
    """Size and digest of one file of the model directory."""

    model_config = ConfigDict(frozen=True)

    bytes: int
    sha256: str


class DatasetRef(BaseModel):
    """The data a model learned from."""

    model_config = ConfigDict(frozen=True)

    name: str
    digest: str
    parts: dict[str, str] = {}
    """What decided the encoded rows: name of a part → digest; empty for a model that an older Tandem exported."""


class BaseRef(BaseModel):
    """The model that adapters belong to, which are kept apart from it."""

    model_config = ConfigDict(frozen=True)

    reference: str
    """As `parent`: a `models:/` URI, a directory or a hub id."""
    digest: str
    """SHA-256 (hex) of its weights and config.json, or the commit of a hub id."""


class ModelManifest(BaseModel):
    """What an exported model directory holds and where it came from."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    format: int = FORMAT
    name: str
    task: str
    architecture: str
    run_id: str | None = None
    parent: str | None = None
    """The model it was made from: a `models:/` URI or a directory."""
    base: BaseRef | None = None
    """Of adapters that were not merged: what they have to be put on. None: the model is whole."""
    dataset: DatasetRef | None = None
    spec_digest: str | None = None
    code: str | None = None
    """Digest of the code of a user's own task (jobs/tasks/own_code.py); None for Tandem's own, and for a model that an
    older Tandem exported."""
    precision: Literal["bf16", "fp32"] | None = None
    """What the job computed in; None for a model that an older Tandem exported."""
    evaluation: dict[str, float] = {}
    quantization: dict[str, Any] | None = None
    """For example `{"method": "int8-weight-only"}`; None for full precision."""
    sweep: dict[str, Any] | None = None
    """Of a model that a sweep chose: `sweep` (the run's key), `trial`, `values` by field, `metric`; None for others."""
    remarks: list[str] = []
    """What was found out about the model when it was trained or measured, in sentences."""
    created_at: str = Field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))
    """ISO 8601, UTC."""
    files: dict[str, FileDigest] = {}
    """Relative POSIX path → size and digest, of every file but `tandem.json`; `write` fills it in."""


def write(directory: Path, manifest: ModelManifest) -> ModelManifest:
    """Digest every file in `directory`, write `tandem.json` atomically and return the manifest as written."""
    check_name("model name", manifest.name)
    files = {name: digest_of(_inside(directory, name)) for name in _file_names(directory)}
    complete = manifest.model_copy(update={"files": files})
    partial = directory / f".{FILE_NAME}.partial"
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(complete.model_dump_json(indent=2) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(directory / FILE_NAME)
    return complete


def read(directory: Path, verify: bool = False) -> ModelManifest:
    """Read `tandem.json` and check that every file it lists is there with the right size.

    `verify` also compares digests, which reads every byte: weights load with a flipped bit without a word. Weights that
    lie in a store are there if `weights.json` names the same ones.
    Raises TrackingError that names the file at fault.
    """
    manifest = _parse(directory / FILE_NAME)
    for name, expected in manifest.files.items():
        _check_file(directory, name, expected, verify)
    return manifest


def _parse(path: Path) -> ModelManifest:
    try:
        manifest = ModelManifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise TrackingError(f"no {FILE_NAME} in {path.parent}: not a model that Tandem exported") from None
    except (OSError, ValidationError) as error:
        raise TrackingError(f"{path} is not readable as a model manifest: {error}") from error
    if manifest.format > FORMAT:
        raise TrackingError(f"{path} has format {manifest.format}, this Tandem reads up to {FORMAT}: update Tandem")
    return manifest


def _check_file(directory: Path, name: str, expected: FileDigest, verify: bool) -> None:
    path = _inside(directory, name)
    if not path.is_file():
        if _is_stored(directory, name, expected):
            return
        raise TrackingError(f"{path} is missing: {FILE_NAME} lists it; export or copy the model again")
    size = path.stat().st_size
    if size != expected.bytes:
        raise TrackingError(f"{path} has {size} bytes, {FILE_NAME} says {expected.bytes}: export or copy it again")
    if verify and digest_of(path) != expected:
        raise TrackingError(f"{path} is corrupt: its sha256 is not the one in {FILE_NAME}; export or copy it again")


def _is_stored(directory: Path, name: str, expected: FileDigest) -> bool:
    """Say whether a file of weights that is not here lies in a store, as the same one."""
    stored = stored_weights.read(directory)
    file = stored.files.get(name) if stored is not None else None
    return file is not None and (file.bytes, file.sha256) == (expected.bytes, expected.sha256)


def _inside(directory: Path, name: str) -> Path:
    """Return the path of `name`, refusing one that leaves the directory by `..`, an absolute path or a link."""
    pure = PurePosixPath(name)
    path = directory / pure
    if pure.is_absolute() or ".." in pure.parts or not path.resolve().is_relative_to(directory.resolve()):
        raise TrackingError(f"{name!r} in {directory} lies outside the model directory: refused")
    return path


def _file_names(directory: Path) -> list[str]:
    own = {FILE_NAME, f".{FILE_NAME}.partial"}
    names = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    return sorted(name for name in names if name not in own)


def digest_of(path: Path) -> FileDigest:
    """Return size and digest of a file, read in pieces."""
    sha256 = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            sha256.update(chunk)
        return FileDigest(bytes=stream.tell(), sha256=sha256.hexdigest())
