"""Which files of a store a URI names: a file, a folder, or a glob."""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from cluster import stores
from cluster.errors import UserError
from cluster.stores import shown
from jobs.data import listing
from jobs.data.remote import HUB, Remote, opened_store, said

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
        path = _pinned(path) if store == HUB else path
        found, root = stores.repeated(lambda: _infos(files, base, path))
        kept, passed = _sorted_in(found, base, root)
        with ThreadPoolExecutor(ASKED_AT_A_TIME) as pool:
            return list(pool.map(partial(_remote, files, base, store), kept)), passed
    except UserError:
        raise
    except Exception as error:  # the hub's client raises many kinds
        raise UserError(f"data: cannot list {shown(store)}/{path}: {said(error)}") from error


def _pinned(path: str) -> str:
    """Return a path of the hub at the commit that its branch is at now, so that all of a job reads the same files."""
    from huggingface_hub import HfApi

    owner, name, *below = path.split("/")
    name, _, revision = name.partition("@")
    commit = HfApi().dataset_info(f"{owner}/{name}", revision=revision or None).sha
    return "/".join([owner, f"{name}@{commit}", *below])


def _hub_mark(path: str) -> str:
    """Return what the hub says a file's content is: its SHA-256, or of a small one Git's own digest of it."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    _, owner, name, *below = path.split("/")
    repository, _, commit = f"{owner}/{name}".partition("@")
    told = HfApi().get_paths_info(repository, "/".join(below), revision=commit, repo_type="dataset")
    (found,) = (file for file in told if isinstance(file, RepoFile))
    return str(found.lfs.sha256 if found.lfs else found.blob_id)


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
    mark = _hub_mark(info.path) if store == HUB else _mark(files, info)
    return Remote(store, info.path.removeprefix(base), info.size, mark)


def _mark(files: Any, info: Any) -> str:
    """Return what tells a file's content: its ETag, or else when it was changed."""
    with stores.repeated(lambda: files.open_input_file(info.path)) as file:
        told = {_text(key).lower(): _text(value) for key, value in (file.metadata() or {}).items()}
    if told.get("etag"):
        return told["etag"]
    if info.mtime_ns is None:
        raise UserError(
            f"data: the store says neither what {info.path} holds nor when it was changed: what was learned from could "
            "not be told from other data; download it"
        )
    return f"changed {info.mtime_ns}"


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("utf-8", "replace")
