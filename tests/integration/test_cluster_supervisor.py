"""The supervisor of a node, with a process in place of Ray (cluster/supervisor.py)."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from cluster import processes, supervisor
from cluster.errors import UserError
from cluster.supervisor import Node, State, parsed

ROOT = Path(__file__).parents[2]


def test_what_follows_two_dashes_is_how_ray_is_started(tmp_path: Path) -> None:
    options = ["--address", "head:6379", "--folder", str(tmp_path)]
    what, node = parsed(["start", *options, "--", "ray", "start", "--address=head:6379", "--num-cpus", "1"])
    assert what == "start"
    assert node.command == ("ray", "start", "--address=head:6379", "--num-cpus", "1")
    assert (node.address, node.folder, node.log) == ("head:6379", tmp_path, tmp_path / supervisor.LOG)
    assert parsed(["stop"])[0] == "stop"


@pytest.mark.parametrize("line", [["start"], ["start", "--address", "a:1"], ["start", "--", "ray"], ["begin"]])
def test_half_a_command_line_is_refused(line: list[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        parsed(line)
    assert refused.value.code == 2


def fake_ray(folder: Path, then: str) -> Path:
    """Make a `ray start` that leaves a process called raylet behind, as Ray does; return its path."""
    raylet, script = folder / "raylet", folder / "ray.py"
    raylet.write_text(f"#!{sys.executable}\nimport time\n{then}\n")
    raylet.chmod(0o755)
    script.write_text(f"import subprocess\nsubprocess.Popen([{str(raylet)!r}])\n")
    return script


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path) -> Iterator[None]:
    """End what a test that failed has left behind."""
    yield
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if str(tmp_path) in " ".join(process.cmdline()):
                process.kill()


def kept(tmp_path: Path, then: str = "time.sleep(600)") -> Node:
    (tmp_path / "cluster.json").write_text('{"id": "mine"}')
    command = (sys.executable, str(fake_ray(tmp_path, then)))
    return Node(command, "127.0.0.1:1", tmp_path / "n1", tmp_path / "n1.log", tmp_path / "cluster.json", "mine")


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def wait_until(condition: Callable[[], object]) -> None:
    for _ in range(300):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it did not come to that within 30 s")


def wait_for(node: Node, state: str) -> State:
    wait_until(lambda: (found := supervisor.read(node.folder)) and found.state == state)
    found = supervisor.read(node.folder)
    assert found is not None
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="how an adopted process ended is known on Linux")
def test_a_raylet_that_is_asked_to_stop_is_left_alone(tmp_path: Path) -> None:
    node = kept(tmp_path)
    pid, _ = supervisor.begin(node, environment())
    raylet = supervisor.wait(node, pid, "it")
    assert psutil.Process(raylet).ppid() == pid, "it was adopted"
    os.kill(raylet, signal.SIGTERM)
    assert wait_for(node, "ended").reason == "its raylet was asked to stop"
    psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=10)
    assert processes.born(pid) is None


def test_a_raylet_that_dies_leaves_nobody_and_is_started_again_only_once_the_head_answers(tmp_path: Path) -> None:
    node = kept(tmp_path, "import subprocess\nsubprocess.Popen(['sleep', '600'])\ntime.sleep(600)")
    pid, _ = supervisor.begin(node, environment())
    raylet = supervisor.wait(node, pid, "it")
    wait_until(lambda: psutil.Process(raylet).children())
    (left,) = psutil.Process(raylet).children()
    os.kill(raylet, signal.SIGKILL)
    down = wait_for(node, "down")
    assert "SIGKILL" in down.reason or sys.platform != "linux"
    psutil.wait_procs([left], timeout=20)
    assert not left.is_running(), "what it left is gone"
    wait_until(lambda: "the head does not answer" in node.log.read_text())
    assert f"what it left had to be ended: processes {left.pid}\n" in node.log.read_text()
    assert down.lives
    assert supervisor.stop(node.folder)
    assert not supervisor.stop(node.folder), "there is none any more"


def test_it_ends_with_its_cluster(tmp_path: Path) -> None:
    node = kept(tmp_path)
    pid, _ = supervisor.begin(node, environment())
    raylet = supervisor.wait(node, pid, "it")
    (tmp_path / "cluster.json").write_text('{"id": "another"}')
    assert wait_for(node, "ended").reason == "its cluster was ended"
    psutil.Process(raylet).kill()


def test_a_start_that_fails_shows_the_end_of_the_log(tmp_path: Path) -> None:
    command = (sys.executable, "-c", "raise SystemExit('no such head')")
    node = Node(command, "127.0.0.1:1", tmp_path / "n1", tmp_path / "n1.log")
    pid, _ = supervisor.begin(node, environment())
    with pytest.raises(UserError, match=r"(?s)Ray did not start; .*no such head"):
        supervisor.wait(node, pid, "Ray")
