"""Runs that ended while the server was away: what is needed to finish telling it, later and from anywhere.

<any folder>/<run>/spool/owner.json      the process that will end the run
                         ending.json     how the run ended, until the server knows
                         version.json    the model version that it made, until the server knows

A process that is killed notes nothing, nor does anybody on a machine that goes: a run whose owner is gone has failed.
"""

import json
import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from cluster import processes
from tracking import registry
from tracking.run import Run, Status
from tracking.spool import SpoolSender

FILE = "ending.json"
OWNER = "owner.json"
VERSION = "version.json"


@dataclass(frozen=True)
class Ending:
    """How a run ended, and what opens it if the server never heard of it."""

    key: str
    name: str
    status: Status
    params: Mapping[str, Any] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Version:
    """A model version that waits to be registered: what `registry.register` needs."""

    name: str
    directory: str
    alias: str | None = None


def own(spool: Path, if_gone: Ending) -> None:
    """Note that this process will end the run; should it be gone without a word, the run ended as `if_gone`."""
    spool.mkdir(parents=True, exist_ok=True)
    me = psutil.Process()
    owner = {
        "host": socket.gethostname(),
        "pid": me.pid,
        "started_at": me.create_time(),
        "born": processes.born(me.pid),
    }
    _write(spool / OWNER, {**owner, "if_gone": asdict(if_gone)})


def note(spool: Path, ending: Ending) -> None:
    """Note how the run of a spool ended; `settle` or `forget` removes the note."""
    spool.mkdir(parents=True, exist_ok=True)
    _write(spool / FILE, asdict(ending))


def postpone(spool: Path, version: Version) -> None:
    """Note a model version for `publish`: at the run's end, or when it is settled."""
    spool.mkdir(parents=True, exist_ok=True)
    _write(spool / VERSION, asdict(version))


def publish(spool: Path, run_id: str, tracking_uri: str | None = None) -> str | None:
    """Register the version that waits, if one does; return its URI. Repeating it makes no second version."""
    if not (spool / VERSION).exists():
        return None
    waiting = Version(**json.loads((spool / VERSION).read_text(encoding="utf-8")))
    directory = Path(waiting.directory)
    made = registry.register(waiting.name, directory, run_id=run_id, alias=waiting.alias, tracking_uri=tracking_uri)
    (spool / VERSION).unlink()
    return made.uri


def forget(spool: Path) -> None:
    """The server knows."""
    (spool / OWNER).unlink(missing_ok=True)
    (spool / FILE).unlink(missing_ok=True)


def pending(root: Path) -> list[Path]:
    """List the spools of the runs right below `root` whose end the server has not been told."""
    for path in root.glob(f"*/spool/{OWNER}"):
        owner = json.loads(path.read_text(encoding="utf-8"))
        if not path.with_name(FILE).exists() and _is_gone(owner):
            note(path.parent, Ending(**owner["if_gone"]))
    return sorted(path.parent for path in root.glob(f"*/spool/{FILE}"))


def _is_gone(owner: Mapping[str, Any]) -> bool:
    """Say whether a process of this machine has ended; of others nothing is known."""
    if owner["host"] != socket.gethostname():
        return False
    if owner.get("born"):  # by a clock that nobody sets; owners from before it was noted have none
        return processes.born(owner["pid"]) != owner["born"]
    try:
        return psutil.Process(owner["pid"]).create_time() != owner["started_at"]
    except psutil.NoSuchProcess:
        return True


def _write(path: Path, values: Mapping[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(values), encoding="utf-8")
    os.replace(partial, path)


def settle(spool: Path, tracking_uri: str | None = None, timeout_s: float = 60.0) -> int:
    """Send what is left of a spool, register what its run made, end the run as noted; return the records sent.

    Raises:
        ServerUnreachable: the server is still away; nothing is lost.
    """
    ending = Ending(**json.loads((spool / FILE).read_text(encoding="utf-8")))
    run = Run.open(ending.key, ending.name, params=ending.params, tags=ending.tags, tracking_uri=tracking_uri)
    sender = SpoolSender(spool, run, interval_s=0.05, batch_s=0.05)
    count = sender.unsent()
    left = sender.start().stop(timeout_s)
    if not left:
        publish(spool, run.run_id, tracking_uri)
        run.end(ending.status)
        forget(spool)
    return count - left
