"""What a spool holds: lines of metrics, and which of them the server still needs."""

import json
import math
import os
import posixpath
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from pydantic import NonNegativeInt, TypeAdapter

_NOT_IN_NAMES = re.compile(r"[^\w\-. :/]")


@dataclass(frozen=True)
class Record:
    """One spooled line: the metrics of one step of one writer."""

    step: int
    metrics: dict[str, float]
    time_ms: int
    source: str
    """Name of the spool file without its ending, such as `rank-0`."""


class Point(NamedTuple):
    """One value of one metric."""

    key: str
    value: float
    time_ms: int
    step: int


def encode(step: int, metrics: dict[str, float], time_ms: int) -> bytes:
    # NaN and infinity are no JSON: spelled as strings every reader survives them, and float() understands them.
    numbers = ((key, float(value)) for key, value in metrics.items())
    values = {key: number if math.isfinite(number) else str(number) for key, number in numbers}
    return json.dumps({"step": int(step), "time_ms": time_ms, "metrics": values}).encode() + b"\n"


@dataclass
class Cursor:
    """What has been sent: the position in each file and the last step of each metric."""

    offsets: dict[str, NonNegativeInt] = field(default_factory=dict)
    last_step: dict[str, int] = field(default_factory=dict)
    not_finite: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def load(path: Path) -> "Cursor":
        """Read a cursor. Without a readable one everything is sent again, which the server recognises."""
        try:
            return TypeAdapter(Cursor).validate_json(path.read_bytes(), strict=True)
        except (OSError, ValueError):
            return Cursor()

    def save(self, path: Path) -> None:
        """Write the cursor atomically."""
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(self.__dict__), encoding="utf-8")
        partial.replace(path)


def read_records(directory: Path, offsets: dict[str, int], limit: int) -> tuple[list[Record], dict[str, int]]:
    """Return complete lines after `offsets` until they hold `limit` metrics, and the offsets after them."""
    records: list[Record] = []
    after = dict(offsets)
    room = limit
    for path in sorted(directory.glob("*.jsonl")):
        for record, end in _lines(path, after.get(path.name, 0)):
            if room <= 0:
                return records, after
            after[path.name] = end
            if record is not None:
                records.append(record)
                room -= len(record.metrics)
    return records, after


def _lines(path: Path, offset: int) -> Iterable[tuple[Record | None, int]]:
    """Yield the record of each complete line, None for an unreadable one, and the offset after it."""
    with path.open("rb") as stream:
        if offset > os.fstat(stream.fileno()).st_size:
            offset = 0  # another file under the same name: steps that were sent are recognised
        stream.seek(offset)
        for line in stream:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield _decode(line, path.stem), offset


def _decode(line: bytes, source: str) -> Record | None:
    try:
        raw = json.loads(line)
        metrics = {metric_name(key): float(value) for key, value in raw["metrics"].items()}
        return Record(int(raw["step"]), metrics, int(raw["time_ms"]), source)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def metric_name(name: str) -> str:
    """Return the closest name that MLflow takes: one refused name would refuse its whole batch."""
    clean = posixpath.normpath(_NOT_IN_NAMES.sub("_", name)).lstrip("/")
    return clean.replace("..", "_")[:250]


def points_to_send(records: Iterable[Record], cursor: Cursor) -> list[Point]:
    """Return the finite points that are new to `cursor`, and note them, and what is not finite, in it."""
    points: list[Point] = []
    for record in records:
        for key, value in record.metrics.items():
            if record.step <= cursor.last_step.get(key, -1):
                continue
            cursor.last_step[key] = record.step
            if math.isfinite(value):
                points.append(Point(key, value, record.time_ms, record.step))
            else:
                cursor.not_finite.setdefault(key, f"{value} at step {record.step}")
    return points
