"""`ray-cluster.yaml` is what Ray's launcher takes, and does what its comments say."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.ray_process_internals import HEALTH_CHECK

ROOT = Path(__file__).parents[2]
COMMANDS = ("setup_commands", "head_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")


@pytest.fixture
def config() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "ray-cluster.yaml").read_text())
    return loaded


def test_it_passes_rays_schema_and_rays_own_checks(config: dict[str, Any]) -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    prepared = prepare_config(config)
    validate_config(prepared)
    assert prepared["head_node_type"] in prepared["available_node_types"]


def test_gpu_workers_scale_from_zero(config: dict[str, Any]) -> None:
    worker = config["available_node_types"]["gpu_worker"]
    assert worker["min_workers"] == 0
    assert worker["max_workers"] > 0
    assert worker["resources"]["GPU"] >= 1


def test_every_node_installs_the_pins_and_reaches_mlflow(config: dict[str, Any]) -> None:
    assert any("--constraint $HOME/tandem/constraints.txt" in command for command in config["setup_commands"])
    assert "~/tandem/constraints.txt" in config["file_mounts"]
    for start in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert any("export MLFLOW_TRACKING_URI=http://" in command for command in config[start])


def test_ray_never_starts_without_the_token(config: dict[str, Any]) -> None:
    starts = [command for key in COMMANDS for command in config[key] if "ray start" in command]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in command for command in starts)
    assert config["cluster_synced_files"] == ["~/.ray/auth_token"]


@pytest.mark.parametrize("key", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_silent_nodes_are_noticed_as_fast_as_on_the_embedded_cluster(config: dict[str, Any], key: str) -> None:
    (start,) = (command for command in config[key] if "ray start" in command)
    assert dict(re.findall(r"(RAY_health_check_\w+)=(\d+)", start)) == HEALTH_CHECK
    assert re.findall(r"export (?:RAY_health_check_\w+=\d+ ?)+;", start), "they are exported"


def test_workers_are_started_by_a_supervisor_in_place_of_the_one_before(config: dict[str, Any]) -> None:
    stop, ray_stop, start = config["worker_start_ray_commands"]
    assert stop.endswith("-m cluster.supervisor stop")
    assert ray_stop.endswith("ray stop")
    address = "$RAY_HEAD_IP:6379"
    assert f"-m cluster.supervisor start --address {address} -- $HOME" in start
    assert f"ray start --address={address} " in start


@pytest.mark.parametrize("key", COMMANDS)
def test_commands_are_shell(config: dict[str, Any], key: str) -> None:
    for command in config[key]:
        subprocess.run(["bash", "-n", "-c", command], check=True)


def test_what_it_ships_exists(config: dict[str, Any]) -> None:
    missing = [path for path in config["file_mounts"].values() if not (ROOT / path).exists()]
    assert missing == []


def test_the_changes_for_on_premise_machines_are_enough(config: dict[str, Any]) -> None:
    config["provider"] = {"type": "local", "head_ip": "10.0.0.1", "worker_ips": ["10.0.0.2", "10.0.0.3"]}
    config["auth"]["ssh_private_key"] = "~/.ssh/id_ed25519"
    del config["available_node_types"], config["head_node_type"]
    prepared = prepare_config(config)
    validate_config(prepared)
    assert prepared["available_node_types"]["local.cluster.node"]["min_workers"] == 2


def test_grafana_is_told_of_the_folder_that_tandems_dashboard_lies_in(config: dict[str, Any]) -> None:
    from ray.dashboard.modules.metrics import metrics_head

    start, observe = config["head_start_ray_commands"][-2:]
    assert f"export {metrics_head.GRAFANA_DASHBOARD_OUTPUT_DIR_ENV_VAR}=$HOME/observe/dashboards;" in start
    assert observe == "sh ~/tandem/cluster/observe/start.sh"
    assert config["file_mounts"]["~/tandem/cluster"] == "cluster"
