"""What a job's log says of what was measured: one sentence for each phase."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jobs.spec import TrainingSpec
from jobs.worker.quantize import counted

MIB = 1 << 20


def evaluated(metrics: Mapping[str, float]) -> str:
    """Say what a model does on the held-out rows; `metrics` are by the names that the task gives them."""
    return f"held out: {', '.join(f'{key} {value:.4g}' for key, value in metrics.items())}"


def trained(evaluations: Mapping[str, Mapping[str, float]]) -> str:
    """Say what training has changed on the held-out rows: the evaluations `first` and `final`, as far as made."""
    before, after = evaluations.get("first", {}), evaluations.get("final", {})
    if not after:
        return "nothing was held out: what the model does on data that it has not seen is not known"
    changed = [f"{key} {f'{before[key]:.4g} → ' if key in before else ''}{value:.4g}" for key, value in after.items()]
    return f"held out: {', '.join(changed)}"


def passes(training: TrainingSpec, steps: int, rows: int) -> list[str]:
    """Say where a run sees its rows otherwise than its length lets one think: steps are whole batches."""
    batch, said = training.global_batch_size, []
    if rows < batch:
        said.append(
            f"a step takes training.global_batch_size {batch} rows and there are {rows}: it sees each of them "
            f"{'' if batch % rows == 0 else 'at least '}{batch // rows} times"
        )
    made = steps * batch / rows
    if training.epochs is not None and made > 1.5 * training.epochs:
        said.append(f"training.epochs {training.epochs:g} comes to {steps} whole steps: {made:.3g} passes")
    return said


def quantised(report: Mapping[str, Any]) -> str:
    """Say what was made smaller, by how much, and what it cost; `report` as jobs/worker/quantize.py returns it."""
    layers = report["layers"]
    left = f"; left as they are: {counted(layers['left'])}" if layers["left"] else ""
    sizes = f"{report['parent_bytes'] / MIB:.1f} → {report['bytes'] / MIB:.1f} MiB"
    loss = f"{report['parent_eval_loss']:.4g} → {report['eval_loss']:.4g}"
    if "loss_change" in report:
        loss += f" ({report['loss_change']:+.2%})"
    return (
        f"{layers['quantised']} of {layers['of']} linear layers quantised ({counted(layers['kinds'])}"
        f"{left}); weights {sizes}; held-out loss {loss}"
    )
