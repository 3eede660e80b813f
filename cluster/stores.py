"""Stores behind a URI, or folders of a disk, as pyarrow opens them: opened, shown to people, asked again."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

ATTEMPTS = 3
PAUSE_S = 1.0
Result = TypeVar("Result")


def opened(place: str) -> tuple[Any, str]:
    """Return the file system of a URI or a path, and what stands before the names of its files there.

    Raises:
        OSError, ValueError, NotImplementedError: pyarrow opens no such URI.
    """
    from pyarrow import fs

    if "://" in place:
        return fs.FileSystem.from_uri(place)
    return fs.LocalFileSystem(), str(Path(place).absolute())


def shown(place: str) -> str:
    """Return a URI without its query, a user's name or a password; a path as it is. Pure.

    What stands before the @ of abfs:// is the container, and its password.
    """
    scheme, mark, rest = place.partition("://")
    if not mark:
        return place
    host, slash, path = rest.partition("?")[0].partition("/")
    user, _, name = host.rpartition("@")
    container = user.partition(":")[0] if scheme.lower().startswith("abfs") else ""
    return f"{scheme}://{container}{'@' if container else ''}{name}{slash}{path}"


def joined(place: str, *names: str) -> str:
    """Return a URI, or a path, of what lies below another one; a URI's query stays at its end. Pure."""
    path, mark, query = place.partition("?") if "://" in place else (place, "", "")
    return "/".join((path.rstrip("/"), *names)) + mark + query


def repeated(call: Callable[[], Result]) -> Result:
    """Call until it succeeds, three times at most; what is not there is not asked for again."""
    for attempt in range(1, ATTEMPTS):
        try:
            return call()
        except FileNotFoundError:
            raise
        except OSError as error:
            print(f"the store failed, trying again: {error}", flush=True)
            time.sleep(PAUSE_S * attempt)
    return call()
