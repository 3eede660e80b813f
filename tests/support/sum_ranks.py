"""One of two ranks that sum the gradients of a matrix large enough to be summed by itself, and of small ones.

python tests/support/two_ranks.py sum_ranks FOLDER STAGE-PRECISION…
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist

from jobs.spec import TrainingSpec
from jobs.worker import deepspeed_internals
from jobs.worker.deepspeed_engine import Engine
from jobs.worker.zero import SUMMED_ALONE, deepspeed_config

WIDTH, ROWS, STEPS, CPU = 1040, 4, 2, torch.device("cpu")


def model() -> torch.nn.Module:
    """Return the same one everywhere."""
    torch.manual_seed(0)
    made = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.Tanh(), torch.nn.Linear(WIDTH, 1))
    assert WIDTH * WIDTH >= SUMMED_ALONE
    return made


def rows(step: int) -> torch.Tensor:
    """Return those of both ranks, (2 ROWS, WIDTH)."""
    return torch.randn(2 * ROWS, WIDTH, generator=torch.Generator().manual_seed(step))


def expected(training: TrainingSpec) -> list[float]:
    """Return the norms of the gradients of one process that has all rows."""
    whole, norms = model(), []
    optimizer = torch.optim.AdamW(whole.parameters(), lr=training.learning_rate, weight_decay=0.0)
    for step in range(STEPS):
        whole(rows(step)).square().mean().backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(whole.parameters(), torch.inf)))
        optimizer.step()
        optimizer.zero_grad()
    return norms


def run(case: str, rank: int, folder: Path) -> None:
    """Train two steps; leave the norms that were met beside those of one process."""
    stage, precision = case.split("-")
    deepspeed_internals.SUMMED_AT_ONCE = SUMMED_ALONE // 2 + 1  # in several pieces, of which one is short
    values = {"steps": STEPS, "global_batch_size": 2 * ROWS, "learning_rate": 1e-3, "weight_decay": 0.0, "clip": 0.0}
    training = TrainingSpec.model_validate({**values, "deepspeed": {"zero_stage": int(stage)}})
    config = deepspeed_config(training, ROWS, 1, precision="bf16" if precision == "bf16" else "fp32", on_gpu=False)
    engine, norms = Engine(model(), training, config, CPU), []
    for step in range(STEPS):
        mine = rows(step)[rank * ROWS : (rank + 1) * ROWS]
        made = engine.model(mine.bfloat16() if precision == "bf16" and stage != "0" else mine)
        engine.backward(made.float().square().sum() / (2 * ROWS))
        engine.step()
        norms.append(engine.gradient_norm())
    if rank == 0:
        (folder / f"{case}.json").write_text(json.dumps([norms, expected(training)]))
    dist.barrier()
