"""The dashboard asks for what /metrics tells and shows all of it; Ray's Grafana loads it; all listens on loopback."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from ray.dashboard.modules.metrics.metrics_head import MetricsHead

from serve.metrics.exposition import of_replicas, write
from serve.metrics.record import Record
from serve.metrics.series import SERIES, Sample
from tools import grafana_dashboard

ROOT = Path(__file__).parents[2]
OBSERVE = ROOT / "cluster" / "observe"
TOOLS = ("sh", "cat", "cp", "dirname", "kill", "mkdir", "seq", "setsid", "sleep")
NAME = re.compile(r"\btandem_\w+")
SELECTED = re.compile(r"\b(tandem_\w+)(\{[^}]*\})?")
BY = re.compile(r"by \(([^)]*)\)")


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((OBSERVE / "tandem.json").read_text())
    return loaded


@pytest.fixture(scope="module")
def told() -> dict[str, set[str]]:
    """The samples' names of an endpoint that has seen everything, with their labels."""
    record = Record("g")
    record.request("m", "/v1/completions", 200)
    record.error("m", "overloaded")
    record.keys.add("alice", "m", "prompt", 1)
    extra = [
        Sample("tandem_scaling_replicas_wanted", {"model": "m"}, 1),
        Sample("tandem_scaling_decisions_total", {"model": "m", "direction": "up"}, 1),
        Sample("tandem_scaling_last_decision_info", {"model": "m", "reason": "rate"}, 1),
    ]
    body, _ = write([record.snapshot(["m"])], [*of_replicas(["m"], [], Counter(), 1), *extra], None)
    families = text_string_to_metric_families(body.decode())
    return {sample.name: set(sample.labels) for family in families for sample in family.samples}


def graphs(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def expressions(dashboard: dict[str, Any]) -> Iterator[str]:
    for panel in graphs(dashboard):
        yield from (target["expr"] for target in panel["targets"])
    yield from (variable["definition"] for variable in dashboard["templating"]["list"] if "definition" in variable)


def test_the_file_is_what_its_tool_makes(capsys: pytest.CaptureFixture[str]) -> None:
    assert grafana_dashboard.main(["--check"]) == 0, capsys.readouterr().out


def test_every_query_asks_for_what_is_told(dashboard: dict[str, Any], told: dict[str, set[str]]) -> None:
    for expression in expressions(dashboard):
        named = SELECTED.findall(expression)
        assert named, expression
        available: set[str] = set()
        for name, selector in named:
            assert name in told, expression
            assert set(re.findall(r"(\w+)=", selector)) <= told[name], expression
            available |= told[name]
        for by in BY.findall(expression):
            assert set(re.split(r",\s*", by)) <= available, expression


def test_everything_that_is_told_is_shown(dashboard: dict[str, Any], told: dict[str, set[str]]) -> None:
    asked = {name.removesuffix("_bucket") for e in expressions(dashboard) for name in NAME.findall(e)}
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in told}
    assert families == set(SERIES), "the fixture has seen every series"
    assert asked == families


def test_counters_are_rated_before_they_are_summed(dashboard: dict[str, Any]) -> None:
    for expression in expressions(dashboard):
        for name, series in SERIES.items():
            if series.kind != "gauge" and name in expression:
                found = re.findall(rf"(rate|increase)\({name}(?:_bucket)?\{{", expression)
                assert len(found) == expression.count(name), expression


def test_legends_name_labels_that_their_queries_leave(dashboard: dict[str, Any]) -> None:
    for panel in graphs(dashboard):
        for target in panel["targets"]:
            kept = {label.strip() for by in BY.findall(target["expr"]) for label in by.split(",")}
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= kept, target


def test_panels_have_places_of_their_own(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken
        assert at["x"] + at["w"] <= 24
        taken |= cells
    rows = [panel["title"] for panel in panels if panel["type"] == "row"]
    assert rows == ["Traffic", "Latency", "Tokens", "Errors", "Replicas", "Cache", "Keys"]


def test_rays_grafana_finds_it_in_the_folder_that_ray_is_told_of(tmp_path: Path) -> None:
    """Ray empties its own folder when it starts, and leaves one of ours as it is."""
    ours, session = tmp_path / "dashboards", tmp_path / "metrics" / "grafana"
    ours.mkdir()
    shutil.copy(OBSERVE / "tandem.json", ours)
    head = SimpleNamespace(
        _grafana_config_output_path=str(session),
        _grafana_session_latest_config_output_path=str(session),
        _grafana_dashboard_output_dir=str(ours),
        _prometheus_name="Prometheus",
        _dashboard_uids={},
    )
    MetricsHead._create_default_grafana_configs(head)
    provider = yaml.safe_load((session / "provisioning" / "dashboards" / "default.yml").read_text())
    assert provider["providers"][0]["options"]["path"] == str(ours)
    uids = {json.loads(path.read_text())["uid"] for path in ours.glob("*.json")}
    assert "tandem-endpoint" in uids
    assert len(uids) == len(list(ours.glob("*.json"))) > 5


def test_prometheus_reads_rays_nodes_and_the_endpoint_with_a_key_from_a_file() -> None:
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    nodes, endpoint = yaml.safe_load((OBSERVE / "prometheus.yml").read_text())["scrape_configs"]
    assert nodes["file_sd_configs"][0]["files"] == [f"/tmp/ray/session_latest/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]
    assert endpoint["authorization"] == {"credentials_file": "metrics-key"}
    assert "metrics_path" not in endpoint, "/metrics is Prometheus' own default"


@pytest.fixture
def head(tmp_path: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """A head with the few commands that the script needs, and nothing to start."""
    bin_, home = tmp_path / "bin", tmp_path / "observe"
    bin_.mkdir()
    for tool in TOOLS:
        if (found := shutil.which(tool)) is not None:
            (bin_ / tool).symlink_to(found)
    yield home, {"PATH": str(bin_), "HOME": str(tmp_path), "TANDEM_RAY_SESSION": str(tmp_path / "session")}
    for pid in home.glob("*.pid"):
        os.kill(int(pid.read_text()), signal.SIGKILL)


def started(environment: dict[str, str]) -> list[str]:
    command = ["sh", str(OBSERVE / "start.sh")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_a_head_without_prometheus_and_grafana_is_told_so(head: tuple[Path, dict[str, str]]) -> None:
    home, environment = head
    said = started(environment)
    assert said == [f"{a} is not installed here: no {b} on the PATH"
                    for a, b in (("prometheus", "prometheus"), ("grafana", "grafana-server"))]  # fmt: skip
    assert (home / "metrics-key").stat().st_mode & 0o777 == 0o600
    (home / "prometheus.yml").write_text("mine")
    (home / "metrics-key").write_text("secret")
    (home / "dashboards" / "tandem.json").write_text("old")
    started(environment)
    assert (home / "prometheus.yml").read_text() == "mine"
    assert (home / "metrics-key").read_text() == "secret"
    assert (home / "dashboards" / "tandem.json").read_bytes() == (OBSERVE / "tandem.json").read_bytes()


def test_both_are_started_once_on_loopback(head: tuple[Path, dict[str, str]]) -> None:
    home, environment = head
    for name in ("prometheus", "grafana-server"):
        program = Path(environment["PATH"]) / name
        program.write_text(f'#!/bin/sh\necho "$GF_SERVER_HTTP_ADDR" "$@" > "{home}/{name}.seen"\nexec sleep 60\n')
        program.chmod(0o755)
    ini = Path(environment["TANDEM_RAY_SESSION"]) / "metrics" / "grafana" / "grafana.ini"
    ini.parent.mkdir(parents=True)
    ini.touch()
    assert [line.split(",")[0] for line in started(environment)] == ["prometheus is started", "grafana is started"]
    seen = [home / f"{name}.seen" for name in ("prometheus", "grafana-server")]
    deadline = time.monotonic() + 10
    while not all(path.exists() and path.read_text() for path in seen):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert "--web.listen-address=127.0.0.1:9090" in seen[0].read_text()
    assert seen[1].read_text().startswith(f"127.0.0.1 --config={ini}")
    assert started(environment) == ["prometheus runs already", "grafana runs already"]
