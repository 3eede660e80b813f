"""A preparation of many small ranges by a slow task of its own, in a process that can be killed.

python -m tests.support.slow_preparation FOLDER STORAGE [cluster [URI SOURCE]]

With a URI, as a job whose storage it is: STORAGE is what this machine has of it, and SOURCE is read.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from jobs.checkpoint.store import Store
from jobs.data import prepare, spread, stored
from jobs.data.prepare import Prepared
from jobs.data.ranges import Sizes
from jobs.spec import JobSpec

HERE, SPREAD = Sizes(4_000, 1 << 40), Sizes(4_000, 0)
"""All in one process; a process or a task for each range of 4 kB."""
ROOT = Path(__file__).parents[2]
TASK = """
import os, time
import numpy as np
from jobs.tasks import Task

class Slow(Task):
    name = "slow"

    def encode(self, examples):
        time.sleep(float(os.environ.get("SLOW_S", 0)))
        numbers = np.array([example["n"] for example in examples], np.int32)
        return {"n": numbers, "targets": np.ones_like(numbers)}
"""


def lay_out(folder: Path) -> None:
    """Write the task and 6,000 rows."""
    (folder / "own_slow.py").write_text(TASK)
    (folder / "x.jsonl").write_text("".join(json.dumps({"n": n}) + "\n" for n in range(6000)))


def environment(folder: Path) -> dict[str, str]:
    """Return the variables with which a process finds Tandem and the task."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}


def spec_of(source: str = "x.jsonl") -> JobSpec:
    """Return the job whose rows they are."""
    spec = {
        "name": "x",
        "phase": "pretrain",
        "task": "own_slow:Slow",
        "model": {"architecture": "x"},
        "data": {"train": source, "eval_fraction": 0.1},
        "training": {"steps": 1},
    }
    return JobSpec.model_validate(spec)


def made(folder: Path, storage: str, sizes: Sizes, uri: str | None = None, source: str = "x.jsonl") -> Prepared:
    """Prepare the rows; store them, where the storage is an object store."""
    checked = spec_of(source)
    how = {"parent": None, "on_progress": lambda *_: None, "sizes": sizes}
    if uri is None:
        return prepare.prepare(checked, folder, folder / storage, **how)
    store = Store(uri)
    (done,) = prepare.stages(
        checked, folder, folder / storage, **how, uri=uri, fetch=lambda at: stored.fetch(store, at)
    )
    stored.push(store, Path(done.directory))
    return done


if __name__ == "__main__":
    if "cluster" in sys.argv[3:4]:
        from cluster.connect import init_ray

        init_ray(runtime_env={"env_vars": {"PYTHONPATH": os.environ["PYTHONPATH"]}})
    print(spread.elsewhere(), made(Path(sys.argv[1]), sys.argv[2], SPREAD, *sys.argv[4:]).rows)
