"""One line per event in the job's log: readable as it stands, and parsed by `tandem jobs submit --follow`.

tandem: train 12/400 loss=5.123 tokens_per_second=5012 eta_s=41
tandem: result {"model": "models:/stdlib-lm/3", …}
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass, field
from typing import Any

_PREFIX = "tandem: "
_NUMBER = r"-?(?:nan|inf|[\d.]+(?:e[-+]?\d+)?)"
_PROGRESS = re.compile(rf"^tandem: ([a-z-]+) (\d+)/(\d+)((?: [^\s=]+={_NUMBER})*)\s*$")  # metrics: macro_f1, recall@5
_RESULT = re.compile(r"^tandem: result (\{.*\})\s*$")


@dataclass(frozen=True)
class Progress:
    """How far a phase of a job is."""

    phase: str
    done: int
    total: int
    values: dict[str, float] = field(default_factory=dict)


def report(phase: str, done: int, total: int, **values: float) -> None:
    """Print how far a phase is."""
    shown = "".join(f" {key}={value:.6g}" for key, value in values.items())
    print(f"{_PREFIX}{phase} {done}/{total}{shown}", flush=True)


def say(message: str) -> None:
    """Print a sentence about what happens."""
    # Names of files need not be UTF-8, and no output takes half a character.
    print(f"{_PREFIX}{message}".encode("utf-8", "backslashreplace").decode(), flush=True)


def result(values: dict[str, Any]) -> None:
    """Print what the job made, as one line of JSON."""
    print(f"{_PREFIX}result {json.dumps(values)}", flush=True)


def parse(line: str) -> Progress | dict[str, Any] | None:
    """Read a line back: Progress, the result's dictionary, or None for any other line."""
    if match := _PROGRESS.match(line):
        phase, done, total, rest = match.groups()
        pairs = (pair.split("=", 1) for pair in rest.split())
        return Progress(phase, int(done), int(total), {key: float(value) for key, value in pairs})
    if match := _RESULT.match(line):
        return json.loads(match.group(1))
    return None


class Throttle:
    """Let an event through at most every `interval_s` seconds."""

    def __init__(self, interval_s: float = 0.5) -> None:
        self._interval_s = interval_s
        self._next = 0.0

    def ready(self) -> bool:
        """Tell whether the interval has passed since the last time this was True."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + self._interval_s
        return True
