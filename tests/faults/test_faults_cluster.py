"""Nodes and the head die, come back, or are announced to go: training shrinks, grows and goes on."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cluster import daemons, home, local, record, supervisor, topology
from cluster.connect import connection
from jobs.run_folder import RunFolder
from tests.support import members
from tests.support.fault_runs import Faulted, ended, forked_for, mlflow_client, run, same_curve, submitted
from tests.support.own_cluster import own_cluster
from tracking import outbox

STEPS = 400
RATE = ["training.learning_rate=3e-4", "training.schedule=constant"]
"""At which 1e-7 stays small, and the first steps of a run are those of a longer one."""
ELASTIC = [*RATE, "resources.workers={min: 1, max: 3, resize_every_s: 3}"]
PACED = "pace:rank=0:step=1"
"""Small steps would be over before a node has come back: this fault makes every step take a tenth of a second."""


@pytest.fixture(scope="module")
def three_nodes():
    """A cluster of three nodes of one CPU each, in a home of its own."""
    with own_cluster(nodes=2, cpus=1, cpus_per_node=1) as started:
        yield started


@pytest.fixture
def storage(three_nodes):
    return home.home() / "storage"


@pytest.fixture(scope="module")
def steady(three_nodes, folder):
    """The losses of one worker without ZeRO, to which nothing happens."""
    settings = [f"training.steps={STEPS}", *RATE, "resources.workers=1", "training.deepspeed.zero_stage=0"]
    found = run(folder, home.home() / "storage", "steady", *settings)
    assert found.status == "SUCCEEDED", found.log
    return found.losses()


def at_stage(stage: int) -> str:
    return f"training.deepspeed.zero_stage={stage}"


def test_a_sick_node_is_left_out(steady, storage, tmp_path):
    sick = topology.nodes()[1].node_id
    found = run(tmp_path, storage, "sick", *ELASTIC, at_stage(1), fault=f"kill-always:node={sick}:step=15")
    assert found.status == "SUCCEEDED", found.log
    same_curve(found.losses(), {step: steady[step] for step in range(1, 41)})
    failures = found.failures()
    assert [failure["action"] for failure in failures] == ["retry", "exclude node"]
    assert {failure["node"] for failure in failures} == {sick}
    assert RunFolder(found.folder).control().excluded == (sick,)
    assert sick not in RunFolder(found.folder).attempt().nodes


def test_a_node_dies_and_comes_back(steady, storage, tmp_path):
    settings = [f"training.steps={STEPS}", "checkpoint.every_steps=20", *ELASTIC, at_stage(2)]
    job = submitted(tmp_path, "elastic", *settings, fault=PACED)
    _wait_for(lambda: _steps(storage, "elastic", workers=3) > 20, "three workers")
    _kill(record.read().raylets[-1])
    killed_at = time.monotonic()
    _wait_for(lambda: _workers_now(storage, "elastic") == 2, "two workers")
    print(f"two workers after {time.monotonic() - killed_at:.1f} s")
    _add_node(7)
    added_at = time.monotonic()
    _wait_for(lambda: _workers_now(storage, "elastic") == 3, "three workers again")
    print(f"three workers after {time.monotonic() - added_at:.1f} s")
    found = ended(job, storage, "elastic")
    assert found.status == "SUCCEEDED", found.log
    same_curve(found.losses(), steady)
    sizes = mlflow_client().get_metric_history(found.run.info.run_id, "workers")
    seen = [int(point.value) for point in sorted(sizes, key=lambda point: point.step)]
    assert [size for size, _ in itertools.groupby(seen)] == [3, 2, 3]
    assert [failure["kind"] for failure in found.failures()] == ["node lost"]


def test_a_raylet_dies_and_its_node_joins_again_by_itself(steady, storage, tmp_path):
    """The run goes back to three workers, and nobody had to do anything."""
    settings = [f"training.steps={STEPS}", "checkpoint.every_steps=20", *ELASTIC, at_stage(2)]
    job = submitted(tmp_path, "rejoined", *settings, fault=PACED)
    _wait_for(lambda: _steps(storage, "rejoined", workers=3) > 20, "three workers")
    before = {node.node_id for node in topology.nodes() if node.alive}
    cluster = record.read()
    number = next(n for n in range(1, len(cluster.raylets) + 1) if _kept(cluster, n).lives)
    raylet = psutil.Process(_kept(cluster, number).raylet)
    workers = forked_for(raylet)
    raylet.kill()
    killed_at = time.monotonic()
    _wait_for(lambda: _kept(cluster, number).returns == 1, "return", 60)
    print(f"the node has joined again after {time.monotonic() - killed_at:.1f} s")
    assert [process for process in workers if process.is_running()] == [], "what ran under the old raylet is gone"
    _wait_for(
        lambda: _workers_now(storage, "rejoined") == 3 and _attempts(storage, "rejoined") > 1, "three workers again"
    )
    print(f"three workers after {time.monotonic() - killed_at:.1f} s")
    found = ended(job, storage, "rejoined")
    assert found.status == "SUCCEEDED", found.log
    same_curve(found.losses(), steady)
    (joined,) = [node for node in topology.nodes() if node.alive and node.node_id not in before]
    assert joined.returns == 1
    log = (home.home() / "logs" / f"ray-node-{number}.log").read_text()
    assert "ended by SIGKILL" in log
    shown = subprocess.run(
        [sys.executable, "-c", "from cluster.cli import app; app()", "status"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert f"ray-node-{number}.log" in shown
    assert "SIGKILL" in shown


def test_a_node_that_is_announced_to_go(steady, storage, tmp_path):
    """The notice alone has the run saved; what the node's end then costs is the steps since."""
    settings = ["training.steps=300", "checkpoint.every_steps=100000", *ELASTIC, at_stage(3)]
    job = submitted(tmp_path, "noticed", *settings, fault=PACED)
    _wait_for(lambda: _steps(storage, "noticed", workers=3) > 20, "three workers")
    (folder,) = (storage / "runs").glob("noticed-*")
    node = next(node for node in topology.nodes() if node.alive and not node.is_head)
    raylet = _raylet_of(node)
    earlier = set(folder.glob("checkpoints/step-*/MANIFEST.json"))  # a group that has grown has saved for it
    _drain(node.node_id, deadline_s=20)
    _wait_for(
        lambda: set(folder.glob("checkpoints/step-*/MANIFEST.json")) - earlier, "checkpoint before the deadline", 20
    )
    _kill(raylet)
    found = ended(job, storage, "noticed")
    assert found.status == "SUCCEEDED", found.log
    same_curve(found.losses(), {step: steady[step] for step in range(1, 301)})
    assert any("will be taken away" in line for line in found.log)
    (failure,) = found.failures()
    assert failure["checkpoint"] > 0
    assert failure["kind"] in ("preempted", "node lost")


def test_the_gcs_dies_for_a_moment(three_nodes, storage, tmp_path):
    """Training loses no step, and the cluster takes new jobs again."""
    job = submitted(tmp_path, "headless", f"training.steps={STEPS}", "resources.workers=1", fault=PACED)
    _wait_for(lambda: _steps(storage, "headless", workers=1) > 20, "training")
    os.kill(record.read().gcs_pid, signal.SIGKILL)
    before = _steps(storage, "headless", workers=1)
    time.sleep(5)
    assert _steps(storage, "headless", workers=1) > before, "training went on meanwhile"
    local.up()
    asked_at = time.monotonic()
    small = submitted(tmp_path, "after", "training.steps=3", "resources.workers=1")
    assert time.monotonic() - asked_at < 10
    found = ended(job, storage, "headless")
    assert found.status == "SUCCEEDED", found.log
    assert found.failures() == []
    assert sorted(found.losses()) == list(range(1, STEPS + 1))
    assert ended(small, storage, "after").status == "SUCCEEDED"


def test_the_head_is_lost_for_good(three_nodes, storage, tmp_path):
    """Whoever follows the job learns it, `tandem tracking sync` ends its run, another submission goes on."""
    settings = ["training.steps=200", "checkpoint.every_steps=10"]
    job = submitted(tmp_path, "lost", *settings, fault=PACED)
    _wait_for(lambda: list((storage / "runs").glob("lost-*/checkpoints/step-*/MANIFEST.json")), "a checkpoint")
    follow = subprocess.Popen(
        [sys.executable, "-c", "from jobs.cli import app; app()", "logs", job, "--follow"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    time.sleep(5)
    guards = members.running("jobs.driver.guard")
    assert guards
    for guard in guards:  # the machine goes, and they with it
        guard.kill()
    for pid in record.read().daemons:
        _kill(pid)
    output, _ = follow.communicate(timeout=70)
    assert follow.returncode == 1
    assert "does not answer" in output
    (folder,) = (storage / "runs").glob("lost-*")
    import ray

    ray.shutdown()
    local.down(job_grace_s=0)
    local.up(nodes=1, cpus=1, cpus_per_node=1)
    assert outbox.pending(storage / "runs") == [folder / "spool"], "its driver and its guard are gone"
    outbox.settle(folder / "spool")
    assert Faulted("", folder, []).run.info.status == "FAILED"
    found = run(tmp_path, storage, "lost", *settings)
    assert found.folder == folder
    assert found.status == "SUCCEEDED", found.log
    assert any("goes on" in line for line in found.log)
    assert found.run.info.status == "FINISHED"
    assert sorted(found.losses()) == list(range(1, 201))


def _kill(pid: int) -> None:
    """Kill a daemon, what it started and its supervisor, as when a machine goes; forked workers are not below it."""
    process = psutil.Process(pid)
    parent = process.parent()
    keeper = [parent] if parent and "cluster.supervisor" in parent.cmdline() else []
    for one in (*keeper, process, *process.children(recursive=True), *forked_for(process)):
        if one.is_running():
            one.send_signal(signal.SIGKILL)


def _kept(cluster: record.LocalCluster, number: int) -> supervisor.State:
    state = supervisor.read(cluster.node_folder(number))
    assert state is not None
    return state


def _attempts(storage: Path, name: str) -> int:
    (folder,) = (storage / "runs").glob(f"{name}-????????-*")
    return len({path.name.partition("-rank-")[0] for path in (folder / "logs").glob("*-rank-0.log")})


def _add_node(number: int) -> None:
    cluster = record.read()
    folder = cluster.ray_dir / f"n{number}"
    command = daemons.node_command(cluster.ray_address, daemons.loopback_address(number), folder, 1, 0)
    log = home.home() / f"node-{number}.log"
    process = daemons.start_ray(command, daemons.environment(cluster.id, cluster.token_path), log)
    daemons.wait_for_ray(process, f"Ray node {number}", log)
    record.write(local._with_session(record.read(), process.pid))


def _raylet_of(node: topology.Node) -> int:
    (raylet,) = [p for p in members.running(f"--node_ip_address={node.address}") if p.name() == "raylet"]
    return raylet.pid


def _drain(node_id: str, deadline_s: int) -> None:
    """What a cloud's notice of a spot instance comes to in Ray."""
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    client = GcsClient(address=connection().ray_address)
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, why = client.drain_node(node_id, reason, "spot", int((time.time() + deadline_s) * 1000))
    assert accepted, why


def _spooled(storage: Path, name: str) -> list[bytes]:
    paths = (storage / "runs").glob(f"{name}-????????-*/spool/rank-0.jsonl")
    return [line for path in paths for line in path.read_bytes().splitlines() if b'"workers"' in line]


def _steps(storage: Path, name: str, workers: int) -> int:
    return sum(f'"workers": {workers}'.encode() in line for line in _spooled(storage, name))


def _workers_now(storage: Path, name: str) -> int:
    return int(float(_spooled(storage, name)[-1].split(b'"workers": ')[1].split(b",")[0].rstrip(b"}")))


def _wait_for(condition, what: str, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {timeout_s} s"
        time.sleep(0.2)
