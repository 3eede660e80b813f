"""A user's own code on its way to the cluster: the small text files of the folder that holds the spec.

A job gets them as a folder of its own (`copied`), Ray's working directory. A served model keeps them inside its
deployment (`pack`, `unpack`): Ray drops a package when the last process that was started with it has ended, and a
replica that is lost with its node must find its code all the same.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster import shadows
from cluster.errors import UserError

SUFFIXES = (".py", ".json", ".yaml", ".yml", ".jinja")
LARGEST_BYTES = 1 << 20
"""Larger files are data, and stay where they are."""
LARGEST_PACKED_BYTES = 16 << 20
DEPTH = 2
"""Folders below folders that are looked into."""


@contextmanager
def copied(folder: Path, also: Path | None = None, without: Path | None = None) -> Iterator[Path]:
    """Make a temporary folder with the small files of `folder`.

    Data stays where it is: this machine's cluster reads it in the spec's folder, elsewhere the spec names a path or
    URI that the nodes reach.

    Args:
        also: a file to copy whatever it is called, such as the spec.
        without: a file of `folder` to leave out.
    """
    with tempfile.TemporaryDirectory(prefix="tandem-code-") as target:
        for source in small_files(folder):
            if source != without:
                copy = Path(target) / source.relative_to(folder)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, copy)
        if also is not None:
            shutil.copy(also, Path(target) / also.name)
        yield Path(target)


def small_files(folder: Path) -> Iterator[Path]:
    """List the files of `folder` that may be code or configuration, in a fixed order.

    What would be imported in place of Tandem's own packages is left out (cluster/shadows.py).
    """
    return (path for path in _small(folder, DEPTH) if not shadows.hides(path.relative_to(folder)))


def _small(folder: Path, depth: int) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith((".", "__pycache__")):
            continue
        if entry.is_dir() and depth:
            yield from _small(entry, depth - 1)
        elif entry.suffix in SUFFIXES and entry.is_file() and entry.stat().st_size < LARGEST_BYTES:
            yield entry


def holds(folder: Path, module: str) -> bool:
    """Say whether `folder` has the module or package at the top of a dotted name."""
    top = folder / module.partition(".")[0]
    return top.is_dir() or top.with_name(f"{top.name}.py").is_file()


def pack(folder: Path) -> bytes:
    """Return the small files of `folder` as a zip archive: the same bytes for the same files.

    Raises:
        UserError: they are more than code and configuration would be.
    """
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in small_files(folder):
            name = path.relative_to(folder).as_posix()
            archive.writestr(zipfile.ZipInfo(name), path.read_bytes(), zipfile.ZIP_DEFLATED)
    content = packed.getvalue()
    if len(content) > LARGEST_PACKED_BYTES:
        raise UserError(
            f"the small files beside the spec are {len(content) >> 20} MiB packed, and at most "
            f"{LARGEST_PACKED_BYTES >> 20} can go into a deployment: give the spec and its code a folder of their own"
        )
    return content


def digest(packed: bytes) -> str:
    """Return what tells one archive from another."""
    return hashlib.sha256(packed).hexdigest()[:16]


def unpack(packed: bytes, folder: Path) -> None:
    """Write the files of an archive into an existing folder; none can land outside of it."""
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        archive.extractall(folder)
