"""Where the tracking server is found."""

import json
from pathlib import Path

import pytest

from tracking.address import tracking_uri
from tracking.errors import TrackingError


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path))
    return tmp_path


def test_the_argument_beats_the_environment_beats_the_cluster(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "cluster.json").write_text(json.dumps({"mlflow_url": "http://cluster:1/"}))
    assert tracking_uri() == "http://cluster:1"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://environment:2")
    assert tracking_uri() == "http://environment:2"
    assert tracking_uri("http://argument:3") == "http://argument:3"


@pytest.mark.parametrize("state", [None, "{", "[]", "{}"])
def test_without_a_server_the_error_says_how_to_get_one(home: Path, state: str | None) -> None:
    if state is not None:
        (home / "cluster.json").write_text(state)
    with pytest.raises(TrackingError, match="tandem cluster up") as raised:
        tracking_uri()
    assert raised.value.exit_code == 2
