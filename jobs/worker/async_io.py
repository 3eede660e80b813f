"""What reads and writes swap files on NVMe: an extension that DeepSpeed builds with a compiler, once on each node.

Its build takes minutes, so the driver has it built before workers start (jobs/driver/swap_build.py); a worker on a node
that has come later builds it itself.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import torch

from cluster.errors import UserError
from jobs.worker import deepspeed_internals, extension_locks

VARIABLE = "TORCH_EXTENSIONS_DIR"


def folder(given: str | None, host: str) -> Path:
    """Return where this machine builds: homes may be shared, and a lock's owner is seen on its own machine only. Pure.

    Args:
        given: what the variable says, which may be this function's answer already.
    """
    root = Path(given) if given else Path.home() / ".cache" / "tandem" / "torch_extensions"
    mine = f"{host}-py{sys.version_info.major}{sys.version_info.minor}-torch{torch.__version__}"
    return root if root.name == mine else root / mine


def ready() -> None:
    """Build the extension on this machine, or load it; what a killed build has left locked is unlocked.

    Raises:
        UserError: libaio or a compiler is not there.
    """
    host = socket.gethostname()
    where = folder(os.environ.get(VARIABLE), host)
    where.mkdir(parents=True, exist_ok=True)
    os.environ[VARIABLE] = str(where)
    for lock in extension_locks.remove_stale(where):
        print(f"removed {lock}: the build that held it is dead", flush=True)
    try:
        built = deepspeed_internals.load_async_io()
    except RuntimeError as error:
        raise UserError(
            f"training.deepspeed.offload: nvme: what reads and writes swap files cannot be built on {host}: {error}"
        ) from error
    if not built:
        raise UserError(
            f"training.deepspeed.offload: nvme needs libaio on the node {host}: sudo apt-get install libaio-dev g++ "
            "ninja-build; or use offload: cpu"
        )
