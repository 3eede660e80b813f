"""The ranks of benchmarks/model_memory.py: each one's peak memory in each phase of a training.

python benchmarks/model_memory_rank.py WORLD FOLDER begin|resume PHASE    imports jobs/ from PYTHONPATH: of any commit

The ranks are forked by a process that has made a worker's imports, as cluster/fork_server.py forks workers. They end
with PHASE.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from jobs.checkpoint import resume
from jobs.checkpoint.catalog import Keep, Manifest
from jobs.checkpoint.saver import GroupNotes, Saver
from jobs.checkpoint.store import Store
from jobs.data.prepare import rows_of
from jobs.driver import warm
from jobs.run_folder import RunFolder
from jobs.spec import JobSpec
from jobs.worker import evaluate, loop, proof, setup, start
from jobs.worker.fault_injection import Injector
from jobs.worker.watchdog import Pulse, Watchdog
from jobs.worker.zero import deepspeed_config

STEPS = 2


class Phases:
    """Notes this process's peak resident memory (MiB) in each phase, and its seconds, in a file after each of them."""

    def __init__(self, path: Path, last: str) -> None:
        """Begin with none; the process ends after the phase `last`."""
        self._path, self._last = path, last
        self._peaks: dict[str, tuple[float, float]] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Note one phase, which the ranks begin together."""
        dist.barrier()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew (proc(5))
        began = time.perf_counter()
        yield
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
        self._peaks[name] = peak / 1024, time.perf_counter() - began
        half = self._path.with_suffix(".half")
        half.write_text(json.dumps(self._peaks))
        half.replace(self._path)  # whoever is ended meanwhile has left the phases before
        if name == self._last:
            dist.barrier()
            os._exit(0)


def begin(spec: JobSpec, task: Any, columns: Any, config: dict[str, Any], store: Store, point: resume.Point) -> Any:
    """Return the engine, by the way of whichever commit this is."""
    assert spec.training is not None
    cpu = torch.device("cpu")
    before: Any = start
    if not hasattr(start, "begin"):  # before models began in parts
        model, _ = before.ready_model(spec, task, None, columns)
        return setup.make_engine(model, spec.training, config, cpu, store, point)
    begun = start.begin(spec, task, None, in_parts=spec.training.deepspeed.zero_stage == 3)  # type: ignore[union-attr]
    engine = setup.make_engine(begun, spec.training, config, cpu, store, point)
    start.look(spec, task, engine.model.module, columns)
    return engine


def step(engine: Any, task: Any, rows: Any) -> None:
    """Learn from a row."""
    batch = evaluate.to_device(task.collate(rows.take(np.array([engine.rank]))), engine.device)
    engine.backward(task.loss(engine.model, batch)[0] / 100)
    engine.step()


def main(rank: int, world: int, folder: Path, way: str, last: str) -> None:
    """Begin, or go on; learn; save and write the first time. Leaves FOLDER/<way>-<rank>.json."""
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting-{way}", rank=rank, world_size=world)
    phase = Phases(folder / f"{way}-{rank}.json", "second step" if way == "resume" else last)
    spec = JobSpec.model_validate(json.loads((folder / "spec.json").read_text()))
    assert spec.training is not None
    prepared = pickle.loads((folder / "prepared").read_bytes())
    task, rows, eval_rows = prepared.task(spec), rows_of(prepared, prepared.train_files), rows_of(prepared, [])
    precision: Any = spec.training.precision
    stage: Any = spec.training.deepspeed.zero_stage  # type: ignore[union-attr]
    config = deepspeed_config(spec.training, 1, 1, precision=precision, on_gpu=False)
    config["zero_optimization"] |= json.loads((folder / "config.json").read_text())
    store, place = Store(str(folder / "checkpoints")), RunFolder(folder / "run")
    with phase("imports"):
        pass
    point = resume.agree(store) if way == "resume" else resume.Point(way)
    with phase("resume" if way == "resume" else "construct"):
        engine = begin(spec, task, rows.columns, config, store, point)
    with phase("first step"):
        step(engine, task, rows)
    with phase("second step"):
        step(engine, task, rows)
    saver = Saver(store, way, rank, world, Keep(), notes=GroupNotes())
    with phase("save"):
        saver.begin(Manifest(STEPS, STEPS, world, stage, elements=engine.elements()), engine.owned_fragments())
        saver.finish()
    if hasattr(saver, "release"):
        saver.release()
    watchdog = Watchdog(place.stacks(way, rank), 3600, Pulse(place.pulse(way, rank), "node"))
    worker = setup.Worker(
        spec, spec.training, precision, task, engine, rows, eval_rows, place, None, saver, watchdog,
        Injector(place, rank, ""), STEPS, 1, stage,
    )  # fmt: skip
    with phase("evaluation"):
        proof.measure_live(worker, rows, 8)
    with phase("export"):
        loop.export_weights(worker)


def fork(world: int, folder: Path, way: str, last: str) -> int:
    """Make a worker's imports, fork the ranks, wait for them, and return how many failed; one that fails ends all."""
    warm.import_before_ray()
    ranks = []
    for rank in range(world):
        if not (process := os.fork()):
            try:
                main(rank, world, folder, way, last)
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        ranks.append(process)
    for _ in range(world):
        if os.wait()[1]:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(fork(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]))
