"""Phase `evaluate`, as each worker of the Ray Train group runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULT_FILE = "evaluation.json"


def evaluate_worker(config: dict[str, Any]) -> None:
    """Measure the model on this rank's share of the held-out rows; rank 0 writes the result into the run's folder."""
    import ray.train
    import ray.train.torch
    import torch

    from jobs import noise
    from jobs.evaluate import evaluate
    from jobs.prepare import Prepared, rows_of
    from jobs.spec import JobSpec
    from jobs.tasks import get

    noise.quiet()
    spec = JobSpec.model_validate(config["spec"])
    prepared = Prepared(**config["prepared"])
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    task = get(spec.task).load(prepared.task_directory, spec.task_options())
    model = task.load_model(Path(config["parent"])).to(device)

    def all_sum(*values: float) -> list[float]:
        vector = torch.tensor(values, dtype=torch.float64, device=device)
        torch.distributed.all_reduce(vector)
        return vector.tolist()

    metrics = evaluate(
        task,
        model,
        rows_of(prepared, prepared.eval_files),
        limit=spec.data.eval_max_rows,
        micro_batch=16,
        device=device,
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        all_sum=all_sum if context.get_world_size() > 1 else None,
    )
    if context.get_world_rank() == 0:
        (Path(config["run"]) / RESULT_FILE).write_text(json.dumps(metrics), encoding="utf-8")
