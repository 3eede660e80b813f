"""Runs on a real MLflow server: one per key, nothing twice, no secrets, a truthful end."""

from pathlib import Path

import pytest

from cluster.errors import UserError
from tests.support.mlflow_server import LossyProxy, MlflowServer, free_port
from tracking.client import connect
from tracking.errors import ServerUnreachable, TrackingError
from tracking.history import runs
from tracking.plan_errors import LAYOUT_TAG, MEASURED_MEMORY, MEASURED_STEP, PLANNED_MEMORY, PLANNED_STEP, compared
from tracking.run import Run
from tracking.spool import Spool, SpoolSender

pytest_plugins = ["tests.support.mlflow_server"]


@pytest.fixture
def uri(mlflow_server: MlflowServer) -> str:
    return mlflow_server.url


def raw_runs(uri: str, key: str) -> list[object]:
    client = connect(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return list(client.search_runs(experiments, f"tags.`tandem.run_key` = '{key}'"))


def test_a_key_is_one_run_through_restarts(uri: str) -> None:
    first = Run.open("restarted", "name", params={"steps": 10}, tracking_uri=uri)
    first.end("KILLED")
    assert first.status == "KILLED"
    second = Run.open("restarted", "name", params={"steps": 10}, tracking_uri=uri)
    assert (second.run_id, second.status) == (first.run_id, "RUNNING")
    second.end("FINISHED")
    assert first.status == "FINISHED"
    assert Run.open("another", "name", tracking_uri=uri).run_id != first.run_id


def test_find_gives_the_run_to_a_supervisor_without_reopening_it(uri: str) -> None:
    opened = Run.open("supervised", "name", tracking_uri=uri)
    opened.end("FAILED")
    found = Run.find("supervised", tracking_uri=uri)
    assert found is not None
    assert (found.run_id, found.status) == (opened.run_id, "FAILED")
    assert Run.find("never-opened", tracking_uri=uri) is None
    assert Run.find("supervised", experiment="no such experiment", tracking_uri=uri) is None


def test_a_lost_reply_to_create_makes_one_run(mlflow_server: MlflowServer, uri: str) -> None:
    with LossyProxy(mlflow_server, lose="/runs/create") as proxy:
        run = Run.open("lossy", "name", tracking_uri=proxy.url)
    assert len(proxy.lost) == 1
    assert [found.info.run_id for found in raw_runs(uri, "lossy")] == [run.run_id]


def test_a_lost_reply_to_a_batch_makes_no_duplicates(mlflow_server: MlflowServer, uri: str, tmp_path: Path) -> None:
    spool = Spool(tmp_path / "rank-0.jsonl")
    for step in range(20):
        spool.append(step, {"train/loss": step / 3})
    with LossyProxy(mlflow_server, lose="/runs/log-batch") as proxy:
        run = Run.open("lossy-batch", "name", tracking_uri=proxy.url)
        assert SpoolSender(tmp_path, run, interval_s=0.05).start().stop(20) == 0
    assert len(proxy.lost) == 1
    history = connect(uri).get_metric_history(run.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(step, step / 3) for step in range(20)]


def test_params_are_flat_cut_masked_and_follow_changes(uri: str) -> None:
    run = Run.open("params", "name", tracking_uri=uri, params={"training": {"steps": 10, "betas": [0.9, 0.95]}})
    run.log_params({"env": {"HF_TOKEN": "hf_very_secret"}, "text": "x" * 7000, **{f"p{i}": i for i in range(250)}})
    run.log_params({"training": {"steps": 20}})
    data = connect(uri).get_run(run.run_id).data
    assert data.params["training.steps"] == "10"
    assert data.tags["tandem.param.training.steps"] == "20"
    assert data.params["training.betas"] == "[0.9, 0.95]"
    assert data.params["env.HF_TOKEN"] == "********"
    assert len(data.params["text"]) == 6000
    assert data.params["text"].endswith("… [7000 characters in all]")
    assert data.params["p249"] == "249"


def test_artifacts_go_through_the_server_without_secrets(uri: str, tmp_path: Path) -> None:
    run = Run.open("artifacts", "name", tracking_uri=uri)
    run.log_dict({"api_key": "sk-secret", "steps": 3}, "spec.yaml")
    run.log_text("hello", "notes/readme.txt")
    client = connect(uri)
    assert "mlflow-artifacts:" in client.get_run(run.run_id).info.artifact_uri
    spec = Path(client.download_artifacts(run.run_id, "spec.yaml", str(tmp_path))).read_text()
    assert "steps: 3" in spec
    assert "sk-secret" not in spec
    notes = Path(client.download_artifacts(run.run_id, "notes/readme.txt", str(tmp_path)))
    assert notes.read_text() == "hello"


def test_a_dataset_is_an_input_once_and_its_whole_digest_a_tag(uri: str) -> None:
    run = Run.open("dataset", "name", tracking_uri=uri)
    for _ in range(2):
        run.log_dataset("python-stdlib", "a" * 64, "train")
    run.log_dataset("python-stdlib", "b" * 64, "eval")
    raw = connect(uri).get_run(run.run_id)
    seen = {(entry.tags[0].value, entry.dataset.digest) for entry in raw.inputs.dataset_inputs}
    assert seen == {("train", "a" * 36), ("eval", "b" * 36)}
    assert len(raw.inputs.dataset_inputs) == 2
    assert raw.data.tags["tandem.dataset.train"] == "python-stdlib@" + "a" * 64


def test_checkpoints_are_logged_models_ranked_by_metrics(uri: str, tmp_path: Path) -> None:
    run = Run.open("checkpoints", "name", tracking_uri=uri)
    ids = {
        step: run.log_checkpoint(f"step-{step}", tmp_path, step, {"eval/loss": loss})
        for step, loss in [(100, 3.0), (200, 1.0), (300, 2.0)]
    }
    assert run.log_checkpoint("step-200", tmp_path, 200, {"eval/loss": 1.0}) == ids[200]
    run.drop_checkpoint(300)
    run.drop_checkpoint(300)
    order = [{"field_name": "metrics.eval/loss", "ascending": True}]
    listed = connect(uri).search_logged_models([run.experiment_id], f"source_run_id = '{run.run_id}'", order_by=order)
    assert [model.model_id for model in listed] == [ids[200], ids[100]]
    assert str(listed[0].status) == "READY"
    assert listed[0].tags["tandem.directory"] == str(tmp_path)


def test_the_history_shows_phase_status_loss_and_evaluation(uri: str) -> None:
    run = Run.open("listed", "a listed name", tags={"tandem.phase": "finetune"}, tracking_uri=uri)
    run.log_metrics({"train/loss": 2.5, "eval/perplexity": 9.0}, step=7)
    run.end("FINISHED")
    (found,) = runs(name="listed", tracking_uri=uri)
    assert (found.key, found.phase, found.status, found.loss) == ("listed", "finetune", "FINISHED", 2.5)
    assert found.evaluation == {"perplexity": 9.0}
    assert 0 <= found.duration_s < 60
    assert found.url == run.url


def test_bad_keys_and_endings_are_refused_before_the_server_is_asked() -> None:
    with pytest.raises(UserError, match="run key 'a/b' is not a valid name"):
        Run.open("a/b", "name", tracking_uri="http://127.0.0.1:1")
    with pytest.raises(TrackingError, match="cannot end 'DONE'"):
        Run(connect("http://127.0.0.1:1"), "id", "1").end("DONE")  # type: ignore[arg-type]


def test_without_a_server_the_error_comes_soon_and_names_the_address() -> None:
    address = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ServerUnreachable, match=f"{address}.*tandem cluster up"):
        Run.open("nobody", "name", tracking_uri=address)


def test_plans_are_compared_with_what_was_measured_newest_first(uri: str) -> None:
    for number, (planned, taken) in enumerate(((110.0, 100.0), (100.0, None), (50.0, 100.0))):
        run = Run.open(f"compared-{number}", "plan-compared", tags={LAYOUT_TAG: "2 × ZeRO 1"}, tracking_uri=uri)
        measured = {} if taken is None else {MEASURED_MEMORY: taken, MEASURED_STEP: 2.0}
        run.log_metrics({PLANNED_MEMORY: planned, PLANNED_STEP: 1.0, **measured})
        run.end("FINISHED")
    found = compared(10, "plan-compared", uri)
    assert [each.memory.error for each in found] == [pytest.approx(-0.5), pytest.approx(0.1)]
    assert [(each.name, each.layout, each.step.error) for each in found] == [("plan-compared", "2 × ZeRO 1", -0.5)] * 2
    assert len(compared(1, "plan-compared", uri)) == 1
    assert compared(10, "another name", uri) == []
