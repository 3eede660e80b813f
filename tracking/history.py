"""Past and present runs, as the table of `tandem tracking runs` shows them."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tracking.client import ask, connect
from tracking.run import RUN_KEY_TAG

PHASE_TAG = "tandem.phase"
LOSS_KEYS = ("train/loss", "loss", "train_loss")
EVALUATION_PREFIXES = ("eval/", "eval_", "evaluation/")


@dataclass(frozen=True)
class RunSummary:
    """One run, without its history."""

    run_id: str
    name: str
    key: str | None
    phase: str | None
    status: str
    started_at_ms: int
    duration_s: float
    """Until now while the run is RUNNING."""
    loss: float | None
    evaluation: Mapping[str, float] = field(default_factory=dict)
    url: str = ""


def runs(limit: int = 20, name: str | None = None, tracking_uri: str | None = None) -> list[RunSummary]:
    """Return the newest runs that jobs opened, newest first; `name` keeps those whose name contains it."""
    client = connect(tracking_uri)
    experiments = [e.experiment_id for e in ask(client, client.search_experiments)]
    found = ask(
        client,
        lambda: client.search_runs(experiments, named(name), max_results=limit, order_by=["start_time DESC"]),
    )
    return [summary(raw, client.tracking_uri, time.time() * 1000) for raw in found]


def named(name: str | None) -> str:
    """Return MLflow's query for the runs that jobs opened; `name` keeps those whose name contains it. Pure."""
    query = f"tags.`{RUN_KEY_TAG}` LIKE '%'"
    return f"{query} AND attributes.run_name LIKE '%{_escaped(name)}%'" if name else query


def summary(raw: Any, uri: str, now_ms: float) -> RunSummary:
    """Summarise an MLflow run. A reopened run keeps the end time of its first end: only its status counts."""
    info, data = raw.info, raw.data
    ended_ms = info.end_time if info.status != "RUNNING" and info.end_time else now_ms
    return RunSummary(
        run_id=info.run_id,
        name=info.run_name,
        key=data.tags.get(RUN_KEY_TAG),
        phase=data.tags.get(PHASE_TAG) or data.params.get("phase"),
        status=info.status,
        started_at_ms=info.start_time,
        duration_s=(ended_ms - info.start_time) / 1000,
        loss=next((data.metrics[key] for key in LOSS_KEYS if key in data.metrics), None),
        evaluation=evaluation_of(data.metrics),
        url=f"{uri}/#/experiments/{info.experiment_id}/runs/{info.run_id}",
    )


def evaluation_of(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the evaluation's metrics under their bare names."""
    return {
        key.removeprefix(prefix): value
        for key, value in sorted(metrics.items())
        for prefix in EVALUATION_PREFIXES
        if key.startswith(prefix)
    }


def _escaped(name: str) -> str:
    return name.replace("'", "").replace("\\", "")
