"""Which cluster is meant, and what travels with a job, without any cluster."""

import os
from pathlib import Path

import pytest

from cluster import connect, local
from cluster.errors import UserError
from cluster.home import home


@pytest.fixture(autouse=True)
def empty_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "home"))
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


def test_home_is_absolute_and_not_created(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TANDEM_HOME", "somewhere")
    assert home() == tmp_path / "somewhere"
    assert not home().exists()
    monkeypatch.setenv("TANDEM_HOME", "")
    assert home() == Path.home() / ".tandem"


def test_no_cluster_says_what_to_do() -> None:
    with pytest.raises(UserError, match="no cluster: run `tandem cluster up`, or set RAY_ADDRESS"):
        connect.connection()


def test_ray_without_mlflow_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI"):
        connect.connection()


def test_environment_names_the_cluster_and_its_token_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "https://ray.example.org")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example.org")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "mine")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    found = connect.connection()
    address, uri = "https://ray.example.org", "https://mlflow.example.org"
    assert found == connect.Connection(ray_address=address, jobs_address=address, tracking_uri=uri, is_local=False)
    assert (os.environ["RAY_AUTH_TOKEN"], os.environ["RAY_AUTH_MODE"]) == ("mine", "disabled")


def test_both_addresses_in_the_environment_leave_nothing_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://10.0.0.1:5000")
    started = local.up()
    assert (started.ray_address, started.mlflow_url, started.daemons) == ("", "", ())
    assert local.state() is None
    assert local.down() == 0


def test_jobs_elsewhere_get_the_tracking_uri_but_not_this_machines_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://10.0.0.1:5000")
    monkeypatch.delenv("TANDEM_HOME")
    shipped = connect.runtime_env(working_dir=Path("/specs"), env_vars={"A": "1"})
    assert shipped["env_vars"] == {"MLFLOW_TRACKING_URI": "http://10.0.0.1:5000", "A": "1"}
    assert shipped["working_dir"] == "/specs"


def test_the_four_packages_are_shipped_as_folders() -> None:
    folders = connect.packages()
    assert [folder.name for folder in folders] == ["cluster", "jobs", "serve", "tracking"]
    assert all(folder.is_absolute() and folder.is_dir() for folder in folders)


def test_init_ray_refuses_an_address_that_only_takes_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # a test before this one may have connected
    monkeypatch.setenv("RAY_ADDRESS", "http://10.0.0.1:8265")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://10.0.0.1:5000")
    with pytest.raises(UserError, match="reaches the Jobs API only"):
        connect.init_ray()


def test_unreachable_cluster_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://10.0.0.1:5000")
    with pytest.raises(UserError, match=r"the cluster at http://127.0.0.1:1 does not answer"):
        connect.job_client()
