"""One of two ranks that try micro-batches on real engines, and train the same with and without.

python tests/support/two_ranks.py trial_ranks FOLDER CASE…      a case: <stage>-<precision>, or `rows`

In FOLDER: table.json and text.json, specs of jobs with their data beside them. Of a stage each rank leaves
<case>-<rank>.json: whether trials left random states and buffers alone, what they took, and whether what was trained
afterwards is the same; of `rows`, what was chosen.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from jobs.data.prepare import Prepared, prepare, rows_of
from jobs.plan import facts
from jobs.run_folder import RunFolder
from jobs.run_notes import Attempt, Control
from jobs.spec import JobSpec
from jobs.worker import sizing, trial_internals
from jobs.worker.config import WorkerConfig
from jobs.worker.deepspeed_engine import Engine
from jobs.worker.growth import Growth
from jobs.worker.recorded import record
from jobs.worker.trial import Trial
from jobs.worker.watchdog import Watchdog
from jobs.worker.zero import deepspeed_config

CPU = torch.device("cpu")
ROWS, STEPS = 4, 2


def prepared_of(folder: Path, name: str, rank: int, **training: Any) -> tuple[JobSpec, Prepared]:
    """Return a job's spec with other settings, and its rows."""
    values = json.loads((folder / name).read_text())
    values["training"] |= training
    spec = JobSpec.model_validate(values)
    return spec, prepare(spec, folder, folder / f"s{rank}", parent=None, on_progress=lambda *_: None)


def engine_of(spec: JobSpec, prepared: Prepared, micro_batch: int, precision: Any = "fp32") -> Engine:
    """Return a new engine, which takes ROWS rows of each rank in a step."""
    assert spec.training is not None
    task = prepared.task(spec)
    recorded = record(lambda: counting(task.build(spec.model.architecture, spec.model.config)), 0)
    settings = deepspeed_config(spec.training, micro_batch, ROWS // micro_batch, precision=precision, on_gpu=False)
    in_parts = settings["zero_optimization"]["stage"] == 3
    model = recorded.model if in_parts else recorded.materialise()
    engine = Engine(model.train(), spec.training, settings, CPU, recorded.fill)
    engine.make_exact(recorded.fill)
    return engine


def counting(model: torch.nn.Module) -> torch.nn.Module:
    """Have a model count its passes in a buffer, as layers keep statistics."""
    model.register_buffer("passes", torch.zeros(()))
    model.register_forward_pre_hook(count_pass)
    return model


def gives_back() -> bool | None:
    """Say whether pieces just below 32 MiB come from the kernel and go back to it; None: the C library does not tell.

    Of eight, which nothing that was freed before has room for.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        return None
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes, libc.mallinfo2.restype = [ctypes.c_void_p], Malloc
    before = libc.mallinfo2().hblks
    pieces = [libc.malloc((32 << 20) - 4096) for _ in range(8)]
    mapped = libc.mallinfo2().hblks - before
    for piece in pieces:
        libc.free(piece)
    return bool(mapped)


class Malloc(ctypes.Structure):
    """What mallinfo2(3) tells; `hblks`: pieces that come from the kernel one by one."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")),
        *((name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")),
    ]


def count_pass(model: torch.nn.Module, inputs: Any) -> None:
    """Count one."""
    if not model.passes.is_meta:  # type: ignore[union-attr]
        model.passes.add_(1)  # type: ignore[union-attr, operator]


def trained(spec: JobSpec, prepared: Prepared, engine: Engine, rank: int) -> dict[str, torch.Tensor]:
    """Train in micro-batches of two; return what this rank holds afterwards, by name and place."""
    task, rows = prepared.task(spec), rows_of(prepared, prepared.train_files)
    engine.model.train()
    norms = []
    for step in range(STEPS):
        torch.manual_seed(step)
        for part in range(ROWS // 2):
            mine = [(2 * ROWS * step + ROWS * rank + 2 * part + at) % len(rows) for at in range(2)]
            engine.backward(task.loss(engine.model, task.collate(rows.take(np.array(mine))))[0] / (2 * ROWS))
            engine.step()
        norms.append(engine.gradient_norm())
    held = {f"{each.parameter}|{each.start}|{kind}": tensor.clone() for each in engine.fragments()
            for kind, tensor in each.tensors.items()}  # fmt: skip
    buffers = {f"buffer|{name}": buffer.clone() for name, buffer in engine.model.module.named_buffers()}
    return {**held, **buffers, "norms": torch.tensor(norms)}


def with_and_without(case: str, rank: int, folder: Path) -> dict[str, Any]:
    """Train with trials before it and without."""
    stage, precision = case.split("-")
    spec, prepared = prepared_of(folder, "table.json", rank, deepspeed={"zero_stage": int(stage)})
    plain = trained(spec, prepared, engine_of(spec, prepared, 2, precision), rank)
    engine = engine_of(spec, prepared, 1, precision)
    torch.manual_seed(7)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    buffers = {name: buffer.clone() for name, buffer in engine.model.module.named_buffers()}
    trial = Trial(engine, prepared.task(spec), rows_of(prepared, prepared.train_files), Growth(CPU))
    taken = [trial.took(rows) for rows in (1, 2, 3)]
    left = {
        "random": torch.equal(states[0], torch.get_rng_state()) and (states[1] == np.random.get_state()[1]).all(),
        "buffers": all(torch.equal(buffers[n], b) for n, b in engine.model.module.named_buffers()) and bool(buffers),
        "gradients": all(parameter.grad is None for parameter in engine.model.module.parameters()),
    }
    trial_internals.set_accumulation(engine.model, 2, ROWS // 2)
    after = trained(spec, prepared, engine, rank)
    same = {name: torch.equal(plain[name], after[name]) for name in plain}
    return {
        **{name: bool(is_left) for name, is_left in left.items()},
        "taken": taken,
        "names": after.keys() == plain.keys(),
        "moments": sum(name.endswith("exp_avg") for name in plain),
        "differ": sorted(name for name, is_same in same.items() if not is_same),
    }


def rows_found(rank: int, folder: Path) -> dict[str, Any]:
    """Choose the rows of a micro-batch: with all the memory there is, and with what four rows take."""
    spec, prepared = prepared_of(folder, "text.json", rank)
    task, rows = prepared.task(spec), rows_of(prepared, prepared.train_files)
    found: dict[str, Any] = {}
    for name in ("ample", "tight", "again", "halved"):
        (folder / name).mkdir(exist_ok=True)
        place = RunFolder(folder / name)
        config = WorkerConfig(spec, "fp32", prepared, place, str(folder / "c"), None, folder, folder / "storage")
        control = Control(micro_batch=2 if name == "halved" else None)
        known = sizing.known(config, control, 2)
        engine = engine_of(spec, prepared, known or 1)
        counted = facts.of(engine.model.module)
        watchdog = Watchdog(place.stacks("a", rank), 600)
        attempt = Attempt("a", 2, known or 1, nodes=("n", "n"))
        this = sizing.Sizing(config, task, rows, engine, {"stage": 0}, counted, attempt, watchdog)
        if name in ("ample", "halved"):
            chosen = sizing.settle(this, known, control)
            found[name] = [chosen, sizing.known(config, control, 2), engine.model.gradient_accumulation_steps()]
        else:
            if name == "tight":
                found["of 4"] = budget = Trial(engine, task, rows, Growth(CPU)).took(4).peak
            found |= looked_at(name, engine, lambda this=this, room=int(1.15 * budget): sizing.find(this, room))
        watchdog.stop()
    return found


def looked_at(name: str, engine: Engine, find: Callable[[], sizing.Choice]) -> dict[str, Any]:
    """Return what is found, and whether large pieces of memory go back to the machine before, within and after."""
    within: list[bool | None] = []
    looking = engine.model.module.register_forward_pre_hook(lambda *_: within.append(gives_back()))
    before, choice = gives_back(), find()
    looking.remove()
    return {name: [choice.rows, choice.said], f"{name}, gives back": [before, list(set(within)), gives_back()]}


def run(case: str, rank: int, folder: Path) -> None:
    """Run a case; leave what was found."""
    found = rows_found(rank, folder) if case == "rows" else with_and_without(case, rank, folder)
    (folder / f"{case}-{rank}.json").write_text(json.dumps(found))
    dist.barrier()
