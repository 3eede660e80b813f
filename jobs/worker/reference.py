"""What a model makes of encoded rows, kept beside them: a Ray task for each share of the files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from cluster.precision import Precision
from jobs.data import rows
from jobs.data.prepare import Prepared
from jobs.spec import JobSpec
from jobs.tasks import Columns, Task
from jobs.worker.evaluate import During, Say, unsaid, unwatched

MICRO_BATCH = 16


def write_share(
    spec: JobSpec,
    model_from: str,
    prepared: Prepared,
    precision: Precision,
    target: str,
    files: Sequence[str],
    during: During = unwatched,
    say: Say = unsaid,
) -> int:
    """Have a model make the task's reference columns of some files' rows; return of how many.

    Args:
        model_from: the model's directory or hub id.
        target: the folder that gets a file of each name; one that is there already is kept.
    """
    from jobs import noise
    from jobs.worker.export import DTYPES

    noise.quiet()
    torch.set_num_threads(max(1, int(spec.resources.cpus_per_worker)))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task = prepared.task(spec)
    model = task.load_model(Path(model_from), DTYPES[precision], spec.model.config).to(device)
    return sum(_write(task, model, Path(prepared.directory) / file, Path(target) / file, during) for file in files)


def _write(task: Task, model: torch.nn.Module, source: Path, target: Path, during: During) -> int:
    found = rows.Rows([source])
    if not target.is_file():
        partial = target.with_name(f".{target.name}.partial")
        rows.write(partial, columns_of(task, model, found, during))
        partial.rename(target)
    return len(found)


def columns_of(task: Task, model: torch.nn.Module, found: rows.Rows, during: During = unwatched) -> Columns:
    """Return the task's reference columns of N rows, each (N, …), in batches that need no gradients."""
    parts: list[Columns] = []
    with torch.inference_mode():
        for start in range(0, len(found), MICRO_BATCH):
            with during("pass"):
                chosen = np.arange(start, min(start + MICRO_BATCH, len(found)))
                parts.append(task.reference(model, found.take(chosen)))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
