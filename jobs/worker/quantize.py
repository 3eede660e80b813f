"""Phase `quantize`: int8 weight-only through torchao, with what it saved and what it cost."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from cluster.precision import Precision
from jobs.data.prepare import Prepared
from jobs.spec import JobSpec
from jobs.tasks import Task

SMALLER = 0.98
"""Of its parent's size a quantised model must have less than this share."""


def quantize(spec: JobSpec, parent: str, prepared: Prepared, precision: Precision, target: str) -> dict[str, float]:
    """Write the quantised model to `target` and return the comparison with its parent.

    Linear layers keep one scale per output row and int8 weights (symmetric, no calibration needed); embeddings and
    the head stay as they are, in the parent's own dtype. `precision` is what both are measured in.

    Returns:
        bytes, parent_bytes, eval_<metric> and parent_eval_<metric> on the same held-out rows, loss_change (relative),
        and forward_ms, parent_forward_ms (one row).
    """
    from jobs import noise

    noise.quiet()
    import torch
    import transformers
    from torchao.quantization import Int8WeightOnlyConfig

    from jobs.data.prepare import rows_of
    from jobs.worker.export import DTYPES

    torch.set_num_threads(max(1, int(spec.resources.cpus_per_worker)))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task = prepared.task(spec)
    held_out = rows_of(prepared, prepared.eval_files)

    before = task.load_model(Path(parent), DTYPES[precision]).to(device)
    task.prepare_model(before, held_out.columns)  # what it finds holds for the quantised one too
    report = {f"parent_{key}": value for key, value in _measure(spec, task, before, held_out, device).items()}
    settings = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    after = task.load_model(Path(parent), None, {"quantization_config": settings}).to(device)

    directory = Path(target)
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    after.save_pretrained(str(partial))  # type: ignore[operator]
    _check_smaller(partial, Path(parent))
    task.save(partial)
    # What is measured is what a server will load, not what is in memory now.
    report |= _measure(spec, task, task.load_model(partial, DTYPES[precision]).to(device), held_out, device)
    report["bytes"], report["parent_bytes"] = _weight_bytes(partial), _weight_bytes(Path(parent))
    report["loss_change"] = report["eval_loss"] / report["parent_eval_loss"] - 1
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)
    return report


def _measure(spec: JobSpec, task: Task, model: Any, rows: Any, device: Any) -> dict[str, float]:
    import numpy as np
    import torch

    from jobs.worker.evaluate import measure, to_device

    limit, seed = spec.data.eval_max_rows, spec.data.split_seed
    sums = measure(task, model, rows, limit=limit, seed=seed, micro_batch=16, device=device)
    measured = {f"eval_{key}": value for key, value in task.summarise(sums).items()}
    batch = to_device(task.collate(rows.take(np.zeros(1, dtype=np.int64))), device)
    with torch.inference_mode():
        durations = []
        for _ in range(5):
            began = time.perf_counter()
            task.loss(model, batch)
            durations.append(time.perf_counter() - began)
    return {**measured, "forward_ms": 1000 * sorted(durations)[2]}


def _check_smaller(directory: Path, parent: Path) -> None:
    """Refuse what saves nothing, and leave nothing of it: whoever registers it as int8 would believe otherwise.

    Raises:
        UserError: the linear layers that were found do not make up for their scales.
    """
    size, before = _weight_bytes(directory), _weight_bytes(parent)
    if not before or size < SMALLER * before:  # a hub id has no size here
        return
    shutil.rmtree(directory)
    raise UserError(
        f"phase quantize saves nothing on {parent}: {before:,.0f} bytes of weights would become {size:,.0f}. Only "
        "linear layers are quantised, not embeddings, convolutions or gpt2's Conv1D; serve the model as it is"
    )


def _weight_bytes(directory: Path) -> float:
    return float(sum(path.stat().st_size for path in directory.glob("*.safetensors")))
