"""What happened to a worker group, and what to do about it. Pure: no clock, no cluster, no files.

    classify   the ranks' errors and what the group left behind → one Failure
    decide     the failure and those before it → retry, go back and leave a batch out, halve the micro-batch, or stop

When one rank dies, the others fail a moment later because its connection closed: such errors are consequences, and the
class is that of the error which cannot be one. Where there is none, jobs/deaths.py looks who is gone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import Any, Literal

from cluster.errors import UserError
from jobs.driver import storage

Kind = Literal[
    "hang", "bad data", "non-finite loss", "loss spike", "out of memory", "preempted", "node lost", "user code",
    "worker killed", "start-up", "storage",
]  # fmt: skip
Action = Literal["retry", "skip batch", "halve micro-batch", "exclude node", "stop"]

LONGEST_WAIT_S = 30.0
_BATCH: tuple[Kind, ...] = ("non-finite loss", "loss spike")
"""Failures of one batch, found before it was applied."""
_NODES_FAULT: tuple[Kind, ...] = ("worker killed", "start-up")
"""Failures that a sick node would explain. An error of user code follows the code."""
_CONSEQUENCES = re.compile(
    r"connection (closed|reset)|broken pipe|timed out waiting|socket|gloo|nccl|store|processgroup|rendezvous", re.I
)
_CLOSED = re.compile(r"connection (closed|reset)|broken pipe", re.I)
"""What is left of another rank's end."""
_MEMORY = re.compile(
    r"out of memory|OutOfMemory|MemoryError|oom-kill|running low on memory|memory usage threshold", re.I
)
_NODE = re.compile(r"node (has )?died|node .*(is|was) (dead|terminated)|node failure", re.I)
_DIED = re.compile(r"WorkerHealthCheck|ActorDied|ActorUnavailable|WorkerCrashed|RayActorError|RaySystemError", re.I)


@dataclass(frozen=True)
class RankError:
    """One rank's error: the names of its classes, most special first, what it says, and whether it is the user's."""

    types: tuple[str, ...]
    message: str
    preempted: bool = False
    for_user: bool = False
    of_storage: bool = False
    """A disk or a file system has failed (jobs/driver/storage.py)."""

    @staticmethod
    def of(error: BaseException) -> RankError:
        """Read an exception, and the one that Ray may have wrapped."""
        inner = getattr(error, "cause", None) or getattr(error, "health_check_failure", None) or error
        types = tuple(c.__name__ for c in (*type(inner).__mro__, *type(error).__mro__))
        return RankError(
            types,
            str(inner),
            preempted=bool(getattr(inner, "preempted", False)),
            for_user=isinstance(inner, UserError),
            of_storage=storage.has_failed(inner),
        )


@dataclass(frozen=True)
class Failure:
    """A failed attempt of the group."""

    kind: Kind
    step: int
    """The last step that was applied."""
    rank: int | None
    message: str
    node: str | None = None
    """Id of the node that the rank was on."""

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON takes."""
        return asdict(self)


@dataclass(frozen=True)
class Decision:
    """What follows from a failure."""

    action: Action
    reason: str
    wait_s: float = 0.0


@dataclass(frozen=True)
class Limits:
    """How much is put up with (JobSpec: `max_failures`, `failures`)."""

    max_failures: int = 3
    non_finite: Literal["stop", "skip"] = "stop"
    max_skipped: int = 10
    out_of_memory: Literal["halve", "stop"] = "halve"
    exclude_after: int = 2


def with_deaths(errors: Mapping[int, RankError], dead: Mapping[int, bool]) -> dict[int, RankError]:
    """Add the ranks whose process is gone and that could not say so themselves. Pure.

    Args:
        dead: such ranks, each with whether the kernel killed for memory on its node meanwhile.
    """
    found = dict(errors)
    for rank, for_memory in dead.items():
        error = found.get(rank)
        if error is not None and not _is_consequence(error) and not (for_memory and _kind(error) == "worker killed"):
            continue
        if for_memory:
            found[rank] = RankError(("OutOfMemoryError",), "out of memory: the kernel of its node killed the worker")
        else:
            found[rank] = RankError(("ActorDiedError",), "the worker's process is gone: it was killed")
    return found


def need_deaths(errors: Mapping[int, RankError]) -> bool:
    """Say whether the errors alone do not tell the cause: somebody died, or all of them follow from another's end."""
    return all(_is_consequence(error) or _kind(error) == "worker killed" for error in errors.values())


def classify(
    errors: Mapping[int, RankError],
    step: int,
    *,
    hung: bool = False,
    started: bool = True,
    lost: Sequence[int] = (),
) -> Failure:
    """Find what happened.

    Args:
        errors: by rank.
        step: the last step that was applied.
        hung: the watchdog of a rank has fired.
        started: the group had begun to train.
        lost: ranks whose nodes are gone; the others may have noticed it first.
    """
    ranked = sorted(errors.items(), key=lambda item: (_severity(item[1]), item[0]))
    if not ranked:
        return Failure("start-up", step, None, "the worker group could not be started")
    rank, error = ranked[0]
    kind = _kind(error)
    if lost and (kind == "worker killed" or _is_consequence(error)):
        return Failure("node lost", step, lost[0], error.message)
    if hung and kind in ("worker killed", "user code"):
        return Failure("hang", step, None, "no step was finished within the limit")
    if not started and kind == "worker killed":
        return Failure("start-up", step, rank, error.message)
    if kind == "user code" and _CLOSED.search(error.message):
        return Failure("worker killed", step, None, f"a worker went away, and none says which: {error.message}")
    return Failure(kind, step, rank, error.message)


def decide(
    failure: Failure, earlier: Sequence[Failure], limits: Limits, *, micro_batch: int = 1, room: bool = False
) -> Decision:
    """Choose what to do.

    Only failures without progress count against `max_failures`: a run of weeks may lose a node every day.

    Args:
        earlier: the failures of this run before this one.
        micro_batch: rows in one forward pass.
        room: the other nodes of the cluster can take the workers of the one that failed.
    """
    if failure.kind == "bad data":
        return Decision("stop", "it would fail the same way again")
    if failure.kind in _BATCH:
        skipped = sum(f.kind in _BATCH for f in earlier)
        if limits.non_finite == "stop":
            return Decision("stop", "failures.non_finite is `stop`; with `skip` the batch would be left out")
        if skipped >= limits.max_skipped:
            return Decision("stop", f"{skipped} batches were left out already (failures.max_skipped)")
        return Decision(
            "skip batch", f"back to the checkpoint before; the batch of step {failure.step + 1} is left out"
        )
    if failure.kind == "preempted":
        return Decision("retry", "a preemption was announced; it counts as no failure")
    in_vain = _without_progress(failure, earlier)
    if in_vain >= limits.max_failures:
        return Decision(
            "stop", f"failed {in_vain + 1} times at step {failure.step + 1}; max_failures is {limits.max_failures}"
        )
    wait_s = min(LONGEST_WAIT_S, 2.0**in_vain) if in_vain else 0.0
    if failure.kind == "out of memory":
        if limits.out_of_memory == "stop":
            return Decision("stop", "failures.out_of_memory is `stop`")
        if micro_batch > 1:
            return Decision("halve micro-batch", f"{micro_batch} → {micro_batch // 2} rows; the batch stays the same")
        return Decision("stop", "one row at a time does not fit either")
    on_node = _on_same_node(failure, earlier)
    if room and on_node >= limits.exclude_after:
        return Decision("exclude node", f"{on_node} failures in a row on node {failure.node}; others have room")
    return Decision("retry", f"retry {in_vain + 1} of {limits.max_failures}, from the newest checkpoint", wait_s)


def _on_same_node(failure: Failure, earlier: Sequence[Failure]) -> int:
    """Count the failures in a row, this one included, whose workers died on the same node."""
    if failure.node is None or failure.kind not in _NODES_FAULT:
        return 0
    others = (before for before in reversed(earlier) if before.kind != "preempted")
    return 1 + sum(1 for _ in takewhile(lambda f: f.node == failure.node and f.kind in _NODES_FAULT, others))


def _without_progress(failure: Failure, earlier: Sequence[Failure]) -> int:
    """Count the failures right before this one since when the run has not got any further."""
    count = 0
    for before in reversed(earlier):
        if before.kind in ("preempted", *_BATCH):
            continue
        if before.step < failure.step:
            break
        count += 1
    return count


def _kind(error: RankError) -> Kind:
    names = " ".join(error.types)
    if error.for_user:
        return "bad data"
    if error.of_storage:
        return "storage"
    if "NonFiniteLoss" in names:
        return "non-finite loss"
    if "LossSpike" in names:
        return "loss spike"
    if error.preempted:
        return "preempted"
    if _MEMORY.search(names) or _MEMORY.search(error.message):
        return "out of memory"
    if _DIED.search(names):
        return "node lost" if _NODE.search(error.message) else "worker killed"
    return "user code"


def _severity(error: RankError) -> int:
    """Order errors by how little they can be the consequence of another rank's."""
    kind = _kind(error)
    order: list[Kind] = [
        "bad data", "non-finite loss", "loss spike", "preempted", "out of memory", "storage", "node lost",
        "user code", "worker killed",
    ]  # fmt: skip
    return len(order) if _is_consequence(error) else order.index(kind)


def _is_consequence(error: RankError) -> bool:
    return _kind(error) == "user code" and bool(_CONSEQUENCES.search(error.message))
