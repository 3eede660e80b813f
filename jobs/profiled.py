"""A profile: a job's first steps as its workers take them, recorded by operator, and nothing else of the job.

It has a run and a folder of its own each time, beside those of the job: what the job has saved is not touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cluster.errors import UserError
from cluster.names import check_name
from jobs.spec import JobSpec

WARM_UP = 4
"""Steps that are not recorded: in the first two ZeRO stage 3 finds out what it will need when and FLOPs are counted, in
the third bytes are, and by the fourth a compiler is done."""
KEPT = 200
"""So many of the costliest operators a table holds."""
SHOWN = 20
"""So many of them are printed."""


@dataclass(frozen=True)
class Operator:
    """What calls of one operator on inputs of the same shapes came to, on one rank."""

    name: str
    shapes: str
    """Of its tensors, such as `16x256 256x64`; a scalar has none."""
    calls: int
    self_cpu_ms: float
    """Without the operators that it calls."""
    self_gpu_ms: float
    """What the kernels took that it started; 0 without a GPU."""


@dataclass(frozen=True)
class Profile:
    """What one rank's table says."""

    steps: int
    self_cpu_ms: float
    """Of all operators."""
    self_gpu_ms: float
    operators: Sequence[Operator]
    """The costliest, first of all by what they took of a GPU."""

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)

    @staticmethod
    def of(values: dict[str, Any]) -> Profile:
        """Return what `as_dict` has made a dictionary of."""
        return Profile(**{**values, "operators": [Operator(**operator) for operator in values["operators"]]})


def of(spec: JobSpec, steps: int) -> JobSpec:
    """Return the spec of a profile: under a name of its own, always a new run, and no model to register.

    Raises:
        UserError: the job trains nothing, or has too few steps.
    """
    if spec.phase not in ("pretrain", "finetune"):
        hint = "; profile the spec of one of its trials" if spec.phase == "sweep" else ""
        raise UserError(f"phase {spec.phase} has no training steps of its own that could be profiled{hint}")
    assert spec.training is not None
    if spec.training.steps is not None:
        check_length(steps, spec.training.steps)
    changes = {
        "name": check_name("a profile's name", f"{spec.name}-profile"),
        "register_": None,
        "checkpoint": spec.checkpoint.model_copy(update={"resume": "never"}),
    }
    return spec.model_copy(update=changes)


def last_step(steps: int) -> int:
    """Return how many steps a profile takes that records so many."""
    return WARM_UP + steps


def check_length(steps: int, of_job: int) -> None:
    """Refuse to record more steps than there are.

    Raises:
        UserError: the job has fewer.
    """
    if last_step(steps) > of_job:
        most = of_job - WARM_UP
        way_out = f"record {most} (--steps {most})" if most > 0 else f"give it {last_step(1)} steps or more"
        raise UserError(
            f"the job has {of_job} steps, and a profile takes {WARM_UP} to warm up and {steps} to record: {way_out}"
        )


def text(profile: Profile, most: int = SHOWN) -> str:
    """Return the table of the costliest operators, by lines."""
    on_gpu = profile.self_gpu_ms > 0
    total = profile.self_gpu_ms if on_gpu else profile.self_cpu_ms
    heading = ("share", *(["GPU ms"] if on_gpu else []), "CPU ms", "calls", "operator", "shapes")
    lines = [heading]
    for each in profile.operators[:most]:
        share = (each.self_gpu_ms if on_gpu else each.self_cpu_ms) / total if total else 0.0
        gpu = [f"{each.self_gpu_ms:.1f}"] if on_gpu else []
        lines.append((f"{share:.1%}", *gpu, f"{each.self_cpu_ms:.1f}", str(each.calls), each.name, each.shapes))
    widths = [max(len(line[column]) for line in lines) for column in range(len(heading))]
    rows = ["  ".join(_aligned(line, widths)).rstrip() for line in lines]
    left = len(profile.operators) - most
    return "\n".join([*rows, *([f"and {left} cheaper ones in the table's file"] if left > 0 else [])])


def _aligned(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Pad cells: the last two columns are words, the others numbers."""
    words = len(widths) - 2
    return [
        cell.ljust(width) if column >= words else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(line, widths, strict=True))
    ]
