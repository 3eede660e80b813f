"""Faults on purpose: what a test injects, where, and the proof that it happened.

    TANDEM_FAULT="kill:rank=1:step=37:phase=step"     in the environment of `tandem jobs submit`, several with ";"

A worker that reaches such a point does the action once per run; a file in the run's folder, `faults/<the point>`, shows
that it did. Phases of a worker: `start` (before step 1 of an attempt), `step` (before the optimizer step), `save`
(while its shard is being written), `commit` (before the manifest is written), `saved` (once a checkpoint was begun),
`evaluate` (in an evaluation), `export` (at the run's last step), `exported` (the model is written and not yet checked).
With `:node=<id>` instead of a rank it happens to every rank on that node, and `kill-always` every time: a sick node.
`hold` never gives Python's lock back, and `deaf` blocks the kernel's alarm besides; `hog` takes memory until it is
killed; `damage` changes what was written; `pace` makes every step from there on take a tenth of a second longer;
`rows` notes which rows every step takes, in `rows/<rank>.jsonl`.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from jobs.run_folder import RunFolder

VARIABLE = "TANDEM_FAULT"
PACE_S = 0.1
PHASES = ("start", "step", "save", "commit", "saved", "evaluate", "export", "exported")


class InjectedError(RuntimeError):
    """What `raise` raises."""


@dataclass(frozen=True)
class Fault:
    """One action at one point."""

    action: str
    rank: int
    step: int
    phase: str
    node: str = ""

    def __str__(self) -> str:
        where = f"node{self.node}" if self.node else f"rank{self.rank}"
        return f"{self.action}-{where}-step{self.step}-{self.phase}"

    def meets(self, rank: int, node: str) -> bool:
        """Say whether it is meant for a rank on a node."""
        return self.node == node if self.node else self.rank == rank


def parse(text: str) -> list[Fault]:
    """Read `action:rank=…:step=…:phase=…`, several separated by semicolons.

    Raises:
        ValueError: an unknown action, key or phase.
    """
    return [_parse_one(part) for part in text.split(";") if part.strip()]


class Injector:
    """A worker's faults. Without any, a point costs a comparison."""

    def __init__(self, run: RunFolder, rank: int, text: str | None = None, node: str = "") -> None:
        wanted = os.environ.get(VARIABLE, "") if text is None else text
        self._faults = [fault for fault in parse(wanted) if fault.meets(rank, node)]
        self._run = run
        self._pace_s = 0.0
        self._rank = rank

    def inject(self, phase: str, step: int) -> str | None:
        """Do what is due at this point; return the name of an action that the caller has to do."""
        if self._pace_s and phase == "step":
            time.sleep(self._pace_s)
        for fault in self._faults:
            if fault.action == "pace" and step >= fault.step:
                self._pace_s = PACE_S
            elif fault.action != "rows" and (fault.phase, fault.step) == (phase, step) and self._first_time(fault):
                return _ACTIONS[fault.action](self._run)
        return None

    def record_rows(self, step: int, micro_batches: Iterable[Iterable[int]]) -> None:
        """Note that `step` takes these rows on this rank, where `rows` asks for it."""
        if any(fault.action == "rows" and step >= fault.step for fault in self._faults):
            rows = [int(row) for micro_batch in micro_batches for row in micro_batch]
            with self._run.rows_log(self._rank).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "rows": rows}) + "\n")

    def _first_time(self, fault: Fault) -> bool:
        try:
            descriptor = os.open(self._run.fault_marker(str(fault)), os.O_CREAT | os.O_EXCL)
        except FileExistsError:
            return fault.action.endswith("-always")
        os.close(descriptor)
        return True


def _parse_one(text: str) -> Fault:
    action, *pairs = text.strip().split(":")
    values = dict(pair.partition("=")[::2] for pair in pairs)
    unknown = values.keys() - {"rank", "step", "phase", "node"}
    phase = values.get("phase", "step")
    if action not in _ACTIONS or unknown or phase not in PHASES or "step" not in values:
        raise ValueError(
            f"{VARIABLE}: {text!r} is no fault; write one of {', '.join(_ACTIONS)}, then :rank=0:step=1 and "
            f":phase= one of {', '.join(PHASES)}"
        )
    return Fault(action, int(values.get("rank", 0)), int(values["step"]), phase, values.get("node", ""))


def _kill(run: RunFolder) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _freeze(run: RunFolder) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _sleep(run: RunFolder) -> None:
    while True:
        time.sleep(3600)


def _hold(run: RunFolder) -> None:
    """Search by a regular expression that takes for ever: no other thread of this process runs Python meanwhile."""
    re.match(r"(a|a)+$", "a" * 64 + "b")


def _deaf(run: RunFolder) -> None:
    """Do the same with the alarm blocked: nothing within this process can end it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    _hold(run)


def _hog(run: RunFolder) -> None:
    """Take memory, 16 MB at a time, and touch it."""
    taken = []
    while True:
        taken.append(bytearray(os.urandom(1 << 20) * 16))


def _raise(run: RunFolder) -> None:
    raise InjectedError("injected")


def _exhaust(run: RunFolder) -> None:
    raise MemoryError("injected: out of memory")


def _halt(run: RunFolder) -> None:
    run.request_stop()


def _nan(run: RunFolder) -> str:
    return "nan"


def _spike(run: RunFolder) -> str:
    return "spike"


def _damage(run: RunFolder) -> str:
    return "damage"


def damage(weights: Path) -> None:
    """Turn half of a file of weights round, byte by byte: it loads, and is another model."""
    weights.write_bytes(turned(weights.read_bytes()))


def turned(content: bytes) -> bytes:
    """Return such a file with half of it turned round. Pure."""
    begin = len(content) // 2
    return content[:begin] + content[begin:][::-1]


def _nothing(run: RunFolder) -> None:
    pass


_ACTIONS: dict[str, Callable[[RunFolder], str | None]] = {
    "kill": _kill,
    "kill-always": _kill,
    "freeze": _freeze,
    "sleep": _sleep,
    "hold": _hold,
    "deaf": _deaf,
    "hog": _hog,
    "raise": _raise,
    "raise-always": _raise,
    "memory": _exhaust,
    "stop": _halt,
    "nan": _nan,
    "spike": _spike,
    "damage": _damage,
    "pace": _nothing,
    "rows": _nothing,
}
