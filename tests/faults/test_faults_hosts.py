"""Three hosts that share no folder: what is kept in an object store is enough, and a folder that is not shared is told.

The hosts are namespaces of this machine (tests/support/hosts.py), the store is moto's S3 server on one of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support import hosts, hosts_store
from tests.support.fault_runs import SPEC
from tests.support.hosts_store import Job, Site

STEPS = 40


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    hosts.need()
    with hosts_store.up() as found:
        yield found


def spec(site: Site, name: str, **more: Any) -> dict[str, Any]:
    return {**SPEC, "name": name, "resources": {"workers": 3}, "storage": site.storage, **more}


@pytest.fixture(scope="module")
def whole(site: Site) -> Job:
    """A run that nothing happened to."""
    found = site.job(spec(site, "whole", register={"model": "of-a-store", "alias": "staging"}))
    assert found.code == 0, found.log[-4000:]
    return found


def test_a_folder_that_each_node_has_of_its_own_is_refused_before_anything_starts(site: Site) -> None:
    found = site.job({**spec(site, "no-share"), "storage": "/root/own"})
    assert found.code == 2
    others = f"{site.hosts[1].address}, {site.hosts[2].address}"
    assert f"storage: /root/own is not one folder that all nodes reach: nodes {others}: there is no such" in found.log
    assert "set storage to an object store such as s3://" in found.log
    assert "reading the data" not in found.log
    assert "\ntandem: run " not in found.log
    assert not list(site.hosts[0].path("/root/own").glob(".tandem*")), "what it was tried with is gone"


def test_a_run_over_an_object_store_needs_no_shared_folder(site: Site, whole: Job) -> None:
    stored = site.objects(f"runs/{whole.run}/")
    names = [name.removeprefix(f"runs/{whole.run}/") for name in stored]
    assert json.loads(site.read(f"runs/{whole.run}/status.json")) == {"status": "FINISHED"}
    assert {"evaluations.json", "spool/rank-0.jsonl", "spool/system-node-2.jsonl"} <= set(names)
    assert sum(name.startswith("checkpoints/step-00000040/") for name in names) == 4, "three shards and a manifest"
    assert len([name for name in names if name.startswith("logs/")]) == 3, "what each rank printed, on its own host"
    assert sorted(site.losses(whole.run)) == list(range(1, STEPS + 1))
    weights = site.objects(f"models/{whole.run}/")
    assert [name.rpartition("/")[2] for name in weights] == ["model.safetensors"]
    for host in site.hosts:
        (data,) = host.path("/root/home/stores").glob("*/data/*/train-00000.arrow")
        assert data.stat().st_size
    assert not list(site.hosts[1].path("/root/home/stores").glob("*/runs/*/*.safetensors"))


def test_a_run_goes_on_where_nothing_of_it_is_on_any_disk(site: Site, whole: Job) -> None:
    """The driver and its node's files are lost; another home stands for other machines."""
    begun = site.follow(spec(site, "moved"))
    begun.until_step(15)
    site.tandem("jobs", "stop", begun.name)
    stopped = begun.end()
    assert stopped.code == 1
    assert json.loads(site.read(f"runs/{stopped.run}/status.json")) == {"status": "KILLED"}
    again = site.job(spec(site, "moved"), home="/root/other")
    assert again.code == 0, again.log[-4000:]
    assert again.run == stopped.run
    assert f"run {again.run} goes on in s3://bucket/tandem/runs/{again.run}" in again.log
    assert "(encoded before)" in again.log
    assert site.losses(again.run) == pytest.approx(site.losses(whole.run), rel=1e-5)
