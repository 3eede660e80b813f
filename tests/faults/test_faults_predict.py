"""100,000 rows, two workers killed and then the driver: each row is in the output once, in the input's order."""

import json
import os
import signal
from pathlib import Path

import psutil
import pyarrow.parquet as parquet
import pytest
import yaml

from jobs import submit
from jobs.predict import parts
from tests.support import fault_runs as faults
from tests.support import opinions

pytestmark = pytest.mark.usefixtures("cluster")
ROWS, SHARD = 100_000, 500


def done(run: Path) -> list[dict]:
    """Return the lines about shards that are done; the last one may be half."""
    path = run / parts.FOLDER / parts.DONE
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def kill_one(run: Path, spared: set[int]) -> int:
    """Kill the worker that was done with a shard last."""
    pid = next(entry["pid"] for entry in reversed(done(run)) if entry["pid"] not in spared)
    os.kill(pid, signal.SIGKILL)
    return pid


def test_two_workers_and_the_driver_are_killed_and_each_row_is_there_once_in_order(folder, storage):
    name, output = "predict-killed", folder / "killed.parquet"
    model = opinions.classifier(folder / "model")
    words = ["good", "bad", "a film", "a bad film"]
    with (folder / "rows.jsonl").open("w") as file:
        file.writelines(json.dumps({"n": n, "text": f"{words[n % 4]} {n}"}) + "\n" for n in range(ROWS))
    spec = {
        "phase": "predict",
        "task": {"name": "text-classification"},
        "model": {"from": str(model)},
        "data": {"predict": "rows.jsonl"},
        "predict": {"output": str(output), "shard_rows": SHARD, "columns": ["n"]},
        "resources": {"workers": 2},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"name": name, **spec}))
    job = submit.submit(folder / f"{name}.yaml", [])
    run = faults.wait_for_folder(storage, name)
    killed: set[int] = set()
    for count in (4, 20):
        faults.wait_for(lambda at=count: (run / parts.FOLDER / parts.DONE).exists() and len(done(run)) >= at, "shards")
        killed.add(kill_one(run, killed))
    at_kill = len(done(run))
    faults.wait_for(lambda: len(done(run)) >= at_kill + 20, "shards after the second loss")
    faults.driver_of(name).send_signal(signal.SIGKILL)
    first = faults.ended(job, storage, name)
    assert first.status == "FAILED"
    assert sum("is lost" in line for line in first.log) == 2, first.log
    before = done(run)
    assert not output.exists()

    found = faults.ended(submit.submit(folder / f"{name}.yaml", []), storage, name)
    assert found.status == "SUCCEEDED", found.log
    assert f"tandem: {len(before) * SHARD} of {ROWS} rows were done before" in found.log
    table = parquet.read_table(output)
    assert table.column("n").to_pylist() == list(range(ROWS))
    assert table.column("prediction_error").null_count == ROWS
    assert table.column("prediction_label").null_count == 0
    manifest = json.loads(output.with_name(f"{output.name}.manifest.json").read_text())
    assert [shard["first"] for shard in manifest["shards"]] == list(range(0, ROWS, SHARD))
    assert found.result["rows"] == manifest["rows"] == ROWS
    assert not any(psutil.pid_exists(entry["pid"]) and _works(entry["pid"]) for entry in before), "no worker is left"


def _works(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE and "ray::" in psutil.Process(pid).name()
    except psutil.Error:
        return False
