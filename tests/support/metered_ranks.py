"""One of two ranks that take a job's steps in the real loop, without Ray, and leave what was measured.

python tests/support/two_ranks.py metered_ranks FOLDER STAGE[-profile|-compile]…

In FOLDER: spec.json, of a job with its data beside it. Below FOLDER/<CASE>/run the spools; rank 0 leaves the number of
weights in FOLDER/<CASE>/weights. A profile takes the same steps and records those after the warm-up.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
import torch.distributed as dist

from jobs.checkpoint.catalog import Keep
from jobs.checkpoint.saver import GroupNotes, Saver
from jobs.checkpoint.store import Store
from jobs.data.prepare import prepare, rows_of
from jobs.profiled import WARM_UP
from jobs.run_folder import RunFolder
from jobs.spec import JobSpec
from jobs.worker import loop, profile, setup
from jobs.worker.deepspeed_engine import Engine
from jobs.worker.fault_injection import Injector
from jobs.worker.recorded import record
from jobs.worker.watchdog import Watchdog
from jobs.worker.zero import deepspeed_config
from tests.support import two_ranks
from tracking.spool import Spool

NEVER_WHOLE = {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
"""So that at stage 3 no weight stays gathered, as none of a large model does."""


def run(case: str, rank: int, folder: Path) -> None:
    """Take the steps."""
    two_ranks.begin_run(case, rank, folder)
    stage, left = int(case[0]), folder / case
    values = json.loads((folder / "spec.json").read_text())
    values["training"]["deepspeed"] = {"zero_stage": stage}
    spec = JobSpec.model_validate(values)
    assert spec.training is not None
    training = spec.training
    prepared = prepare(spec, folder, folder / f"prepared-{rank}", parent=None, on_progress=lambda *_: None)
    task, place = prepared.task(spec), RunFolder(left / "run")
    recorded = record(lambda: task.build(spec.model.architecture, spec.model.config), 0)
    settings = deepspeed_config(training, training.micro_batch_size or 1, 2, precision="fp32", on_gpu=False)
    if stage == 3:
        settings["zero_optimization"] |= NEVER_WHOLE
    engine = Engine(recorded.model.train(), training, settings, torch.device("cpu"), recorded.fill)
    engine.make_exact(recorded.fill)
    watchdog = Watchdog(place.stacks("a", rank), 600)
    worker = setup.Worker(
        spec, training, "fp32", task, engine, rows_of(prepared, prepared.train_files),
        rows_of(prepared, prepared.eval_files), place, Spool(place.rank_0_spool) if rank == 0 else None,
        Saver(Store(str(left)), "a", rank, 2, Keep(), notes=GroupNotes()), watchdog,
        Injector(place, rank), training.steps or 1, training.micro_batch_size or 1, stage,
    )  # fmt: skip
    if case.endswith("-compile"):
        worker.compiling = setup.begin_to_compile(engine, kept(folder), watchdog)
    if case.endswith("-profile"):
        worker.until = worker.steps
        assert profile.record(worker, worker.steps - WARM_UP)
    else:
        meter = loop.begin_meter(worker)
        assert loop.run_steps(worker, meter)
        loop.end_meter(worker, meter)
    watchdog.stop()
    if rank == 0:
        (left / "weights").write_text(str(sum(engine.elements().values())))
    dist.barrier()


def kept(folder: Path) -> Path:
    """Return where what is compiled is kept: over runs of the tests, if they have such a place; it takes a while."""
    return Path(os.environ.get("TANDEM_CACHE") or folder) / "compiled"
