"""What Tandem uses of pyarrow beside its public interfaces."""

from __future__ import annotations

from typing import Any

from cluster.internals import Internal

ENTRIES = (
    Internal(
        "pyarrow.fs.S3FileSystem.__reduce__",
        "its second part holds the options of a file system that a URI has opened: no URI can say a timeout",
        "an S3 server that is slow to begin its answer is given up after 3 seconds, three times",
        "FileSystem.from_uri takes connect_timeout and request_timeout for s3://",
    ),
)


def with_timeouts(files: Any, connect_s: float, request_s: float) -> Any:
    """Return a copy of an S3 file system that waits so long for a connection, and while nothing comes over it."""
    rebuild, (options, *rest) = files.__reduce__()[:2]
    return rebuild({**options, "connect_timeout": connect_s, "request_timeout": request_s}, *rest)
