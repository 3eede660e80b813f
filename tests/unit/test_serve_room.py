"""Room for replicas, from what Serve's REST API and the nodes tell: what is asked, what is free, the way out."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.topology import Node
from serve.deploy import checks, room
from serve.spec import ServeSpec


def node(name: str = "a", total: float = 4, free: float = 4, gpus: float = 0, alive: bool = True) -> Node:
    return Node(name * 8, "10.0.0.1", alive, name == "a", total, free, gpus, gpus)


def application(*states: tuple[str, str | None], cpus: float | None = 1, gpus: float = 0) -> dict[str, Any]:
    """An application as Serve's REST API tells it, with the node of each replica that has one."""
    replicas = [{"state": state, "node_id": node_id, "pid": None} for state, node_id in states]
    options = {"num_gpus": gpus, **({} if cpus is None else {"num_cpus": cpus})}
    return {"deployments": {"engine": {"replicas": replicas, "deployment_config": {"ray_actor_options": options}}}}


@pytest.mark.parametrize(
    ("replicas", "cpus", "gpus", "nodes", "said"),
    [
        (1, 64, 0, [node()], "1 replica with 64 CPUs can never fit: the cluster has 4 CPUs and 0 GPUs: a replica "
         "runs on one node, and the largest has 4 CPUs and 0 GPUs; ask for less under `resources`, or add nodes"),
        (1, 6, 0, [node("a"), node("b")], "the cluster has 8 CPUs and 0 GPUs: a replica runs on one node"),
        (3, 2, 0, [node()], "ask for at most 2 replicas of that size"),
        (1, 1, 1, [node()], "1 replica with 1 CPU and 1 GPU can never fit"),
        (1, 1, 1, [node()], "set resources.gpus_per_replica to 0, or add nodes with GPUs"),
        (1, 1, 0, [node(alive=False)], "start nodes"),
    ],
)  # fmt: skip
def test_what_never_fits_is_refused_with_the_way_out(
    replicas: int, cpus: float, gpus: float, nodes: list[Node], said: str
) -> None:
    sentence = room.never("models.m", replicas, cpus, gpus, nodes)
    assert sentence is not None
    assert sentence.startswith("models.m: ")
    assert said in sentence


def test_what_fits_when_all_is_free_may_wait() -> None:
    assert room.never("models.m", 2, 2, 0, [node(free=0)]) is None
    assert not room.fits_now(2, 2, 0, [node(free=0)])
    assert not room.fits_now(1, 3, 0, [node("a", free=2), node("b", free=2)]), "a replica never spans nodes"
    assert room.fits_now(2, 2, 0, [node()])


def test_replicas_without_a_node_are_said_with_what_is_free() -> None:
    found = room.lacking({"t.m": application(("RUNNING", "n"), ("STARTING", None))}, [node(free=0.5)])
    assert found == {
        "t.m": "no room for 1 replica with 1 CPU, 0.5 CPUs and 0 GPUs free: stop what else runs (`tandem jobs list`), "
        "ask for less under `resources`, or add nodes"
    }


def test_serve_counts_a_cpu_where_none_is_named() -> None:
    waiting = {"t.m": application(("STARTING", None), cpus=None)}
    assert "1 replica with 1 CPU," in room.lacking(waiting, [node(free=0)])["t.m"]


def test_replicas_on_their_way_lack_nothing() -> None:
    apps = {"placed": application(("STARTING", "n")), "soon": application(("STARTING", None)), "ended": application()}
    assert room.lacking({"placed": apps["placed"]}, [node(free=0)]) == {}
    assert room.lacking(apps, [node(free=1)]) == {}


def test_a_cluster_that_shrank_is_said() -> None:
    found = room.lacking({"t.m": application(("STARTING", None), cpus=8)}, [node("a", free=1)])
    assert found["t.m"].startswith("no room for 1 replica with 8 CPUs, 1 CPU and 0 GPUs free: a replica runs on one")


@pytest.mark.parametrize(
    ("there", "free", "drain_s", "said"),
    [
        ({"tandem.m": 1}, 0, 300, True),
        ({"tandem.m": 1}, 4, 300, False),  # room for both
        ({}, 0, 300, False),  # nothing runs that could be drained
        ({"tandem.m": 1}, 0, 30, False),  # a request may wait for that
    ],
)
def test_an_update_without_room_says_that_it_drains_first(
    there: dict[str, int], free: float, drain_s: float, said: bool
) -> None:
    spec = ServeSpec.model_validate({"models": {"m": {"model": "models:/m"}}, "drain_s": drain_s})
    sentences = list(checks.drained_first(spec, [node(free=free)], there))
    assert len(sentences) == said
    assert all("drain_s (300 s)" in sentence and "max_wait_s (60 s)" in sentence for sentence in sentences)
