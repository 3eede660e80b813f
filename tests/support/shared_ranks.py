"""One of two ranks that share rows, or take rows of their own, in the real loop, without Ray: stop, go on, write.

python tests/support/two_ranks.py shared_ranks FOLDER CASE…      a case: STAGE,DATA,PARTS,PARTS[,compiled]

In FOLDER: <DATA>.json, specs with their data beside. After the first step the run stops and goes on with as many ranks
for each row as the second number says. Below FOLDER/<CASE>/run is what the loop leaves. A compiled model is so up
to its machine code, which takes a minute and which tests/integration/test_jobs_metered.py makes.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist

from jobs.checkpoint import catalog, resume
from jobs.checkpoint.catalog import Keep
from jobs.checkpoint.saver import GroupNotes, Saver
from jobs.checkpoint.store import Store
from jobs.data import batches
from jobs.data.prepare import Prepared, prepare, rows_of
from jobs.run_folder import RunFolder
from jobs.spec import JobSpec
from jobs.worker import finish, loop, sequence, setup, start
from jobs.worker.fault_injection import Injector
from jobs.worker.watchdog import Watchdog
from jobs.worker.zero import deepspeed_config, sliceable
from tests.support import two_ranks
from tracking.spool import Spool


def spec_of(folder: Path, data: str, stage: int = 0, parts: int = 1) -> JobSpec:
    """Return what is trained."""
    values = json.loads((folder / f"{data}.json").read_text())
    values["training"] |= {"deepspeed": {"zero_stage": stage}, "parallel": {"sequence": parts}}
    values["resources"] = {"workers": 2}
    return JobSpec.model_validate(values)


def begun(spec: JobSpec, prepared: Prepared, place: RunFolder, rank: int, attempt: str) -> setup.Worker:
    """Return a rank of a group that begins, or goes on from the newest checkpoint."""
    training, task, store = spec.training, prepared.task(spec), Store(str(place.path))
    assert training is not None
    rows = rows_of(prepared, prepared.train_files)
    manifest, skipped = catalog.newest_valid(store)
    assert skipped == []
    where = sequence.place(rank, 2, training.parallel.sequence)
    accumulation = batches.accumulation_steps(training.global_batch_size, where.readers, 1)
    config = deepspeed_config(training, 1, accumulation, precision=training.precision, on_gpu=False)
    model = start.begin(spec, task, None, in_parts=sliceable(config))
    point = resume.Point(attempt, manifest)
    engine = setup.make_engine(model, training, config, torch.device("cpu"), store, point)
    start.look(spec, task, engine.model.module, rows.columns)
    return setup.Worker(
        spec, training, training.precision, task, engine, rows, rows_of(prepared, prepared.eval_files), place,
        Spool(place.rank_0_spool) if rank == 0 else None,
        Saver(store, attempt, rank, 2, Keep(), notes=GroupNotes()), Watchdog(place.stacks(attempt, rank), 600),
        Injector(place, rank), training.steps or 1, 1, int(config["zero_optimization"]["stage"]), point.step,
        manifest.updates if manifest else 0, shared=sequence.begin(spec, task, engine, rows),
    )  # fmt: skip


def run(case: str, rank: int, folder: Path) -> None:
    """Take one step, save, and go on otherwise to the end."""
    two_ranks.begin_run(case, rank, folder)
    stage, data, first, second, *how = case.split(",")
    place = RunFolder(folder / case / "run")
    for attempt, parts in zip("ab", map(int, (first, second)), strict=True):
        spec = spec_of(folder, data, int(stage), parts)
        aside = folder / f"{data}-{rank}"
        prepared = prepare(spec, folder, aside, parent=None, on_progress=lambda *_: None)
        worker = begun(spec, prepared, place, rank, attempt)
        worker.engine.model.train()
        if how == ["compiled"]:
            worker.engine.model.compile(backend="aot_eager")
        if attempt == "a" and rank == 0:
            place.request_stop()
        dist.barrier()
        meter = loop.begin_meter(worker)
        finished = loop.run_steps(worker, meter)
        assert finished == (attempt == "b")
        loop.end_meter(worker, meter)
        loop.finish_checkpoint(worker)
        worker.watchdog.stop()
        dist.barrier()  # a new beginning sweeps up what the other rank's watchdog looks for
        if rank == 0:
            place.begin()  # forgets that it was to stop
        dist.barrier()
    loop.evaluate_now(worker, worker.steps, "final")
    finish.export_weights(worker)
