"""Which files of a store a URI names: a file, a folder, or a glob."""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from jobs.data import listing
from jobs.data.remote import HUB, Remote, opened_store, said, shown

_URI = re.compile(r"(?P<place>[a-zA-Z][a-zA-Z0-9+.-]*://[^/?]*)/?(?P<path>.*?)(?P<query>\?[A-Za-z_]+=[^?/]*)?")
SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs", "hf")
ASKED_AT_A_TIME = 16


def is_uri(where: str) -> bool:
    """Tell whether a name is one of a file behind a URI: `hf://owner/name` is a data set instead."""
    if where.startswith("hf://"):
        return where.startswith(f"{HUB}/") and len(where.removeprefix(f"{HUB}/").strip("/").split("/")) > 2
    return "://" in where and not where.startswith("file://")


def check_scheme(uri: str) -> None:
    """Refuse a URI that nothing here reads, without asking anybody.

    Raises:
        UserError: names it, and what is read.
    """
    scheme = uri.partition("://")[0].lower()
    if scheme not in SCHEMES:
        raise UserError(
            f"data: {uri!r} is a URL that is not read; {', '.join(f'{each}://' for each in SCHEMES)} are, and files: "
            "download it, and name the file"
        )


def listed(uri: str) -> tuple[list[Remote], listing.Listing]:
    """Return the files that a URI names, in order, and what lies there that is no data.

    A path is taken as it is, else it is a glob; a folder stands for the files in it, and so does one that is matched.

    Raises:
        UserError: the store cannot be read.
    """
    check_scheme(uri)
    store, path = split(uri)
    files, base = opened_store(store)
    try:
        found, root = _infos(files, base, path)
        kept, passed = _sorted_in(found, base, root)
        with ThreadPoolExecutor(ASKED_AT_A_TIME) as pool:
            return list(pool.map(partial(_remote, files, base, store), kept)), passed
    except (OSError, ValueError) as error:
        raise UserError(f"data: cannot list {shown(store)}/{path}: {said(error)}") from error


def split(uri: str) -> tuple[str, str]:
    """Return the URI of a store (its query too), and the path in it."""
    if uri.startswith(f"{HUB}/"):
        return HUB, uri.removeprefix(f"{HUB}/").strip("/")
    found = _URI.fullmatch(uri)
    assert found is not None, "a URI has a scheme"
    return found["place"] + (found["query"] or ""), found["path"].strip("/")


def _infos(files: Any, base: str, path: str) -> tuple[list[Any], str]:
    """Return pyarrow's FileInfo of the files that a path names, and the folder from which they are told."""
    from pyarrow import fs

    (info,) = files.get_file_info([f"{base}{path}".rstrip("/")])
    if info.type == fs.FileType.File:
        return [info], path.rpartition("/")[0]
    pattern: Sequence[str] = ()
    if info.type != fs.FileType.Directory:
        parts = path.split("/")
        magic = next((at for at, part in enumerate(parts) if re.search(r"[*?[]", part)), None)
        if magic is None:
            return [], path
        path, pattern = "/".join(parts[:magic]), parts[magic:]
    folder = f"{base}{path}".rstrip("/")
    below = files.get_file_info(fs.FileSelector(folder, allow_not_found=True, recursive=True))
    found = [info for info in below if info.type == fs.FileType.File]
    return [info for info in found if _matches(info.path.removeprefix(folder).strip("/"), pattern)], path


def _matches(name: str, pattern: Sequence[str]) -> bool:
    """Tell whether a name, or a folder that it is in, matches a pattern; without one, all do."""
    parts = tuple(name.split("/"))
    return not pattern or any(listing.fits(parts[:end], tuple(pattern)) for end in range(1, len(parts) + 1))


def _sorted_in(found: list[Any], base: str, root: str) -> tuple[list[Any], listing.Listing]:
    """Return what is data, in the order of a folder of a disk, and a listing of what is not."""
    kept, passed = [], listing.Listing(root=Path("/") / root)
    for info in sorted(found, key=lambda info: info.path.split("/")):
        path = Path("/") / info.path.removeprefix(base)
        below = path.relative_to(Path("/") / root)
        alone = len(found) == 1
        if not alone and any(listing.hidden(Path(part)) for part in below.parts):
            passed.leave_out("hidden, or not data by its name", str(below))
        elif not alone and listing.is_about(path):
            passed.leave_out("about the data, not data", str(below))
        else:
            kept.append(info)
            passed.files.append(path)
    return kept, passed


def _remote(files: Any, base: str, store: str, info: Any) -> Remote:
    return Remote(store, info.path.removeprefix(base), info.size, _mark(files, info))


def _mark(files: Any, info: Any) -> str:
    """Return what tells a file's content: of the hub its digest, of an object its ETag, else when it was changed."""
    from pyarrow import fs

    if isinstance(files, fs.PyFileSystem):
        known = files.handler.fs.info(info.path)
        content = (known.get("lfs") or {}).get("sha256") or known.get("blob_id")
        if content:
            return str(content)
    elif not isinstance(files, fs.LocalFileSystem):
        with files.open_input_file(info.path) as file:
            told = {bytes(key).lower(): bytes(value) for key, value in (file.metadata() or {}).items()}
        if told.get(b"etag"):
            return told[b"etag"].decode("utf-8", "replace")
    if info.mtime_ns is None:
        raise UserError(
            f"data: the store says neither what {info.path} holds nor when it was changed: what was learned from could "
            "not be told from other data; download it"
        )
    return f"changed {info.mtime_ns}"
