"""Stores behind a URI, or folders of a disk, as pyarrow opens them: opened, shown to people, asked again."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from cluster import pyarrow_internals

PATIENCE_S = 90.0
"""So long a store is asked again where nobody waits at a terminal: an outage of a minute is outlasted."""
ATTEMPTS = 3
"""So often a disk is asked: what it refuses thrice it goes on refusing."""
PAUSE_S = 1.0
LONGEST_PAUSE_S = 8.0
CONNECT_TIMEOUT_S = 5.0
REQUEST_TIMEOUT_S = 10.0
"""For S3. pyarrow has 1 and 3 seconds, and three tries: a store that is silent is given up after 34 s, not 10."""
Result = TypeVar("Result")
_FOR_GOOD = re.compile(
    # S3, as its client says it; GCS; Azure
    r"AWS Error (ACCESS_DENIED|INVALID_ACCESS_KEY_ID|INVALID_CLIENT_TOKEN_ID|SIGNATURE_DOES_NOT_MATCH|NO_SUCH_BUCKET"
    r"|MISSING_AUTHENTICATION_TOKEN|UNRECOGNIZED_CLIENT|INVALID_SIGNATURE)|HTTP status (301|40[01345])\b"
    r"|PERMISSION_DENIED|UNAUTHENTICATED"
    r"|AuthenticationFailed|AuthorizationFailure|AuthorizationPermissionMismatch|ContainerNotFound"
)
_CLIENTS = re.compile(r"AWS Error|google::cloud|GcsFileSystem|Azure|HTTP status \d{3}|HDFS")


def opened(place: str) -> tuple[Any, str]:
    """Return the file system of a URI or a path, and what stands before the names of its files there.

    Raises:
        OSError, ValueError, NotImplementedError: pyarrow opens no such URI.
    """
    from pyarrow import fs

    if "://" in place:
        files, base = fs.FileSystem.from_uri(place)
        if files.type_name == "s3":
            files = pyarrow_internals.with_timeouts(files, CONNECT_TIMEOUT_S, REQUEST_TIMEOUT_S)
        return files, base
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


def is_clients(error: BaseException) -> bool:
    """Say whether an error is of a store's client, not of a disk. Pure."""
    return isinstance(error, OSError) and error.errno is None and _CLIENTS.search(str(error)) is not None


def is_for_good(error: BaseException) -> bool:
    """Say whether an error will be there next time too: what was asked for is not there, or not allowed. Pure."""
    return isinstance(error, FileNotFoundError | PermissionError | FileExistsError) or (
        is_clients(error) and _FOR_GOOD.search(str(error)) is not None
    )


def repeated(
    call: Callable[[], Result],
    *,
    patience_s: float | None = None,
    pause_s: float | None = None,
    never: tuple[type[Exception], ...] = (),
    retried: type[Exception] = OSError,
) -> Result:
    """Call until it succeeds; what is not there, or not allowed, is not asked for again.

    Args:
        patience_s: so long a store's client may go on failing, else PATIENCE_S; anything else may ATTEMPTS times.
        pause_s: before the second call, more before each further one, and a random part of it less; PAUSE_S.
        never: errors that are raised at once.
        retried: the others that are not.
    """
    patience_s = PATIENCE_S if patience_s is None else patience_s
    began, attempt = time.monotonic(), 0
    while True:
        try:
            result = call()
        except never:
            raise
        except retried as error:
            attempt += 1
            pause = paused_s(attempt, PAUSE_S if pause_s is None else pause_s)
            left_s = began + patience_s - time.monotonic()
            if is_for_good(error) or (left_s < pause if is_clients(error) else attempt >= ATTEMPTS):
                raise
            if attempt == 1:
                limit = f"for up to {patience_s:.0f} s" if is_clients(error) else f"{ATTEMPTS - 1} times"
                print(f"the store failed, trying again {limit}: {error}", flush=True)
            time.sleep(pause)
        else:
            if attempt > 1:
                print(f"the store answers again after {time.monotonic() - began:.0f} s", flush=True)
            return result


def paused_s(attempt: int, first_s: float) -> float:
    """Return how long to wait after so many failures: those who fail together do not ask again together."""
    return min(LONGEST_PAUSE_S, first_s * 2 ** min(attempt - 1, 16)) * random.uniform(0.5, 1.0)
