"""Every task on the real stack: two workers of which one is killed, a resume, export, int8, and an answer over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from cluster import home
from cluster.connect import Connection, connection
from cluster.errors import UserError
from jobs import submit
from jobs.data import prepare
from jobs.spec import JobSpec
from jobs.tasks import get
from jobs.worker.quantize import quantize
from serve import endpoints
from serve.spec import ServeSpec
from tests.conftest import free_port
from tests.support.fault_runs import environment
from tests.support.workloads import Endpoint, Workload, workloads
from tracking import manifest

KILLED_AT = 12
"""The step at which the second worker is killed; a checkpoint was begun at step 10."""
WORKLOADS = workloads()


@pytest.fixture(scope="module")
def made() -> dict[str, Path]:
    """The model to serve of each workload that has come so far."""
    return {}


class Training:
    """The workloads' jobs that train. The next one is sent before one is waited for: they mostly start and end."""

    def __init__(self, workloads: list[Workload], folder: Path) -> None:
        self._workloads, self._folder = workloads, folder
        self._sent: dict[str, str] = {}

    def finished(self, workload: Workload) -> tuple[dict[str, Any], Path]:
        """Return the result of a workload's job, and the folder of its data."""
        at = self._workloads.index(workload)
        for each in self._workloads[at : at + 2]:
            if each.name not in self._sent:
                folder = self._folder / each.name
                folder.mkdir()
                each.write(folder)
                self._sent[each.name] = _send(folder, _training(each), f"kill:rank=1:step={KILLED_AT}:phase=step")
        return _finished(_followed(self._sent[workload.name])), self._folder / workload.name


@pytest.fixture(scope="module")
def training(request: pytest.FixtureRequest, cluster: Connection, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """Of those workloads whose tests run."""
    found = [item.callspec.params.get("workload") for item in request.session.items if hasattr(item, "callspec")]
    return Training([each for each in WORKLOADS if each in found], tmp_path_factory.mktemp("workloads"))


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
def test_a_workload_goes_from_its_data_to_a_small_model(
    workload: Workload, training: Training, made: dict[str, Path]
) -> None:
    trained, data = training.finished(workload)
    (folder,) = (home.home() / "storage" / "runs").glob(f"{workload.name}-*")
    assert [path.name for path in (folder / "faults").iterdir()] == [f"kill-rank1-step{KILLED_AT}-step"]
    workload.learned(trained["evaluation"])
    first = trained["evaluations"]["first"]["loss"]  # it is known after the resume, too
    assert first > trained["evaluation"]["loss"] or not workload.falls
    assert _artifacts(trained["run_id"]) >= {*workload.pictures, "model-card.md"}
    assert "## Metrics" in (Path(trained["directory"]) / "README.md").read_text()

    made[workload.name] = _quantised(workload, Path(trained["directory"]), data)


def test_all_of_them_answer_over_http(cluster: Connection, made: dict[str, Path], tmp_path: Path) -> None:
    assert made, "run this test with those before it"
    little = {"precision": "fp32", "resources": {"cpus_per_replica": 0.25}}
    models = {name: {"model": str(model), **little} for name, model in made.items()}
    http = {"port": free_port()}  # the other part of these tests may be starting an endpoint, too
    outcome = endpoints.up(ServeSpec.model_validate({"models": models, "start_timeout_s": 300, "http": http}), print)
    wrong = []
    try:
        with httpx.Client(base_url=outcome["endpoint"], timeout=60, trust_env=False) as client:
            for workload in WORKLOADS:
                if workload.name in made:
                    try:
                        workload.asked(Endpoint(client, workload.name))
                    except AssertionError as error:
                        wrong.append(f"{workload.name}: {error}")
    finally:
        endpoints.down(print)
    assert not wrong, "\n".join(wrong)


def _training(workload: Workload) -> dict[str, Any]:
    training = {"precision": "fp32", "deepspeed": {"zero_stage": 1}, **workload.training}
    return {
        **_common(workload, "pretrain", workload.name),
        "model": dict(workload.model),
        "training": training,
        "checkpoint": {"every_steps": KILLED_AT - 2},
        "resources": {"workers": 2, "cpus_per_worker": 1},
    }


def _quantised(workload: Workload, parent: Path, folder: Path) -> Path:
    """Return int8 weights as a directory that can be served, or the parent where they are refused, as they must be.

    In this process, as phase quantize does it in its task: a job takes ten seconds to start. A task that compares with
    a reference has a job all the same, which is asked for its answers.
    """
    values = {**_common(workload, "quantize", f"{workload.name}-int8"), "model": {"from": str(parent)}}
    if isinstance(values["task"], dict):  # its tokenizer is the parent's
        values["task"] = {key: value for key, value in values["task"].items() if key != "tokenizer"}
    spec = JobSpec.model_validate({**values, "quantize": {"precision": "fp32"}})
    if get(spec.task.name)(spec.task.options).refers():
        job = _send(folder, {**values, "quantize": {"precision": "fp32"}})
        return Path(_finished(_followed(job))["directory"])
    prepared = prepare.prepare(spec, folder, folder / "storage", parent=parent, on_progress=lambda *event: None)
    target = folder / "int8"
    if workload.unquantised:
        with pytest.raises(UserError, match=workload.unquantised):
            quantize(spec, str(parent), prepared, "fp32", str(target))
        return parent
    quantize(spec, str(parent), prepared, "fp32", str(target))
    whole = manifest.read(parent)
    manifest.write(target, whole.model_copy(update={"quantization": {"method": spec.quantize.method}}))
    return target


def _common(workload: Workload, phase: str, name: str) -> dict[str, Any]:
    task = workload.task if isinstance(workload.task, str) else dict(workload.task)
    return {"name": name, "phase": phase, "task": task, "data": dict(workload.data)}


def _send(folder: Path, spec: dict[str, Any], fault: str = "") -> str:
    path = folder / f"{spec['name']}.yaml"
    path.write_text(yaml.safe_dump(spec))
    with environment(fault):
        return submit.submit(path, [])


def _followed(job: str) -> submit.Outcome:
    return submit.follow(job, lambda line, meaning: None)


def _finished(outcome: submit.Outcome) -> dict[str, Any]:
    assert outcome.status == "SUCCEEDED", "\n".join(outcome.log)
    result: dict[str, Any] = outcome.result
    return result


def _artifacts(run_id: str) -> set[str]:
    from mlflow.tracking import MlflowClient

    return {file.path for file in MlflowClient(connection().tracking_uri).list_artifacts(run_id)}
