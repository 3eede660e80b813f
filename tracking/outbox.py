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
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil
from pydantic import ConfigDict, TypeAdapter, ValidationError

from cluster import processes
from tracking import registry
from tracking.errors import TrackingError
from tracking.run import Run, Status
from tracking.spool import SpoolSender

FILE = "ending.json"
OWNER = "owner.json"
VERSION = "version.json"

Note = TypeVar("Note")


@dataclass(frozen=True)
class Ending:
    """How a run ended, and what opens it if the server never heard of it."""

    key: str
    name: str
    status: Status
    params: Mapping[str, Any] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    __pydantic_config__ = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Version:
    """A model version that waits to be registered: what `registry.register` needs."""

    name: str
    directory: str
    alias: str | None = None
    __pydantic_config__ = ConfigDict(extra="forbid")


class DamagedNote(TrackingError):
    """A note in a spool does not hold what it should: nobody may guess how the run ended."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} is damaged ({reason}): bring it back, or delete it and end the run in MLflow by hand")


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
    waiting = _made(spool / VERSION, Version, _read(spool / VERSION))
    where = waiting.directory
    made = registry.register(waiting.name, where, run_id=run_id, alias=waiting.alias, tracking_uri=tracking_uri)
    (spool / VERSION).unlink()
    return made.uri


def forget(spool: Path) -> None:
    """The server knows."""
    (spool / OWNER).unlink(missing_ok=True)
    (spool / FILE).unlink(missing_ok=True)


def is_noted(spool: Path) -> bool:
    """Say whether it is noted how the run of a spool ended: the server has not been told everything."""
    return (spool / FILE).exists()


def pending(root: Path) -> list[Path]:
    """List the spools of the runs right below `root` whose end the server has not been told.

    Those with a damaged note are among them: `settle` names it.
    """
    found = set(root.glob(f"*/spool/{FILE}"))
    for path in root.glob(f"*/spool/{OWNER}"):
        if path.with_name(FILE) in found:
            continue
        try:
            if not _is_gone(path, _read(path)):
                continue
            with suppress(OSError):  # storage that takes nothing: told from the owner's note all the same
                note(path.parent, ending_of(path.parent))
        except DamagedNote:
            pass
        found.add(path.with_name(FILE))
    return sorted(path.parent for path in found)


def ending_of(spool: Path) -> Ending:
    """Return how the run of a spool ended: as noted, or as its owner wanted it told should it be gone.

    Raises:
        DamagedNote: what is noted is no ending.
    """
    path = spool / FILE
    if path.exists():
        return _made(path, Ending, _read(path))
    return _made(spool / OWNER, Ending, _read(spool / OWNER).get("if_gone"))


def _is_gone(path: Path, owner: Mapping[str, Any]) -> bool:
    """Say whether the process that a note names, of this machine, has ended; of others nothing is known."""
    try:
        if owner["host"] != socket.gethostname():
            return False
        if owner.get("born"):  # by a clock that nobody sets; owners from before it was noted have none
            return processes.born(owner["pid"]) != owner["born"]
        return psutil.Process(owner["pid"]).create_time() != owner["started_at"]
    except psutil.NoSuchProcess:
        return True
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedNote(path, f"{type(error).__name__}: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedNote(path, str(error)) from error
    if not isinstance(found, dict):
        raise DamagedNote(path, "it holds no mapping")
    return found


def _made(path: Path, kind: type[Note], values: object) -> Note:
    """Return a note as what it stands for, every field of its type."""
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DamagedNote(path, f"{where}: {first['msg']}" if where else first["msg"]) from error


def _write(path: Path, values: Mapping[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(values), encoding="utf-8")
    os.replace(partial, path)


def settle(spool: Path, tracking_uri: str | None = None, timeout_s: float = 60.0) -> int:
    """Send what is left of a spool, register what its run made, end the run as noted; return the records sent.

    Raises:
        ServerUnreachable: the server is still away; nothing is lost.
        DamagedNote: how the run ended, or what it made, cannot be read; the run is left as it is.
    """
    ending = ending_of(spool)
    run = Run.open(ending.key, ending.name, params=ending.params, tags=ending.tags, tracking_uri=tracking_uri)
    sender = SpoolSender(spool, run, interval_s=0.05, batch_s=0.05)
    count = sender.unsent()
    left = sender.start().stop(timeout_s)
    if not left:
        publish(spool, run.run_id, tracking_uri)
        run.end(ending.status)
        forget(spool)
    return count - left
