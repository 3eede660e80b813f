"""A run that ended while the server was away is told later, whole, from its spool alone; a damaged one stops nobody."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.support.mlflow_server import MlflowServer, free_port
from tests.support.waiting import wait_for
from tracking import outbox
from tracking.cli import app
from tracking.client import connect
from tracking.errors import ServerUnreachable
from tracking.outbox import Ending
from tracking.run import RUN_KEY_TAG
from tracking.spool import Spool

pytest_plugins = ["tests.support.mlflow_server"]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def uri(mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.url)
    return mlflow_server.url


def told(uri: str, key: str) -> Any:
    """Return the one run of a key that the server knows."""
    client = connect(uri)
    experiment = client.get_experiment_by_name("tandem")
    (found,) = client.search_runs([experiment.experiment_id], f"tags.`{RUN_KEY_TAG}` = '{key}'")
    return found


def test_a_run_the_server_never_heard_of_is_told_later(tmp_path: Path, uri: str) -> None:
    runs = tmp_path / "runs"
    spool = Spool(runs / "late-1" / "spool" / "rank-0.jsonl")
    for step in range(1, 11):
        spool.append(step, {"loss": 1 / step})
    spool.close()
    assert outbox.pending(runs) == []
    outbox.note(runs / "late-1" / "spool", Ending("late-1", "late", "FAILED", {"steps": 10}, {"tandem.phase": "x"}))
    (waiting,) = outbox.pending(runs)
    with pytest.raises(ServerUnreachable):
        outbox.settle(waiting, f"http://127.0.0.1:{free_port()}")
    assert outbox.pending(runs) == [waiting]
    outbox.note(runs / "a-damaged-1" / "spool", Ending("a-damaged-1", "a", "FAILED"))
    (runs / "a-damaged-1" / "spool" / "ending.json").write_text("{")
    synced = CliRunner().invoke(app, ["sync", str(runs)])
    assert "late-1: 10 records sent" in synced.output
    assert "1 of 2 runs could not be told" in synced.output
    assert synced.exit_code == 1
    assert outbox.pending(runs) == [runs / "a-damaged-1" / "spool"]
    run = told(uri, "late-1")
    assert run.info.status == "FAILED"
    assert run.data.params["steps"] == "10"
    assert run.data.tags["tandem.phase"] == "x"
    history = connect(uri).get_metric_history(run.info.run_id, "loss")
    assert [point.step for point in history] == list(range(1, 11))


def test_a_guard_tells_what_its_driver_had_not_told_when_it_was_killed(tmp_path: Path, uri: str) -> None:
    """The driver had noted how the run ended, and died before MLflow knew."""
    code = (
        "import os, signal, sys; from pathlib import Path; from jobs import lease; from jobs.driver import guard;"
        "from jobs.run_folder import RunFolder; from tracking import outbox; from tracking.run import Run;"
        "folder = RunFolder(Path(sys.argv[1])); number = lease.take(folder.path).number; folder.begin();"
        "Run.open(folder.key, 'mine'); guard.start(folder, number);"
        "outbox.note(folder.spool, outbox.Ending(folder.key, 'mine', 'FINISHED')); folder.write_status('FINISHED');"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    run = tmp_path / "guarded-1"
    run.mkdir()
    done = subprocess.run([sys.executable, "-c", code, str(run)], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    wait_for(lambda: not (run / "spool" / outbox.FILE).exists(), "the guard has told nobody")
    found = told(uri, "guarded-1")
    assert found.info.status == "FINISHED"
    assert "tandem.error" not in found.data.tags


def test_a_run_whose_owner_was_killed_has_failed(tmp_path: Path) -> None:
    code = (
        "import sys, os, signal; from pathlib import Path; from tracking import outbox;"
        "outbox.own(Path(sys.argv[1]), outbox.Ending('mine-1', 'mine', 'FAILED'));"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    spool = tmp_path / "mine-1" / "spool"
    subprocess.run([sys.executable, "-c", code, str(spool)], cwd=ROOT, check=False)
    outbox.own(tmp_path / "alive-1" / "spool", Ending("alive-1", "alive", "FAILED"))
    assert outbox.pending(tmp_path) == [spool]
    outbox.forget(spool)
    assert outbox.pending(tmp_path) == []
