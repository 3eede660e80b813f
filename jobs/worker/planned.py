"""What a start of the worker group should take, planned by its first rank from the model itself: nothing is built."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import torch

from cluster.errors import UserError
from cluster.precision import Precision
from jobs.plan import devices, memory, plan
from jobs.plan.facts import Facts
from jobs.plan.outlook import Outlook
from jobs.run_folder import RunFolder
from jobs.spec import JobSpec
from jobs.tasks import Task
from jobs.worker import flops
from jobs.worker.config import WorkerConfig
from jobs.worker.peak_memory import own_status, resident

Teller = Callable[[Facts, int | None], None]
"""(the model, rows of a micro-batch) → None. Rows that are not known yet, None, are no plan."""


def teller(config: WorkerConfig, task: Task, device: torch.device, rank: int) -> Teller:
    """Return what notes the plan, on the first rank alone; called while this process has no model yet."""
    empty = resident(own_status())

    def tell(found: Facts, rows: int | None) -> None:
        if rank == 0 and rows is not None:
            described = partial(group, device, config.precision, rows, empty)
            note(config.folder, config.spec, task, found, described)

    return tell


def note(folder: RunFolder, spec: JobSpec, task: Task, found: Facts, described: Callable[[], plan.Group]) -> None:
    """Leave in the run's folder what the workers should take to train such a model.

    An estimate is worth no run: one that cannot be made says why, and one that cannot be written is left out.

    Args:
        described: describes the workers.
    """
    assert spec.training is not None
    now = int(time.time() * 1000)
    try:
        made = plan.of_model(spec, found, task, described())
        expected = plan.outlook(made, now, saves=spec.checkpoint.every_steps is not None)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        expected = Outlook(spec.resources.fewest, "not planned", 0, said=(said,), time_ms=now)
    with suppress(OSError):
        folder.write_outlook(expected)


def group(device: torch.device, precision: Precision, micro_batch: int, process_bytes: int) -> plan.Group:
    """Describe the workers; those on this machine have equal parts of its memory.

    Args:
        process_bytes: what this process takes, which has no model yet.
    """
    import ray.train

    context = ray.train.get_context()
    world, local = context.get_world_size(), context.get_local_world_size()
    on_gpu = device.type == "cuda"
    try:
        found = plan.measured(precision, local, torch.get_num_threads(), on_gpu)
    except (UserError, OSError):  # `tandem jobs plan` says what is wrong with the file
        found = None
    if on_gpu:
        properties, peak = torch.cuda.get_device_properties(device), flops.peak(device, precision)
        known = {precision: peak} if peak == peak else None  # NaN: not known
        on = devices.Device(properties.name, properties.total_memory, known, here=True)
        return plan.Group(on, world, precision, micro_batch, process_bytes, found)
    engine = found.engine_bytes if found is not None else memory.ENGINE
    return plan.Group(devices.this_machine(local), world, precision, micro_batch, process_bytes + engine, found)
