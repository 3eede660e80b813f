"""The folder of a preparation that is not whole yet, and what of it another one can go on from.

storage/data/<digest>.partial/   lock                       held while a preparation works there
                                 layout                     digest of what decides its files besides <digest>
                                 surveys/train/000000.npz   what the first reading of each range says
                                 learned.json               digests of task/, once it is whole, and what was said of it
                                 finished/*.json            a record of each file of rows, with its digest
                                 train-00000.arrow …, task/

A preparation that was killed leaves it; the next one of the same data takes over what its records vouch for. One that
ends by an error of the user's leaves nothing.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from jobs.data.examples import BadRow
from jobs.data.file_digests import file_digest
from jobs.data.stream import Survey

LOCK, LAYOUT, LEARNED, SURVEYS, RECORDS, PULSES = "lock", "layout", "learned.json", "surveys", "finished", "pulses"
META = "meta.json"
"""What is written last, before the folder gets its name."""
_OF_SURVEY = ("size", "smallest", "can_be_cut", "empty", "unused", "cut_each", "uncut")


class Abandoned(BaseException):
    """Nobody waits for a preparation any more; what it has finished stays for the next one."""


@contextmanager
def folder_for(directory: Path) -> Iterator[Path]:
    """Yield the folder in which `directory` is prepared; it is removed at the end, unless the machine failed.

    Where another preparation works in it, or the storage knows no locks, it is one of this process's own.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    place = directory.with_name(f"{directory.name}.partial")
    lock = _locked(place)
    if lock is None:
        place = directory.with_name(f"{directory.name}.{os.getpid()}.partial")
    for name in (SURVEYS, RECORDS, PULSES, "task"):
        (place / name).mkdir(parents=True, exist_ok=True)
    try:
        yield place
    except BaseException as error:
        if lock is None or not _is_the_machines(error):
            shutil.rmtree(place, ignore_errors=True)
        raise
    else:
        if (place / META).exists():  # another one was faster
            shutil.rmtree(place, ignore_errors=True)
    finally:
        if lock is not None:
            os.close(lock)


def _locked(place: Path) -> int | None:
    """Lock a folder for this process; None where that cannot be done."""
    place.mkdir(exist_ok=True)
    lock = os.open(place / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.stat(place / LOCK).st_ino == os.fstat(lock).st_ino:  # it was not renamed meanwhile
            return lock
    except BlockingIOError:
        pass
    except OSError:  # no locks on this storage
        with suppress(OSError):
            (place / LOCK).unlink()
            place.rmdir()
    os.close(lock)
    return None


def _is_the_machines(error: BaseException) -> bool:
    """Tell an error that says nothing of the data: a full disk, a node that was lost, a job that has ended."""
    of_machine = isinstance(error, OSError | Abandoned | GeneratorExit)
    return of_machine or type(error).__module__.partition(".")[0] in ("ray", "concurrent")


def keep_if(place: Path, layout: str) -> None:
    """Keep what an earlier preparation left where its files are those of this one; else empty the folder.

    Args:
        layout: what decides them besides the digest: the ranges and their sizes.
    """
    digest = hashlib.sha256(layout.encode()).hexdigest()
    with suppress(OSError):
        if (place / LAYOUT).read_text(encoding="ascii") == digest:
            return
    _empty(place, (SURVEYS, RECORDS, "task"))
    write(place / LAYOUT, digest.encode())


def _empty(place: Path, folders: tuple[str, ...]) -> None:
    (place / LEARNED).unlink(missing_ok=True)
    for path in place.glob("*.arrow"):
        path.unlink()
    for name in folders:
        shutil.rmtree(place / name, ignore_errors=True)
        (place / name).mkdir()


def done(place: Path) -> None:
    """Remove what only a preparation that goes on needs."""
    for name in (SURVEYS, RECORDS, PULSES):
        shutil.rmtree(place / name)
    for name in (LEARNED, LAYOUT, LOCK):
        (place / name).unlink(missing_ok=True)
    for path in place.glob(".*.new"):  # a process that was killed left it
        path.unlink()


def write(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole, or not at all."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.new")
    aside.write_bytes(content)
    aside.replace(path)


def save_survey(path: Path, survey: Survey, bad: list[BadRow]) -> None:
    """Keep what the first reading of a range says."""
    said = {name: getattr(survey, name) for name in _OF_SURVEY}
    rows = {"bad": [asdict(row) for row in bad], "left_out": sorted(survey.left_out)}
    noted = np.frombuffer(json.dumps({**said, **rows}).encode(), dtype=np.uint8)
    aside = path.with_name(f".{path.stem}.{os.getpid()}.npz")
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(aside, contents=survey.contents, groups=survey.groups, answers=survey.answers, noted=noted)
    aside.replace(path)


def load_survey(path: Path) -> tuple[Survey, list[BadRow]]:
    """Read what `save_survey` kept."""
    with np.load(path) as file:
        noted = json.loads(file["noted"].tobytes())
        contents, groups, answers = (file[name] for name in ("contents", "groups", "answers"))
    bad = [BadRow(**row) for row in noted.pop("bad")]
    left_out, empty = frozenset(noted.pop("left_out")), tuple(noted.pop("empty"))
    return Survey(contents, groups, answers, left_out=left_out, empty=empty, **noted), bad


def hashes_in(path: Path, name: str) -> np.ndarray:
    """Read one kind of hashes of a range, uint64 (n,): contents, groups or answers."""
    with np.load(path) as file:
        found: np.ndarray = file[name]
    return found


def finished(place: Path, name: str) -> dict[str, Any] | None:
    """Return the record of a file of rows; None where there is none, or the file is not what it says."""
    try:
        record: dict[str, Any] = json.loads((place / RECORDS / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if record["digest"] and not ((place / name).is_file() and file_digest(place / name) == record["digest"]):
        return None
    return record


def keep_record(place: Path, name: str, record: Mapping[str, Any]) -> None:
    """Note what became of a chunk; its file is whole."""
    (place / RECORDS).mkdir(exist_ok=True)
    write(place / RECORDS / f"{name}.json", json.dumps(record).encode())


def learned(place: Path) -> list[str] | None:
    """Return what was said when the task had learned; None where what it learned is not there as it was.

    Then nothing is kept that was encoded by it.
    """
    try:
        noted = json.loads((place / LEARNED).read_text(encoding="utf-8"))
        if noted["files"] == _digests(place / "task"):
            notes: list[str] = noted["notes"]
            return notes
    except (OSError, ValueError):
        pass
    _empty(place, (RECORDS, "task"))
    return None


def learned_at(place: Path) -> int:
    """Return what changes when the task has learned anew: the time of its note, in ns; 0 where there is none."""
    with suppress(OSError):
        return (place / LEARNED).stat().st_mtime_ns
    return 0


def keep_learned(place: Path, notes: list[str]) -> None:
    """Note that what the task learned is whole."""
    write(place / LEARNED, json.dumps({"files": _digests(place / "task"), "notes": notes}).encode())


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): file_digest(path) for path in files}
