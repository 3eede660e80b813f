"""Where the size of a micro-batch decides what is learned, `auto` is refused; elsewhere each row stands alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cluster.errors import UserError
from jobs.plan.facts import Facts
from jobs.spec import JobSpec
from jobs.tasks import get
from jobs.worker import sizing
from jobs.worker.rows_search import Known, Took

GIB = 1 << 30
PLAIN, NORMALISED = torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))


@pytest.mark.parametrize(
    ("name", "options", "model", "said"),
    [
        ("image-classification", {}, NORMALISED, "BatchNorm1d normalises by the rows of a micro-batch"),
        ("image-classification", {"mixup": 0.2}, PLAIN, "task.mixup takes its pairs"),
        ("image-embedding", {"loss": "triplet"}, PLAIN, "triplets are sought"),
        ("recommendation", {"softmax": "in-batch"}, PLAIN, "task.softmax in-batch compares items"),
    ],
)
def test_what_a_micro_batch_decides_is_not_left_to_the_memory(
    name: str, options: dict[str, Any], model: torch.nn.Module, said: str
) -> None:
    with pytest.raises(UserError, match=f"micro_batch_size: auto: {said}.*give a number"):
        sizing.check(model, get(name)(options))


@pytest.mark.parametrize("name", ["image-classification", "image-embedding", "recommendation", "causal-lm", "tabular"])
def test_elsewhere_it_may_be(name: str) -> None:
    options = {"target_column": "y"} if name == "tabular" else {}
    sizing.check(PLAIN, get(name)(options))


@pytest.mark.parametrize("other", [{"compile": True}, {"optimizer": "muon"}, {"gradient_checkpointing": "selective"}])
def test_what_was_tried_is_remembered_of_the_same_passes_alone(other: dict[str, Any], tmp_path: Path) -> None:
    def place(**training: Any) -> Path:
        values = {"name": "x", "phase": "pretrain", "model": {"architecture": "llama"}, "data": {"train": "x"}}
        spec = JobSpec.model_validate({**values, "training": {"steps": 1, **training}})
        config = SimpleNamespace(spec=spec, precision="fp32", storage=tmp_path)
        engine = SimpleNamespace(device=torch.device("cpu"), world_size=1, rank=0)
        attempt = SimpleNamespace(nodes=["a"])
        facts = Facts("X", 10, 10, 0, 0, 10)
        this = sizing.Sizing(config, None, None, engine, {}, facts, attempt, None)  # type: ignore[arg-type]
        trial = SimpleNamespace(batch=lambda rows: {"tokens": torch.zeros(rows, 4)})
        return sizing.place(this, trial)  # type: ignore[arg-type]

    assert place() == place(learning_rate=1.0)
    assert place(**other) != place()


def test_the_choice_is_said_with_what_it_goes_by() -> None:
    tried = {1: Took(0, 0, GIB), 16: Took(0, 0, 2 * GIB), 32: None}
    said = sizing.by_trial(16, tried, Known(64, 3 * GIB, planned=22, each=5), trials=3)
    assert "16 of a worker's 64 rows at a time, 4 passes a step, by 3 trials" in said
    assert "the longest rows take 2.00 of the 3.00 GiB that each worker may still take; the plan expected 22" in said
    known = sizing.by_trial(64, {64: Took(0, 0, GIB)}, Known(64, 3 * GIB), trials=0)
    assert "1 pass a step, by what such workers have measured before" in known
    assert "memory may run out" not in known
    assert "the plan" not in known
    assert "so that memory may run out" in sizing.by_trial(1, {1: Took(0, 0, 4 * GIB)}, Known(64, 3 * GIB), trials=1)
    assert "all 8 rows of a worker in one pass, planned at 0.25 of the 3.00 GiB" in sizing.by_plan(8, GIB // 4, 3 * GIB)
