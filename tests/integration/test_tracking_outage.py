"""A real server dies and comes back: the run goes on, nothing is lost, nothing is logged twice."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.mlflow_server import MlflowServer
from tests.support.waiting import wait_for
from tracking.client import connect
from tracking.errors import ServerUnreachable
from tracking.records import Record
from tracking.run import Run
from tracking.spool import Spool, SpoolSender


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MlflowServer]:
    running = MlflowServer(tmp_path / "mlflow").start()
    yield running
    running.kill()


def test_metrics_survive_the_servers_death_and_a_drivers_restart(server: MlflowServer, tmp_path: Path) -> None:
    spool, seen = Spool(tmp_path / "spool" / "rank-0.jsonl"), list[Record]()
    run = Run.open("outage", "outage", tracking_uri=server.url)
    sender = SpoolSender(tmp_path / "spool", run, interval_s=0.1, batch_s=0.1).start(seen.extend)
    for step in range(50):
        spool.append(step, {"loss": 1 / (step + 1)})
    wait_for(lambda: sender.unsent() == 0)

    server.kill()
    for step in range(50, 2000):
        spool.append(step, {"loss": 1 / (step + 1)})
    wait_for(lambda: len(seen) == 2000 and sender.last_error is not None)
    with pytest.raises(ServerUnreachable):
        run.end("FINISHED", wait_s=0)
    left = sender.stop(0.5)
    assert left == 1950

    def reopen() -> Run:
        return Run.open("outage", "outage", tracking_uri=server.url)

    restarted = SpoolSender(tmp_path / "spool", reopen, interval_s=0.1, batch_s=0.1).start()
    for step in range(1990, 2010):  # the resumed run repeats ten steps
        spool.append(step, {"loss": 1 / (step + 1)})
    wait_for(lambda: restarted.last_error is not None)
    server.start()
    assert restarted.stop(60) == 0
    run.end("FINISHED")

    client = connect(server.url)
    history = client.get_metric_history(run.run_id, "loss")
    assert [point.step for point in history] == list(range(2010))
    assert history[-1].value == 1 / 2010
    assert client.get_run(run.run_id).info.status == "FINISHED"
