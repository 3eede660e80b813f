"""A sweep on the real stack: a grid of three trials, of which one fails, and a driver that is killed in the middle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.connect import Connection
from jobs import submit, trial_table
from jobs.run_folder import RunFolder
from jobs.trial_table import TrialLine
from tests.support import fault_runs
from tracking import manifest, registry

SPEC: dict[str, Any] = {
    "name": "tries",
    "phase": "sweep",
    "task": {"name": "image-classification"},
    "model": {
        "architecture": "vit",
        "config": {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32},
    },
    "data": {"train": "sklearn-digits", "max_examples": 300, "eval_fraction": 0.2},
    "training": {"steps": 40, "global_batch_size": 16, "learning_rate": 3e-3, "precision": "fp32", "eval_every": 10},
    "checkpoint": {"every_steps": 10},
    "sweep": {
        "fields": {"model.config.patch_size": {"choices": [4, 2, 16]}},  # the pictures have 8 × 8 pixels
        "metric": "accuracy",
        "search": "grid",
        "scheduler": "none",
        "parallel": 2,
    },
    "register": {"model": "tries", "alias": "candidate"},
    "max_failures": 0,
}


def send(folder: Path) -> str:
    path = folder / "tries.yaml"
    path.write_text(yaml.safe_dump(SPEC))
    return submit.submit(path, [])


def killed(folder: Path, storage: Path) -> Path:
    """Kill the driver of a sweep once a trial has ended; return the sweep's folder."""
    job = send(folder)
    path = fault_runs.wait_for_folder(storage, "tries")
    journal = path / "trials.jsonl"
    fault_runs.wait_for(lambda: journal.exists() and '"ended"' in journal.read_text(), "trial that ended")
    fault_runs.driver_of("tries").kill()
    outcome = submit.follow(job, lambda line, meaning: None)
    assert outcome.status == "FAILED"
    return path


def time_of(sweep: Path, number: int) -> int:
    """Return when a trial's driver last said something, in ns."""
    return (sweep.with_name(f"{sweep.name}-t{number:03d}") / "driver.log").stat().st_mtime_ns


def children(client: Any, parent: str) -> dict[str, Any]:
    """Return the runs of a sweep's trials by their numbers."""
    experiment = client.get_run(parent).info.experiment_id
    found = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
    return {run.data.tags["tandem.trial"]: run for run in found}


@pytest.mark.usefixtures("cluster")
def test_a_sweep_goes_on_after_its_driver_was_killed_and_registers_the_best(
    cluster: Connection, folder: Path, storage: Path
) -> None:
    path = killed(folder, storage)
    before = (path / "trials.jsonl").read_text()
    done = [event["trial"] + 1 for event in map(json.loads, before.splitlines()) if "ended" in event]
    made = {number: time_of(path, number) for number in done}
    shown: list[TrialLine] = []

    def on_line(line: str, meaning: object) -> None:
        shown.extend(filter(None, [trial_table.parse(line)]))

    outcome = submit.follow(send(folder), on_line)
    assert outcome.status == "SUCCEEDED", "\n".join(outcome.log)
    assert {number: time_of(path, number) for number in done} == made, "what had ended was not made again"
    assert any("the sweep goes on" in line for line in outcome.log)
    assert (path / "trials.jsonl").read_text().startswith(before), "it went on in the same folder"

    result = outcome.result
    assert len(list(path.parent.glob(f"{path.name}-t*/evaluations.json"))) == 2
    scores = {
        number: (RunFolder(path.with_name(f"{path.name}-t{number:03d}")).evaluations() or {})["final"]["accuracy"]
        for number in (1, 2)
    }
    best = max(scores, key=lambda number: (scores[number], -number))
    assert (result["best"]["trial"], result["best"]["accuracy"]) == (best, scores[best])
    assert result["evaluation"]["accuracy"] == scores[best] > 0.2
    assert "--set sweep=null" in result["command"]
    assert {(line.number, line.of) for line in shown} <= {(0, 3), (1, 3), (2, 3)}
    assert shown[-1].state in ("finished", "failed")

    written = manifest.read(registry.resolve("models:/tries@candidate"), verify=True)
    values = result["best"]["values"]
    assert written.sweep == {"sweep": path.name, "trial": best, "values": values, "metric": "accuracy"}
    assert written.name == "tries"

    runs = children(client := fault_runs.mlflow_client(), result["run_id"])
    ends = {number: run.info.status for number, run in runs.items()}
    assert ends == {"1": "FINISHED", "2": "FINISHED", "3": "FAILED"}
    assert runs[str(best)].info.run_id == written.run_id
    assert client.get_run(result["run_id"]).info.status == "FINISHED"
    table = json.loads(fault_runs.artifact(result["run_id"], "trials.json"))
    assert [row["ended"] for row in table] == ["finished", "finished", "failed"]
    assert "Kernel size" in table[2]["reason"]
    kept = {file.path for file in client.list_artifacts(result["run_id"])}
    assert kept >= {"trials.csv", "trials.json", "trials.png", "parallel.png"}
