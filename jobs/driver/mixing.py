"""What a run takes from each source of a mixture: refused where it is too much, said, and noted in MLflow. Pure."""

from __future__ import annotations

from typing import Any

from jobs.data.mixture import Mixed, Part, shares
from jobs.data.prepare import Prepared
from jobs.spec import JobSpec
from jobs.worker import by_source
from jobs.worker.evaluate import sample


def too_often(spec: JobSpec, prepared: Prepared, steps: int) -> str | None:
    """Say which source a run of so many steps would see more often than its `max_epochs`; None where there is none."""
    for number, (part, rows) in enumerate(_taken(spec, prepared, steps)):
        if part.max_epochs is not None and rows > part.max_epochs * part.rows:
            most = _most_steps(spec, prepared, steps, number, part)
            return (
                f"data.mixture: {_length(spec, steps)} would see source {part.name!r} {rows / part.rows:.3g} times "
                f"({rows:,} rows of its {part.rows:,}), and its max_epochs is {part.max_epochs:g}: "
                f"{'at most training.steps: ' + str(most) if most else 'not even one step'} keeps to it; or give it "
                "less weight, more data or more max_epochs"
            )
    return None


def said(spec: JobSpec, prepared: Prepared, steps: int) -> list[str]:
    """Say what a run of so many steps takes from each source; nothing where it mixes none."""
    found = _taken(spec, prepared, steps)
    asked = shares([part.weight for part, _ in found]) if found else []
    told = [
        f"source {part.name}: {float(100 * share):.4g} % of rows, {rows / part.rows:.3g} passes over its "
        f"{part.rows:,} rows"
        for (part, rows), share in zip(found, asked, strict=True)
    ]
    training = spec.training
    if found and training is not None and training.epochs is not None:
        counted = f"{prepared.train_rows:,} rows of all sources together"
        told.append(f"training.epochs {training.epochs:g} counts by the {counted}: {steps} steps")
    return told


def params(spec: JobSpec, prepared: Prepared, steps: int) -> dict[str, Any]:
    """Return what MLflow is told of each source before the run begins: what was asked for, and what that comes to."""
    found = _taken(spec, prepared, steps)
    asked = shares([part.weight for part, _ in found]) if found else []
    return {
        f"mixture.{part.name}": {"share": float(share), "rows": part.rows, "passes": float(f"{rows / part.rows:.4g}")}
        for (part, rows), share in zip(found, asked, strict=True)
    }


def measured(spec: JobSpec, prepared: Prepared) -> list[str]:
    """Say of how many rows the held-out loss of each source is, and of which there is none; nothing of no mixture."""
    if not prepared.mixture or not prepared.eval_rows:
        return []
    found = prepared.held_out()
    if not found:
        return ["the held-out loss of each source is not measured: the rows of data.eval are of none of them"]
    drawn = sample(prepared.eval_rows, spec.data.eval_max_rows, spec.data.split_seed)
    counted = {source.name: 0 for source in prepared.mixture} | by_source.counts(drawn, found)
    told = ", ".join(f"{name} {count:,} rows" for name, count in counted.items() if count)
    none = ", ".join(name for name, count in counted.items() if not count)
    why = f"; of none, since none of its held-out rows is measured: {none}" if none else ""
    return [f"eval_loss/NAME, the held-out loss of each source, is of: {told}{why}"]


def _length(spec: JobSpec, steps: int) -> str:
    training = spec.training
    epochs = training.epochs if training else None
    return f"training.steps {steps}" if epochs is None else f"training.epochs {epochs:g} is {steps} steps, which"


def _taken(spec: JobSpec, prepared: Prepared, steps: int) -> list[tuple[Part, int]]:
    """Return each source with how many rows a run of so many steps takes from it."""
    parts = prepared.sources(spec)
    if not parts or spec.training is None:
        return []
    order = Mixed(parts, spec.training.seed)
    return list(zip(parts, order.counts(steps * spec.training.global_batch_size), strict=True))


def _most_steps(spec: JobSpec, prepared: Prepared, steps: int, number: int, part: Part) -> int:
    """Return the most steps, fewer than `steps`, that see a source no more often than its `max_epochs`."""
    assert part.max_epochs is not None
    fits, too_many = 0, steps
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        enough = _taken(spec, prepared, middle)[number][1] <= part.max_epochs * part.rows
        fits, too_many = (middle, too_many) if enough else (fits, middle)
    return fits
