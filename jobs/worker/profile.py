"""A job's first steps under torch's profiler, as each worker of the Ray Train group takes them: `tandem jobs profile`.

    set up as for training; WARM_UP steps
    record the steps behind them; write the trace and the table of operators

Recorded is the thread that trains, with the threads of its backward pass: what fetches rows ahead is not.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType

from jobs import noise, profiled
from jobs.profiled import KEPT, Operator, Profile
from jobs.run_folder import RunFolder
from jobs.worker import loop
from jobs.worker.config import WorkerConfig
from jobs.worker.setup import Worker, set_up
from jobs.worker.surroundings import arrived, logged, swap_folder, system_metrics

LONGEST_SHAPES = 100
"""Characters; what is longer is cut."""


def profile_worker(config: WorkerConfig) -> None:
    """Take the steps on this worker: the function Ray Train runs."""
    noise.quiet()
    arrived(config)
    with system_metrics(config.folder.spool), logged(config) as watchdog, swap_folder(config) as folder:
        worker = set_up(config, watchdog, folder)
        worker.until = profiled.last_step(config.profile)
        worker.engine.model.train()
        record(worker, config.profile)
    if worker.spool is not None:
        loop.close_spool(worker.spool, worker.folder)


def record(worker: Worker, steps: int) -> bool:
    """Take the steps, and write down what was recorded unless the job was asked to stop; return whether it was."""
    profiler = torch.profiler.profile(activities=activities(worker.engine.device), record_shapes=True)

    def after(done: int) -> None:
        if done == profiled.WARM_UP:
            with worker.watchdog.during("profiler"):
                profiler.start()

    meter = loop.begin_meter(worker)
    finished = loop.run_steps(worker, meter, after)
    loop.end_meter(worker, meter)
    if finished:
        with worker.watchdog.during("profile", learns=False):
            profiler.stop()
            write(profiler, steps, worker.folder, worker.engine.rank)
            torch.distributed.barrier()
    return finished


def activities(device: torch.device) -> list[torch.profiler.ProfilerActivity]:
    """Return what is recorded: operators, and a GPU's kernels."""
    kinds = torch.profiler.ProfilerActivity
    return [kinds.CPU, *([kinds.CUDA] if device.type == "cuda" else [])]


def write(profiler: Any, steps: int, folder: RunFolder, rank: int) -> None:
    """Write a rank's trace, and its table: as JSON and to be read."""
    folder.profile.mkdir(exist_ok=True)
    profiler.export_chrome_trace(str(folder.profile / f"rank-{rank}.trace.json.gz"))
    found = table(profiler.key_averages(group_by_input_shape=True), steps)
    write_table(found, folder.profile, rank)


def write_table(found: Profile, folder: Path, rank: int) -> None:
    """Write a table into a profile's folder."""
    (folder / f"rank-{rank}.operators.json").write_text(json.dumps(found.as_dict()), encoding="utf-8")
    (folder / f"rank-{rank}.operators.txt").write_text(profiled.text(found, KEPT) + "\n", encoding="utf-8")


def table(averages: Iterable[Any], steps: int) -> Profile:
    """Add up what torch's profiler has averaged: by operator and shapes, without kernels' own entries and marks.

    A kernel's time is its operator's `self_device_time_total` already.
    """
    operators = [
        Operator(each.key, shapes(each.input_shapes), each.count, each.self_cpu_time_total / 1e3, _gpu_ms(each))
        for each in averages
        if each.device_type == DeviceType.CPU and not each.is_user_annotation
    ]
    operators.sort(key=lambda each: (-each.self_gpu_ms, -each.self_cpu_ms))
    cpu_ms, gpu_ms = (sum(getattr(each, name) for each in operators) for name in ("self_cpu_ms", "self_gpu_ms"))
    return Profile(steps, cpu_ms, gpu_ms, operators[:KEPT])


def _gpu_ms(average: Any) -> float:
    return float(average.self_device_time_total) / 1e3


def shapes(of_inputs: Iterable[Iterable[int]] | None) -> str:
    """Return the shapes of an operator's tensors, such as `16x256 256x64`. Pure."""
    found = ["x".join(map(str, shape)) for shape in of_inputs or () if shape and not isinstance(shape, str)]
    said = " ".join(found)
    return said if len(said) <= LONGEST_SHAPES else f"{said[: LONGEST_SHAPES - 2]} …"
