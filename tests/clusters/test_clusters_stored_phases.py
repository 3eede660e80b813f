"""Two hosts that share no folder: data is prepared by both, and every phase does with an object store."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import hosts, hosts_store, moto_server
from tests.support.fault_runs import SPEC
from tests.support.hosts_store import Job, Site
from tests.support.slow_preparation import TASK

ROWS = 40_000
MODELS = """
import sys
from pathlib import Path
from tests.support import opinions, tiny_models
from tracking import model_store
model_store.put(opinions.classifier(Path("/root/opinions")), sys.argv[1])
model_store.put(tiny_models.language_model(Path("/root/chat"), context=128), sys.argv[2])
"""
LATE = """
import time

from jobs.tasks.text_classification import TextClassification


class Late(TextClassification):
    name = "late"

    def encode(self, examples):
        time.sleep(1.5)
        return super().encode(examples)
"""
PUT = """
import sys
from pyarrow import fs
files, path = fs.FileSystem.from_uri(sys.argv[1])
with files.open_output_stream(path) as stream, open(sys.argv[2], "rb") as file:
    stream.write(file.read())
"""


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    hosts.need()
    with hosts_store.up(2) as found:
        found.hosts[0].python(MODELS, found.uri("in/opinions"), found.uri("in/chat"), env=moto_server.ENVIRONMENT)
        yield found


def on_other(site: Site, pattern: str) -> list[Path]:
    """List what the second host has of the storage."""
    return sorted(site.hosts[1].path("/root/home/stores").glob(f"*/{pattern}"))


def put(site: Site, name: str, content: str) -> str:
    """Store a file; return its URI."""
    site.hosts[0].path("/root/put").write_text(content)
    site.hosts[0].python(PUT, site.uri(f"in/{name}"), "/root/put", env=moto_server.ENVIRONMENT)
    return site.uri(f"in/{name}")


def done(site: Site, spec: dict[str, Any]) -> Job:
    found = site.job({"storage": site.storage, **spec})
    assert found.code == 0, found.log[-4000:]
    return found


def prepared(site: Site, storage: str, uri: str, source: str) -> list[str]:
    """Prepare by tasks of the cluster, from host1; return what it printed, by lines."""
    command = ["-m", "tests.support.slow_preparation", "/root/own", storage, "cluster", uri, source]
    env = {**site.cluster.environment, "PYTHONPATH": f"/root/own:{hosts.PROJECT}"}
    return site.hosts[0].run(sys.executable, *command, env=env, timeout_s=250).stdout.splitlines()


def test_both_hosts_prepare_and_a_file_that_one_of_them_has_is_read_by_it(site: Site) -> None:
    lines = "".join(json.dumps({"n": n}) + "\n" for n in range(6000))
    for host in site.hosts:
        host.path("/root/own").mkdir()
        host.path("/root/own/own_slow.py").write_text(TASK)
    site.hosts[0].path("/root/own/x.jsonl").write_text(lines)
    by_both = prepared(site, "far", site.uri("prepared/far"), put(site, "x.jsonl", lines))
    by_one = prepared(site, "near", site.uri("prepared/near"), "x.jsonl")
    assert "tandem: not every machine of the cluster sees x.jsonl: the driver's node reads it for them" in by_one
    assert not any("not every machine" in line for line in by_both)
    assert by_both[-1] == by_one[-1]
    for name in ("far", "near"):
        made = list(site.hosts[1].path("/root/own").glob(f"{name}/data/.*.away/*/*/*/task"))
        assert made, "the other host has encoded rows"
        assert list(site.hosts[0].path(f"/root/own/{name}/data").glob("*/meta.json"))


def test_all_rows_are_predicted_in_order_and_the_output_is_in_the_store(site: Site) -> None:
    words = ["good", "bad", "a film", "a bad film"]
    rows = "".join(json.dumps({"n": n, "text": f"{words[n % 4]} {n}"}) + "\n" for n in range(ROWS))
    spec = {
        "name": "predicts",
        "phase": "predict",
        "task": {"name": "text-classification"},
        "model": {"from": site.uri("in/opinions")},
        "data": {"predict": put(site, "rows.jsonl", rows)},
        "predict": {"format": "jsonl", "shard_rows": 500, "columns": ["n"]},
        "resources": {"workers": 2},
    }
    found = done(site, spec)
    assert found.result["output"] == f"s3://bucket/tandem/runs/{found.run}/predictions.jsonl"
    written = [json.loads(line) for line in site.read(f"runs/{found.run}/predictions.jsonl").splitlines()]
    assert [row["n"] for row in written] == list(range(ROWS))
    assert {row["prediction_label"] for row in written} <= {"good", "bad"}
    manifest = json.loads(site.read(f"runs/{found.run}/predictions.jsonl.manifest.json"))
    assert [shard["rows"] for shard in manifest["shards"]] == [500] * (ROWS // 500)
    assert site.objects(f"runs/{found.run}/shards/") == [], "the parts are gone"
    assert on_other(site, f"runs/{found.run}/.here-*"), "the other host has had a worker"


def test_a_sweeps_trials_are_runs_of_the_store_and_the_best_one_is_registered(site: Site) -> None:
    spec = {
        **SPEC,
        "name": "tries",
        "phase": "sweep",
        "data": {**SPEC["data"], "eval_fraction": 0.2},
        "training": {**SPEC["training"], "steps": 20, "eval_every": 10},
        "resources": {"workers": 1},
        "sweep": {
            "fields": {"training.learning_rate": {"choices": [3e-3, 1e-5]}},
            "metric": "loss",
            "search": "grid",
            "scheduler": "none",
        },
        "register": {"model": "tries", "alias": "best"},
    }
    found = done(site, spec)
    for number in (1, 2):
        assert json.loads(site.read(f"runs/{found.run}-t{number:03d}/status.json")) == {"status": "FINISHED"}
    best = found.result["best"]["trial"]
    assert best == 1, "who learns is better than who hardly does"
    assert found.result["directory"].startswith(f"s3://bucket/tandem/runs/{found.run}-t{best:03d}/model/")
    assert site.objects(f"models/{found.run}-t{best:03d}/"), "its weights are in the store"
    assert found.result["model"] == "models:/tries/1"


@pytest.mark.parametrize("stage", [1, 3])
def test_preferences_are_compared_with_a_reference_that_is_in_the_store(site: Site, stage: int) -> None:
    """At stage 1 tasks make its columns, at stage 3 the training group."""
    spec = {
        "name": f"prefers-{stage}",
        "phase": "finetune",
        "task": {"name": "causal-lm", "objective": "dpo", "sequence_length": 64},
        "model": {"from": site.uri("in/chat")},
        "data": {"train": "python-stdlib-preferences", "max_examples": 60, "eval_fraction": 0.1},
        "training": {
            **{"steps": 6, "global_batch_size": 4, "precision": "fp32", "learning_rate": 1e-4},
            "deepspeed": {"zero_stage": stage},
        },
        "resources": {"workers": 2},
    }
    found = done(site, spec)
    columns = [name for name in site.objects("data/") if re.search(r"/reference-[0-9a-f]{16}/files\.json$", name)]
    assert columns, "the columns are stored, all of them"
    (other,) = {path.parent.parent.name for path in on_other(site, "data/*/reference-*/train-00000.arrow")[-1:]}
    assert any(name.startswith(f"data/{other}/") for name in columns), "and the other host has them"
    assert found.result["evaluations"]["final"]["loss"] > 0


def test_training_begins_while_rows_are_made_that_the_other_host_fetches_one_by_one(site: Site) -> None:
    site.hosts[0].path("/root/specs").mkdir(exist_ok=True)
    site.hosts[0].path("/root/specs/late.py").write_text(LATE)
    rows = (
        {"n": n, "text": f"word{n % 97} {('good', 'bad')[n % 2]}", "label": ("good", "bad")[n % 2], "more": [0] * 1000}
        for n in range(2500)
    )
    spec = {
        "name": "early",
        "phase": "pretrain",
        "task": {"name": "late:Late", "tokenizer": {"train": "word"}},
        "model": {"architecture": "ngram"},
        "data": {
            "train": put(site, "late.jsonl", "".join(json.dumps(row) + "\n" for row in rows)),
            **{"eval_fraction": 0.02, "start_early": True},
        },
        "training": {"steps": 12, "global_batch_size": 256, "precision": "fp32"},
        "resources": {"workers": 2},
    }
    early = done(site, spec)
    assert "training begins as others are encoded" in early.log
    assert on_other(site, f"runs/{early.run}/.early/train-*.arrow"), "the other host has fetched rows as they came"
    again = done(site, {**spec, "checkpoint": {"resume": "never"}})
    assert "(encoded before)" in again.log
    assert site.losses(early.run) == pytest.approx(site.losses(again.run), rel=1e-6)


def test_a_courier_that_is_killed_is_started_again_and_nothing_is_missing(site: Site) -> None:
    training = {**SPEC["training"], "steps": 200}
    spec = {**SPEC, "name": "carried", "training": training, "storage": site.storage}
    begun = site.follow(spec, fault="pace:rank=0:step=1")
    begun.until_step(20)
    site.hosts[1].run("pkill", "-9", "-f", "^ray::Courier")
    found = begun.end()
    assert found.code == 0, found.log[-4000:]
    assert f"the courier of the node {site.hosts[1].address} is lost, and is started again" in found.log
    assert sorted(site.losses(found.run)) == list(range(1, 201))
    names = [name.rpartition("/")[2] for name in site.objects(f"runs/{found.run}/logs/")]
    assert len({name.partition("-")[0] for name in names}) == 1, "no worker was disturbed"
    assert len(names) == 2
