"""Where workers go, and what a refusal says."""

import pytest

from cluster.placement import Placement, Refusal, Request, fit, fit_most
from cluster.topology import Node


def node(name: str, cpus: float, free: float | None = None, gpus: float = 0, free_gpus: float | None = None) -> Node:
    return Node(
        node_id=name,
        address=name,
        alive=True,
        is_head=False,
        total_cpus=cpus,
        free_cpus=cpus if free is None else free,
        total_gpus=gpus,
        free_gpus=gpus if free_gpus is None else free_gpus,
    )


def test_fewest_nodes_are_used() -> None:
    placed = fit(Request(workers=4, cpus_per_worker=1), [node("small", 2), node("large", 8), node("middle", 4)])
    assert placed == Placement({"large": 4})


def test_workers_spill_to_the_next_node_but_never_span_two() -> None:
    nodes = [node("a", 3), node("b", 3)]
    assert fit(Request(workers=2, cpus_per_worker=2), nodes) == Placement({"a": 1, "b": 1})
    refusal = fit(Request(workers=3, cpus_per_worker=2), nodes)
    assert isinstance(refusal, Refusal)
    assert not refusal.fits_when_free
    assert "at most 2 workers" in refusal.what_would_help


def test_heterogeneous_nodes_are_limited_by_the_scarcer_resource() -> None:
    nodes = [node("cpus", 64), node("gpus", 4, gpus=8), node("one", 16, gpus=1)]
    placed = fit(Request(workers=3, cpus_per_worker=2, gpus_per_worker=1), nodes)
    assert placed == Placement({"gpus": 2, "one": 1})


def test_fractions_add_up() -> None:
    tenths = [node("a", 1, free=1 - 7 * 0.1)]  # 0.29999999999999993
    assert fit(Request(workers=3, cpus_per_worker=0.1), tenths) == Placement({"a": 3})
    assert isinstance(fit(Request(workers=4, cpus_per_worker=0.1), tenths), Refusal)


def test_busy_resources_are_worth_waiting_for() -> None:
    refusal = fit(Request(workers=4, cpus_per_worker=1), [node("a", 4, free=1), node("b", 2, free=0)])
    assert isinstance(refusal, Refusal)
    assert refusal.fits_when_free
    assert refusal.reason == "4 workers with 1 CPU each do not fit now, 1 CPU and 0 GPUs free"
    assert refusal.what_would_help == "wait until other work ends, or ask for 1 worker"


def test_gpus_on_a_cluster_without_any() -> None:
    refusal = fit(Request(workers=1, cpus_per_worker=1, gpus_per_worker=1), [node("a", 4)])
    assert isinstance(refusal, Refusal)
    assert "gpus_per_worker to 0" in refusal.what_would_help


def test_worker_larger_than_any_node() -> None:
    refusal = fit(Request(workers=1, cpus_per_worker=8), [node("a", 4), node("b", 6)])
    assert isinstance(refusal, Refusal)
    assert "the largest has 6 CPUs" in refusal.what_would_help


def test_dead_nodes_do_not_count() -> None:
    dead = Node("dead", "dead", alive=False, is_head=False, total_cpus=8, free_cpus=8)
    refusal = fit(Request(workers=1), [dead])
    assert isinstance(refusal, Refusal)
    assert refusal.what_would_help == "start nodes"


def test_workers_that_need_nothing_fit_anywhere() -> None:
    assert fit(Request(workers=5, cpus_per_worker=0), [node("a", 0)]) == Placement({"a": 5})


@pytest.mark.parametrize("request_", [Request(workers=0), Request(workers=1, cpus_per_worker=-1)])
def test_senseless_requests(request_: Request) -> None:
    with pytest.raises(ValueError, match="not a request"):
        fit(request_, [node("a", 4)])


@pytest.mark.parametrize(
    ("most", "fewest", "placed"),
    [(2, 1, {"a": 2}), (8, 1, {"a": 3, "b": 1}), (10**9, 4, {"a": 3, "b": 1}), (10**9, 5, None)],
)
def test_as_many_as_are_free_are_placed_at_once_however_many_are_asked_for(most, fewest, placed) -> None:
    found = fit_most(Request(most, 1), fewest, [node("a", 8, free=3), node("b", 1)])
    if placed is None:
        assert isinstance(found, Refusal)
        assert found.fits_when_free
    else:
        assert found == Placement(placed)
