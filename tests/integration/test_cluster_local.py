"""The local cluster's record and folders, without starting one."""

import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster import daemons, local
from cluster.errors import UserError
from cluster.processes import MARKER


@pytest.fixture(autouse=True)
def empty_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    monkeypatch.setenv("TANDEM_HOME", str(folder))
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    (folder / "logs").mkdir(parents=True)
    return folder


def record(folder: Path, **changed: object) -> Path:
    """Write a state file as an earlier `up` would have left it."""
    ray_dir = folder / "ray"
    ray_dir.mkdir(parents=True, exist_ok=True)
    fields = {"id": "earlier", "token_path": str(folder / "auth_token"), "ray_dir": str(ray_dir)}
    state = {
        **fields,
        "started_at": time.time(),
        "ray_address": "127.0.0.2:6379",
        "sessions": [],
        "daemons": [],
        **changed,
    }
    path = folder / "cluster.json"
    path.write_text(json.dumps(state))
    return path


def test_nothing_recorded_is_no_cluster() -> None:
    assert local.state() is None
    assert local.down() == 0


def test_recorded_cluster_whose_processes_are_gone_is_no_cluster(empty_home: Path) -> None:
    path = record(empty_home, daemons=[os.getpid()])  # this process lives, but is none of the cluster's
    assert local.state() is None
    assert local.down() == 0
    assert not path.exists()


def test_interrupted_start_is_no_cluster_but_is_cleaned_up(empty_home: Path) -> None:
    path = record(empty_home)
    left = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)"], env={**os.environ, MARKER: "earlier"}
    )
    assert local.state() is None
    assert local.down() == 1
    assert left.poll() is not None
    assert not path.exists()


def test_cluster_is_known_while_its_daemons_live(empty_home: Path) -> None:
    daemon = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)"], env={**os.environ, MARKER: "earlier"}
    )
    record(empty_home, daemons=[daemon.pid], raylets=[daemon.pid, os.getpid()])
    found = local.state()
    assert found is not None
    assert (found.ray_address, found.nodes, found.daemons) == ("127.0.0.2:6379", 1, (daemon.pid,))
    assert found.owns("127.0.0.2:6379")
    assert not found.owns("10.0.0.1:6379")
    assert local.down() == 1
    assert daemon.poll() is not None


def test_down_removes_ray_folder_outside_the_home(empty_home: Path, tmp_path: Path) -> None:
    short, inside = tmp_path / "short", empty_home / "ray"
    short.mkdir()
    record(empty_home, ray_dir=str(short))
    local.down()
    assert not short.exists()
    assert inside.exists()  # its logs are kept until the next start


def test_long_home_gets_a_short_folder_for_sockets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / ("long" * 20)))
    folder = local._new_ray_dir()
    try:
        assert folder.parent != local.home()
        assert len(str(folder) + local.LONGEST_SOCKET) <= local.SOCKET_PATH_BYTES
    finally:
        folder.rmdir()


def test_token_is_secret_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "auth_token"
    daemons.write_token(path)
    token = path.read_text()
    assert len(token) >= 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    daemons.write_token(path)
    assert path.read_text() == token
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_daemons_get_the_cluster_token_and_no_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of another cluster")
    env = daemons.environment("an id", tmp_path / "auth_token")
    assert "RAY_AUTH_TOKEN" not in env
    assert (env["RAY_AUTH_MODE"], env["RAY_AUTH_TOKEN_PATH"]) == ("token", str(tmp_path / "auth_token"))


def test_failed_start_shows_the_end_of_the_log(tmp_path: Path) -> None:
    log = tmp_path / "ray-head.log"
    process = daemons.start_ray([sys.executable, "-c", "raise SystemExit('disk full')"], dict(os.environ), log)
    with pytest.raises(UserError, match=r"(?s)the Ray head did not start \(exit code 1\).*disk full"):
        daemons.wait_for_ray(process, "the Ray head", log)
