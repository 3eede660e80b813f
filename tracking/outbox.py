"""Runs that ended while the server was away: what is needed to finish telling it, later and from anywhere.

<any folder>/<run>/spool/ending.json     how the run ended, until the server knows
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tracking.run import Run, Status
from tracking.spool import SpoolSender

FILE = "ending.json"


@dataclass(frozen=True)
class Ending:
    """How a run ended, and what opens it if the server never heard of it."""

    key: str
    name: str
    status: Status
    params: Mapping[str, Any] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)


def note(spool: Path, ending: Ending) -> None:
    """Note how the run of a spool ended; `settle` or `forget` removes the note."""
    spool.mkdir(parents=True, exist_ok=True)
    partial = spool / f"{FILE}.partial"
    partial.write_text(json.dumps(asdict(ending)), encoding="utf-8")
    os.replace(partial, spool / FILE)


def forget(spool: Path) -> None:
    """The server knows."""
    (spool / FILE).unlink(missing_ok=True)


def pending(root: Path) -> list[Path]:
    """List the spools of the runs right below `root` whose end the server has not been told."""
    return sorted(path.parent for path in root.glob(f"*/spool/{FILE}"))


def settle(spool: Path, tracking_uri: str | None = None, timeout_s: float = 60.0) -> int:
    """Send what is left of a spool and end its run as noted; return how many records were sent.

    Raises:
        ServerUnreachable: the server is still away; nothing is lost.
    """
    ending = Ending(**json.loads((spool / FILE).read_text(encoding="utf-8")))
    run = Run.open(ending.key, ending.name, params=ending.params, tags=ending.tags, tracking_uri=tracking_uri)
    sender = SpoolSender(spool, run, interval_s=0.05, batch_s=0.05)
    count = sender.unsent()
    left = sender.start().stop(timeout_s)
    if not left:
        run.end(ending.status)
        forget(spool)
    return count - left
