"""A model that lies in a store alone, served: each node fetches it once, and refuses by name what is not as it was."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.errors import UserError
from cluster.home import home
from serve import endpoints
from serve.spec import ServeSpec
from tests.support import moto_server, tiny_models
from tests.support.moto_server import MotoServer
from tests.support.own_cluster import own_cluster
from tracking import model_store, registry

PLACES = ("bucket/runs/one/model", "bucket/runs/two/model")


@dataclass
class Served:
    """A cluster with a home of its own, and a store in which two models lie."""

    server: MotoServer
    weights: list[bytes] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def up(self, **changes: Any) -> dict[str, Any]:
        model = {"model": "models:/far@champion", "resources": {"cpus_per_replica": 0.5}, **changes}
        spec = ServeSpec.model_validate({"models": {"far": model}, "drain_s": 5, "start_timeout_s": 180})
        self.said.clear()
        return endpoints.up(spec, self.said.append)

    def cached(self) -> list[Path]:
        """List the weights on this node."""
        return sorted((home() / "cache" / "weights").glob("*.safetensors"))

    def become_fresh(self) -> None:
        """Have nothing of a model on this node; replicas that run go on."""
        shutil.rmtree(home() / "cache")

    def damage(self, key: str, content: bytes) -> None:
        with self.server.client().open_output_stream(key) as stream:  # type: ignore[attr-defined]
            stream.write(content)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with pytest.MonkeyPatch.context() as patch, moto_server.running(patch) as server, own_cluster(cpus=3) as cluster:
        patch.setenv("MLFLOW_TRACKING_URI", cluster.mlflow_url)
        found = Served(server)
        for seed, place in enumerate(PLACES):
            folder = tiny_models.language_model(tmp_path_factory.mktemp("model") / "model", seed, context=64)
            model_store.put(folder, server.uri(place))
            found.weights.append((folder / "model.safetensors").read_bytes())
            shutil.rmtree(folder)
        registry.register("far", server.uri(PLACES[0]), run_id=None, alias="champion")
        yield found
        endpoints.down(print)


def complete(endpoint: str) -> str:
    asked = {"model": "far", "prompt": "a", "max_tokens": 4, "temperature": 0}
    answer = httpx.post(f"{endpoint}/v1/completions", json=asked, timeout=60)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def test_it_is_served_and_scaled_on_fresh_nodes_rolled_out_and_refused_by_name(served: Served) -> None:
    outcome = served.up()
    first = complete(outcome["endpoint"])
    assert outcome["models"]["far"]["version"] == "1"
    assert [each.stat().st_size for each in served.cached()] == [len(served.weights[0])]
    told = httpx.get(f"{outcome['endpoint']}/v1/models", timeout=60).text
    assert "127.0.0.1" not in told
    assert "bucket" not in told

    served.become_fresh()
    served.up(replicas={"min": 2, "max": 2})
    assert len(served.cached()) == 1, "the new replica has fetched it again"
    assert {complete(outcome["endpoint"]) for _ in range(4)} == {first}

    registry.register("far", served.server.uri(PLACES[1]), run_id=None, alias="champion")
    assert served.up()["models"]["far"]["version"] == "2"
    complete(outcome["endpoint"])
    assert len(served.cached()) == 2


def test_a_fresh_node_refuses_what_was_damaged(served: Served) -> None:
    served.up(model="models:/far/1")
    endpoints.down(print)
    served.become_fresh()
    rotten = bytearray(served.weights[0])
    rotten[-1] ^= 1
    served.damage(f"{PLACES[0]}/model.safetensors", bytes(rotten))
    with pytest.raises(UserError, match=rf"s3://{PLACES[0]}/model.safetensors is not what was exported"):
        served.up(model="models:/far/1")
    endpoints.down(print)
    assert served.cached() == []
    served.damage(f"{PLACES[0]}/model.safetensors", served.weights[0])
    served.become_fresh()
    config = f"{PLACES[0]}/config.json"
    served.damage(config, b"{}")
    with pytest.raises(UserError, match=rf"s3://{PLACES[0]}/config.json is not what was put there"):
        served.up(model="models:/far/1")
