"""Who a port belongs to: the gateways of one endpoint share it, and the kernel would let those of another one in, too.

Two endpoints that begin at the same moment both find a port free. With SO_REUSEPORT the kernel then deals connections
out to both, so that a client is answered by whichever it meets.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import tempfile
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger(__name__)


def take(host: str, port: int, owner: str) -> int | None:
    """Claim an address of this node for an endpoint, beside others of its processes; return what `os.close` gives back.

    None: there is no place to note claims. A claim ends with its process.

    Args:
        owner: the endpoint, the same in all of its processes.

    Raises:
        OSError: EADDRINUSE: another endpoint of this user has it.
    """
    try:
        file = os.open(_folder() / _name(host, port), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        logger.warning("it cannot be noted whose port %d is: %s", port, error)
        return None
    with suppress(BlockingIOError):  # others hold it: what they have noted stands
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(file, 0)
        os.pwrite(file, owner.encode(), 0)
    fcntl.flock(file, fcntl.LOCK_SH)  # not atomic after the other: whoever came between has noted himself
    if os.pread(file, 4096, 0) != owner.encode():
        os.close(file)
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
    return file


def _folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"tandem-ports-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} is another user's")
    return folder


def _name(host: str, port: int) -> str:
    """Name an address of this network: hosts in namespaces of one machine may share its folders."""
    network = "0"
    with suppress(OSError):
        network = str(os.stat("/proc/self/ns/net").st_ino)
    return f"{network}-{host.replace('/', '_')}-{port}"
