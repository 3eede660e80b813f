"""How far a cluster can grow (cluster/growth.py), and what is placed on one that can."""

import json
from pathlib import Path

import pytest
import yaml

from cluster import growth, placement
from cluster.errors import UserError
from cluster.placement import Refusal, Request
from cluster.topology import Node

HEAD = Node("head", "10.0.0.1", True, True, 8, 8)
LAUNCHER = Path(__file__).parents[2] / "ray-cluster.yaml"
ONE_GPU = Request(1, 1, 1)


def grown(told: str) -> list[Node]:
    return growth.at_full_size([HEAD], {growth.VARIABLE: told})


def test_our_launchers_file_names_the_gpu_workers_that_do_not_run_yet() -> None:
    nodes = grown(str(LAUNCHER))
    assert [node.is_head for node in nodes] == [True, *[False] * 8]
    assert all((node.total_cpus, node.total_gpus) == (8, 1) for node in nodes[1:])
    assert f"{growth.VARIABLE}=$HOME/ray_bootstrap_config.yaml" in LAUNCHER.read_text()


def test_a_job_for_gpus_waits_on_a_cluster_that_starts_them_and_is_refused_on_one_that_does_not() -> None:
    answer = placement.fit(ONE_GPU, [HEAD], grown(str(LAUNCHER)))
    assert isinstance(answer, Refusal)
    assert answer.fits_when_free
    assert str(answer) == (
        "1 worker with 1 CPU and 1 GPU each do not fit yet, the cluster has 8 CPUs and 0 GPUs on 1 node: "
        "its autoscaler is asked for more nodes"
    )
    for never in (placement.fit(ONE_GPU, [HEAD]), placement.fit(Request(9, 1, 1), [HEAD], grown(str(LAUNCHER)))):
        assert isinstance(never, Refusal)
        assert not never.fits_when_free


def test_types_as_json_and_the_clusters_own_limit() -> None:
    types = {"gpu": {"resources": {"CPU": 4, "GPU": 2}, "max_workers": 3}}
    assert [(n.total_cpus, n.total_gpus) for n in grown(json.dumps(types))[1:]] == [(4, 2)] * 3
    whole = {"max_workers": 2, "head_node_type": "head", "available_node_types": {"head": {}, **types}}
    assert len(grown(json.dumps(whole))) == 3


def test_nothing_is_told(tmp_path: Path) -> None:
    assert growth.at_full_size([HEAD], {}) == []
    own = tmp_path / "cluster.yaml"
    own.write_text(yaml.safe_dump({"provider": {"type": "local"}, "max_workers": 2, "available_node_types": {}}))
    assert grown(str(own)) == [HEAD]


@pytest.mark.parametrize("told", ["/no/such/file", "[]", '{"gpu": 3}', '{"gpu": {"max_workers": "many"}}', "{"])
def test_what_cannot_be_read_is_refused_by_its_name(told: str) -> None:
    with pytest.raises(UserError, match=growth.VARIABLE):
        grown(told)
