"""What `serve status` misses is said, and is exit code 1; recorded values of Ray Serve's REST API."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.errors import UserError
from serve import endpoints, served, shortfalls
from serve.deploy.where import Address

STARTING = {"replica_id": "a", "node_ip": "10.0.0.2", "state": "STARTING"}
RUNNING = {"replica_id": "b", "node_ip": "10.0.0.1", "state": "RUNNING"}


UNREACHABLE = (
    "http://h:1 does not answer from here: a gateway that hangs is replaced within half a minute; if this "
    "stays, `tandem serve down` and `tandem serve up SPEC`"
)


def model(status: str = "RUNNING", running: int = 1, target: int = 1, **more: Any) -> dict[str, Any]:
    replicas = {"running": running, "target": target, "least": target, "states": []}
    return {"status": status, "replicas": replicas, "message": "", "no_room": None, **more}


def status(**changed: Any) -> dict[str, Any]:
    whole = {"endpoint": "http://h:1", "reachable": True, "gateway": model(), "models": {"m": model()}}
    return {**whole, **changed}


def test_all_is_well() -> None:
    assert shortfalls.found(status()) == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"models": {"m": model("DEPLOYING", 0, no_room="no room for 1 replica")}},
         "m: deploying, 0 of 1 replicas run: no room for 1 replica"),
        ({"models": {"m": model(running=1, target=2)}}, "m: running, 1 of 2 replicas run"),
        ({"models": {"m": model("UNHEALTHY", message="it failed")}}, "m: unhealthy, 1 of 1 replicas run: it failed"),
        ({"gateway": model("DEPLOY_FAILED", 0)}, "(gateway): deploy_failed, 0 of 1 replicas run"),
        ({"reachable": False}, UNREACHABLE),
    ],
)  # fmt: skip
def test_what_is_missing_is_said(changed: dict[str, Any], said: str) -> None:
    assert shortfalls.found(status(**changed)) == [said]


def test_load_that_adds_replicas_is_nothing_missing_until_there_is_no_room() -> None:
    scaled = {"bounds": {"least": 1, "most": 2}}
    assert endpoints._least(2, scaled) == 1
    assert endpoints._least(0, {"bounds": {"least": 0, "most": 2}}) == 0
    assert endpoints._least(2, None) == 2
    growing = model()
    growing["replicas"] = {"running": 1, "target": 2, "least": 1, "states": []}
    assert shortfalls.of_model(growing) is None
    assert shortfalls.of_model({**growing, "no_room": "no room"}) == "running, 1 of 2 replicas run: no room"


def test_an_endpoint_on_all_addresses_is_named_by_a_node_whose_gateway_runs() -> None:
    application = {"deployments": {"gateway": {"replicas": [{**STARTING, "pid": 1}, {**RUNNING, "pid": 2}]}}}
    gateways = endpoints._gateways(application)
    assert gateways == [STARTING, RUNNING]
    assert endpoints._endpoint(Address("0.0.0.0", 8000), gateways) == "http://10.0.0.1:8000"
    assert endpoints._endpoint(Address("0.0.0.0", 8000), []) == "http://127.0.0.1:8000"


def test_what_down_left_is_named() -> None:
    assert shortfalls.left_over({"tandem": 1, "tandem.m": 1, "tandems": 1, "other.m": 1}, "tandem") == [
        "tandem",
        "tandem.m",
    ]


@pytest.mark.parametrize(
    ("cluster", "here", "is_local", "expected"),
    [
        ("1f", "1f", True, "here"),
        ("1f", "2e", True, "gone"),
        ("1f", "address:h:6379", False, "elsewhere"),
        ("address:h:6379", "address:h:6379", False, "here"),
        ("address:h:6379", "address:i:6379", False, "elsewhere"),
        ("address:h:6379", "2e", True, "elsewhere"),
        ("", "address:h:6379", False, "here"),
        ("", "2e", True, "elsewhere"),
    ],
)
def test_what_was_brought_up_is_here_gone_or_elsewhere(cluster: str, here: str, is_local: bool, expected: str) -> None:
    assert served.place(cluster, here, is_local) == expected


@pytest.mark.parametrize(
    ("where", "said"),
    [
        (
            "here",
            "m at http://h:1 was stopped from elsewhere, or Ray Serve has ended: `tandem serve up SPEC` serves it",
        ),
        ("gone", "m at http://h:1 ended with the cluster: `tandem serve up SPEC` serves it again"),
        ("elsewhere", "m at http://h:1 was brought up on another cluster, h:6379"),
    ],
)
def test_what_became_of_it_is_not_claimed_of_another_cluster(where: served.Place, said: str) -> None:
    lost = served.Served("tandem", "http://h:1", ("m",), cluster="address:h:6379", place=where)
    assert lost.sentence.startswith(said)


@pytest.mark.parametrize("written", ["", '{"name": "tan', "[]", '{"name": "tandem"}'])
def test_a_file_that_was_cut_is_a_sentence_and_up_goes_on(
    written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path))
    (tmp_path / "serve.json").write_text(written)
    with pytest.raises(UserError, match=r"serve\.json cannot be read: remove it"):
        served.remembered()
    assert served.environment() == {}
