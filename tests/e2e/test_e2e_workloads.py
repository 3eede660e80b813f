"""Every task on the real stack: two workers of which one is killed, a resume, export, int8, and an answer over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from cluster import home
from cluster.connect import Connection, connection
from jobs import submit
from serve import endpoints
from serve.spec import ServeSpec
from tests.support.fault_runs import environment
from tests.support.workloads import Endpoint, Workload, workloads
from tracking import manifest

KILLED_AT = 12
"""The step at which the second worker is killed; a checkpoint was begun at step 10."""


@pytest.mark.parametrize("workload", workloads(), ids=lambda workload: workload.name)
def test_a_workload_goes_from_its_data_to_an_answer(workload: Workload, cluster: Connection, tmp_path: Path) -> None:
    workload.write(tmp_path)
    trained = _finished(_run(tmp_path, _training(workload), f"kill:rank=1:step={KILLED_AT}:phase=step"))
    (folder,) = (home.home() / "storage" / "runs").glob(f"{workload.name}-*")
    assert [path.name for path in (folder / "faults").iterdir()] == [f"kill-rank1-step{KILLED_AT}-step"]
    workload.learned(trained["evaluation"])
    first = trained["evaluations"]["first"]["loss"]  # it is known after the resume, too
    assert first > trained["evaluation"]["loss"] or not workload.falls
    assert _artifacts(trained["run_id"]) >= {*workload.pictures, "model-card.md"}
    assert "## Metrics" in (Path(trained["directory"]) / "README.md").read_text()

    small = _run(tmp_path, _quantising(workload, trained["directory"]))
    if workload.unquantised:
        assert small.status == "FAILED"
        assert workload.unquantised in "\n".join(small.log)
        served = trained["directory"]
    else:
        served = _finished(small)["directory"]
        assert manifest.read(Path(served)).quantization["method"] == "int8-weight-only"
    _ask(workload, served, tmp_path)


def _training(workload: Workload) -> dict[str, Any]:
    training = {"precision": "fp32", "deepspeed": {"zero_stage": 1}, **workload.training}
    return {
        **_common(workload, "pretrain", workload.name),
        "model": dict(workload.model),
        "training": training,
        "checkpoint": {"every_steps": KILLED_AT - 2},
        "resources": {"workers": 2, "cpus_per_worker": 1},
    }


def _quantising(workload: Workload, parent: str) -> dict[str, Any]:
    spec = _common(workload, "quantize", f"{workload.name}-int8")
    task = spec["task"]
    if isinstance(task, dict):  # its tokenizer is the parent's
        spec["task"] = {key: value for key, value in task.items() if key != "tokenizer"}
    return {**spec, "model": {"from": parent}, "quantize": {"precision": "fp32"}}


def _common(workload: Workload, phase: str, name: str) -> dict[str, Any]:
    task = workload.task if isinstance(workload.task, str) else dict(workload.task)
    return {"name": name, "phase": phase, "task": task, "data": dict(workload.data)}


def _run(folder: Path, spec: dict[str, Any], fault: str = "") -> submit.Outcome:
    path = folder / f"{spec['name']}.yaml"
    path.write_text(yaml.safe_dump(spec))
    with environment(fault):
        job = submit.submit(path, [])
    return submit.follow(job, lambda line, meaning: None)


def _finished(outcome: submit.Outcome) -> dict[str, Any]:
    assert outcome.status == "SUCCEEDED", "\n".join(outcome.log)
    result: dict[str, Any] = outcome.result
    return result


def _artifacts(run_id: str) -> set[str]:
    from mlflow.tracking import MlflowClient

    return {file.path for file in MlflowClient(connection().tracking_uri).list_artifacts(run_id)}


def _ask(workload: Workload, model: str, folder: Path) -> None:
    """Serve a model directory, ask it, and take it down."""
    models = {workload.name: {"model": model, "precision": "fp32", "resources": {"cpus_per_replica": 0.5}}}
    outcome = endpoints.up(ServeSpec.model_validate({"models": models, "start_timeout_s": 120}), print)
    try:
        with httpx.Client(base_url=outcome["endpoint"], timeout=60, trust_env=False) as client:
            workload.asked(Endpoint(client, workload.name, folder))
    finally:
        endpoints.down(print)
