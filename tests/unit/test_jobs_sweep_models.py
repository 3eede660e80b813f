"""Values of a sweep with which no model can be built are refused before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.errors import UserError
from jobs import sweep_models
from jobs.spec import JobSpec


def spec(fields: dict[str, Any]) -> JobSpec:
    values = {
        "name": "tries",
        "phase": "sweep",
        "task": "image-classification",
        "model": {"architecture": "vit", "config": {"hidden_size": 24, "num_attention_heads": 2}},
        "data": {"train": "sklearn-digits", "eval_fraction": 0.2},
        "training": {"steps": 4},
        "sweep": {"fields": fields, "search": "grid", "scheduler": {"name": "none"}},
    }
    return JobSpec.model_validate(values)


def test_values_that_make_no_model_are_named(tmp_path: Path) -> None:
    fields = {"model.config.hidden_size": {"choices": [24, -8]}, "model.config.hidden_sise": {"choices": [24]}}
    with pytest.raises(UserError) as caught:
        sweep_models.check(spec(fields), tmp_path)
    first, second = str(caught.value).splitlines()
    assert first.startswith("sweep.fields.model.config.hidden_size.choices.1: -8 makes no model: ")
    assert second.startswith("sweep.fields.model.config.hidden_sise.choices.0: 24 makes no model: ")


def test_values_that_make_models_pass_and_so_do_other_jobs(tmp_path: Path) -> None:
    sweep = spec({"model.config.num_attention_heads": {"choices": [2, 3]}})
    sweep_models.check(sweep, tmp_path)
    values = {**sweep.resolved(), "phase": "pretrain", "sweep": None}
    sweep_models.check(JobSpec.model_validate(values), tmp_path)
