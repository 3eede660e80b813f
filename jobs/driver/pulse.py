"""End the ranks that give no sign of life and cannot end themselves: stopped by a signal, or deaf to the kernel's.

A rank writes its pulse whenever its watchdog has a new limit (jobs/worker/watchdog.py). The driver looks at the pulses:
one that stays the same for longer than it may, and MARGIN_S, belongs to a process that is killed on its node. The
group then starts again as after any other hang. Only the driver's clock counts.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from jobs import deaths
from jobs.run_folder import RunFolder

POLL_S = 2.0
MARGIN_S = 10.0
"""A rank that can end itself has done so within 3 s of its limit."""


class Sign(NamedTuple):
    """What a rank's pulse says."""

    node: str
    pid: int
    beats: int
    allowed_s: float


@dataclass
class Silence:
    """How long each pulse has been the same. Pure: no clock, no files."""

    since: dict[str, tuple[Sign, float]] = field(default_factory=dict)

    def overdue(self, signs: Mapping[str, Sign], now_s: float) -> list[str]:
        """Return the names of the pulses that have been the same for too long, each once.

        Args:
            signs: what each pulse says now, by the name of its file.
            now_s: of a clock that goes on evenly.
        """
        self.since = {name: entry for name, entry in self.since.items() if name in signs}
        found = []
        for name, sign in signs.items():
            before, since_s = self.since.get(name, (None, now_s))
            if before != sign:
                since_s = now_s
            elif now_s - since_s > sign.allowed_s + MARGIN_S:
                found.append(name)
                since_s = float("inf")
            self.since[name] = (sign, since_s)
        return found


def read(path: Path) -> Sign | None:
    """Return what a pulse says; None while it is being written, or when it is gone."""
    try:
        node, pid, count, allowed_s = path.read_text(encoding="ascii").split()
        return Sign(node, int(pid), int(count), float(allowed_s))
    except (OSError, ValueError):
        return None


def start(run: RunFolder, say: Callable[[str], None]) -> None:
    """Watch in the background, as long as this process lives."""
    threading.Thread(target=_watch, args=(run, say), name="tandem-pulse", daemon=True).start()


def _watch(run: RunFolder, say: Callable[[str], None]) -> None:
    silence = Silence()
    while True:
        time.sleep(POLL_S)
        paths = run.pulses()
        signs = {path.name: sign for path in paths if (sign := read(path)) is not None}
        overdue = silence.overdue(signs, time.monotonic())
        if overdue and not _is_writable(run):
            silence = Silence()  # nobody can give a sign there
            continue
        for path in paths:
            if path.name in overdue:
                _end(run, path, signs[path.name], say)


def _end(run: RunFolder, path: Path, sign: Sign, say: Callable[[str], None]) -> None:
    """Kill a rank, and leave a note where its stacks would be: that is what tells a hang from a death."""
    attempt, _, rank = path.name.rpartition("-rank-")
    state = deaths.state_of(sign.node, sign.pid)
    if state is None:  # it has ended in some other way; its pulse stayed
        path.unlink(missing_ok=True)
        return
    told = f"rank {rank} gives no sign of life (its process is {state}): it is ended"
    with contextlib.suppress(OSError), run.stacks(attempt, int(rank)).open("a", encoding="utf-8") as file:
        file.write(f"{told}\n")
    say(told)
    deaths.kill(sign.node, sign.pid)


def _is_writable(run: RunFolder) -> bool:
    probe = run.path / "pulses" / f"probe-{secrets.token_hex(4)}"
    try:
        probe.write_bytes(b".")
        probe.unlink()
    except OSError:
        return False
    return True
