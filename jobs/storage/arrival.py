"""What says on a node that its copy of a run's folder is complete, and who waits for it (jobs/storage/courier.py)."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from cluster.errors import UserError

ARRIVES_S = 600.0
"""So long a worker waits for its node's copy, data included, without any sign of it."""


def drivers(folder: Path, token: str) -> Path:
    """Return the file in the driver's own folder: whoever sees it shares the folder with the driver."""
    return folder / f".here-{token}"


def here(folder: Path, token: str, node: str) -> Path:
    """Return the file that says that a node's copy of a run's folder is complete, what workers need besides too."""
    return folder / f".here-{token}-{node}"


def failed(folder: Path, token: str, node: str) -> Path:
    """Return the file that says why a node's copy cannot be completed."""
    return folder / f".failed-{token}-{node}"


def this_node() -> str:
    """Return the id of the Ray node that this process is on."""
    import ray

    return str(ray.get_runtime_context().get_node_id())


def await_copy(folder: Path, token: str, node: str | None = None, say: Callable[[str], object] = print) -> None:
    """Return when this node's copy of the run's folder is complete, what else workers need too.

    Args:
        node: id of the Ray node that this is; None: to be asked.

    Raises:
        UserError: it does not come.
    """
    began, said, node = time.monotonic(), False, node or this_node()
    while not (here(folder, token, node).exists() or drivers(folder, token).exists()):
        waited = time.monotonic() - began
        if (why := failed(folder, token, node)).exists():
            raise UserError(f"storage: this node could not get what the job needs: {why.read_text(encoding='utf-8')}")
        if waited > ARRIVES_S:
            raise UserError(
                f"storage: what the job keeps for its workers did not come to {folder} on this node within "
                f"{ARRIVES_S / 60:.0f} minutes: see the job's log for what its courier says"
            )
        if waited > 2 and not said:
            say("waiting for the job's data to come to this node")
            said = True
        time.sleep(0.05)
