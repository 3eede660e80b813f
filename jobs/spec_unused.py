"""What a job's spec says to no effect, in sentences: `tandem jobs validate` and the job's own log tell them. Pure.

What nobody can mean is refused instead (jobs/spec_rules.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from jobs.spec_rules import holds_nothing_out, is_set, section
from jobs.spec_sections import CheckpointSpec, DataSpec

BY_SHARES = ("evaluate", "quantize", "predict")
"""Phases whose workers are no group that could be resized."""


def unused(spec: BaseModel) -> list[str]:
    """Return sentences about what a spec says to no effect, and what has one instead."""
    written = spec.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    return [*_of_data(written), *_of_training(written), *_of_workers(written)]


def _of_data(spec: Mapping[str, Any]) -> Iterator[str]:
    data, checkpoint = section(spec, "data"), section(spec, "checkpoint")
    if data.get("mixture") and spec.get("phase") in ("evaluate", "quantize"):
        yield "data.mixture: weight and max_epochs have no effect: measured are held-out rows of all sources"
    if data.get("eval") and is_set(DataSpec, data, "eval_fraction") and data["eval_fraction"]:
        yield "data.eval_fraction has no effect: what is held out is data.eval"
    if section(spec, "training").get("eval_every") and holds_nothing_out(data):
        yield "training.eval_every has no effect: nothing is held out"
    if not checkpoint.get("keep_best") and is_set(CheckpointSpec, checkpoint, "metric"):
        yield "checkpoint.metric has no effect: checkpoint.keep_best, which goes by it, is not set"


def _of_training(spec: Mapping[str, Any]) -> Iterator[str]:
    deepspeed = section(section(spec, "training"), "deepspeed")
    on_gpu = section(spec, "resources").get("gpus_per_worker")
    if deepspeed.get("offload") == "cpu" and deepspeed.get("offload_parameters") != "nvme" and not on_gpu:
        yield (
            "training.deepspeed.offload: cpu saves no memory without GPUs (resources.gpus_per_worker): the optimizer's "
            "states are in the host's memory anyway, and what it copies there and back takes more"
        )


def _of_workers(spec: Mapping[str, Any]) -> Iterator[str]:
    phase, workers = spec.get("phase"), section(spec, "resources").get("workers", 1)
    if phase not in BY_SHARES:
        return
    if phase == "quantize" and workers != 1:
        yield "resources.workers has no effect but that the job asks for room for so many: one worker quantizes"
    elif isinstance(workers, Mapping) and workers.get("resize_every_s") is not None:
        yield f"resources.workers.resize_every_s has no effect: phase {phase} decides once how many workers it has"
