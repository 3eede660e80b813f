"""One of two ranks that begin at a ZeRO stage without a whole model in fp32, learn, and write what they learned.

python tests/support/two_ranks.py parts_ranks FOLDER CASE…      a case: PARENT or `new`, ADAPTERS, PRECISION

A case may go on with `offload`, `damaged`, `ahead`, or `stage0`, `stage1` or `stage2`; else it is stage 3. With
`unheld` no rows are held out. With `stored` its weights go to the store that TANDEM_TEST_STORE names; `refused`: to a
bucket that takes nothing. With `full` rank 0's disk takes no file of half the parent's size while the model is written.
With `preferences` the ranks only make the reference's columns, of the data in <PARENT>-preferences.prepared, in its
folder `reference-group`.

In FOLDER: <PARENT>/, the models to start from, with <PARENT>.prepared beside. Below FOLDER/<CASE> rank 0 leaves `begun`
and `trained` (all weights as they began, and after the steps), and the run, whose `model` is what was written. Each
rank leaves `masters-<RANK>`, its part of the fp32 weights at the beginning, and `made-<RANK>.json`: the dtype and shape
of each tensor that was made meanwhile, and by what; and `exported-<RANK>.json`, the same of the export below stage 3.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from jobs.checkpoint import resume
from jobs.checkpoint.catalog import Keep
from jobs.checkpoint.resume import Point
from jobs.checkpoint.saver import GroupNotes, Saver
from jobs.checkpoint.store import Store
from jobs.data.prepare import rows_of
from jobs.run_folder import RunFolder
from jobs.spec import JobSpec
from jobs.worker import (
    by_source,
    evaluate,
    export_in_parts,
    finish,
    loop,
    parameter_files,
    proof,
    reference,
    save_room,
    setup,
    start,
)
from jobs.worker.export import NotWritten
from jobs.worker.fault_injection import VARIABLE, Injector
from jobs.worker.watchdog import Pulse, Watchdog
from jobs.worker.zero import deepspeed_config, with_swap_folder
from tests.support import two_ranks

LAYERS = {"attention": ["q_proj", "v_proj", "c_attn"], "head": ["lm_head"], "all-linear": "all-linear"}
STEPS = 2
AHEAD = {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 3000}
"""So that a tiny model is to DeepSpeed as a large one: what was used is given up, and a little is gathered ahead.

An evaluation ends with what a backward pass would need under way.
"""


class Made(TorchDispatchMode):
    """Notes what makes tensors with memory, of which type and shape."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[str, str, tuple[int, ...]]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and note its result."""
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not result.is_meta:
            self.found.add((str(func.overloadpacket), str(result.dtype), tuple(result.shape)))
        return result


def stage_of(case: str) -> int:
    """Return a case's ZeRO stage."""
    return next((int(each[-1]) for each in case.split(",") if each.startswith("stage")), 3)


def spec_of(case: str, folder: Path) -> JobSpec:
    """Return what a case trains."""
    parent, adapters, precision, *_ = case.split(",")
    new = {"architecture": "llama", "config": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}}
    new["config"] |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}  # type: ignore[operator]
    model: dict[str, Any] = new if parent == "new" else {"from": str(folder / parent)}
    if "stored" in case:
        store = os.environ.get("TANDEM_TEST_STORE", "/nowhere")
        model["export"] = store.replace("bucket", "refused") if "refused" in case else store
    if adapters != "none":
        wanted = LAYERS[adapters]
        is_gpt2 = parent.startswith("gpt2")
        if isinstance(wanted, list):
            wanted = [name for name in wanted if (name == "c_attn") == is_gpt2 or name == "lm_head"]
        model["lora"] = {"rank": 3, "target_modules": wanted, "merge": "apart" not in case}
        model["lora"]["base"] = next((kind for kind in ("int8", "nf4") if kind in case), "whole")
    values = {
        "name": "x",
        "phase": "pretrain" if parent == "new" else "finetune",
        "data": {"train": "x.jsonl", "sequence_length": 32},
        "training": {"steps": STEPS, "global_batch_size": 2, "precision": precision, "learning_rate": 0.01}
        | {"deepspeed": {"zero_stage": stage_of(case), "offload": "cpu" if "offload" in case else "none"}},
        "model": model,
    }
    if "files" in case:  # its embedding has more elements than what stays in memory
        new["config"]["hidden_size"] = 320  # type: ignore[index]
        where = {"offload": "cpu", "offload_parameters": "nvme", "nvme_path": str(folder)}
        values["training"]["deepspeed"] |= where  # type: ignore[index]
    if "preferences" in case:
        values["task"] = {"name": "causal-lm", "objective": "dpo", "sequence_length": 32}
        values["data"] = {"train": "pairs.jsonl"}
    if parent == "new":
        values["task"] = {"name": "causal-lm", "tokenizer": {"from": str(folder / "llama")}}
    return JobSpec.model_validate(values)


def train(case: str, rank: int, folder: Path) -> None:
    """Begin, learn, and write."""
    spec = spec_of(case, folder)
    parent = None if case.startswith("new") else folder / case.split(",")[0]
    prepared = pickle.loads((folder / f"{(parent or folder / 'llama').name}.prepared").read_bytes())
    assert spec.training is not None
    task, rows, precision = prepared.task(spec), rows_of(prepared, prepared.train_files), spec.training.precision
    place, disk = RunFolder(folder / case / "run"), folder / case / f"disk-{rank}"
    disk.mkdir()
    config = deepspeed_config(spec.training, 1, 1, precision=precision, on_gpu=False)
    config = with_swap_folder(config, disk) if "files" in case else config
    config["zero_optimization"] |= AHEAD if "ahead" in case else {}
    with Made() as made:
        begun = start.begin(spec, task, parent, stage_of(case) == 3, in_bf16=precision == "bf16")
        store = Store(str(folder / case))
        engine = setup.make_engine(begun, spec.training, config, torch.device("cpu"), store, Point("a"))
    (folder / case / f"made-{rank}.json").write_text(json.dumps(sorted(made.found)))
    masters = {f"{each.parameter}|{each.start}": each.tensors["weight"].clone() for each in engine.owned_fragments()}
    save_file(masters, folder / case / f"masters-{rank}.safetensors")
    remarks = begun.said + start.look(spec, task, engine.model.module, rows.columns)
    leave(engine.state_dict(), folder / case / "begun")
    watchdog = Watchdog(place.stacks("a", rank), 600, Pulse(place.pulse("a", rank), "node"))
    held_out = rows_of(prepared, [] if "unheld" in case else prepared.eval_files)
    worker = setup.Worker(
        spec, spec.training, precision, task, engine, rows, held_out, place, None,
        Saver(Store(str(folder / case)), "a", rank, 2, Keep(), notes=GroupNotes()), watchdog,
        Injector(place, rank), STEPS, 1, stage_of(case), model_directory=parent,
    )  # fmt: skip
    for step in range(STEPS):
        batch = evaluate.to_device(task.collate(rows.take(np.array([2 * step + rank]))), engine.device)
        engine.backward(task.loss(engine.model, batch)[0] / 30)
        engine.step()
    leave(engine.state_dict(), folder / case / "trained")
    if "stage" in case:
        go_on(worker, config, parent)
    if len(held_out):
        worker.held_out = {"first": len(held_out) - 1, "last": 1}  # of which one rank has no row
        sums = proof.measure_live(worker, held_out, spec.data.eval_max_rows, worker.held_out)
        worker.evaluations["final"] = by_source.summarised(task, sums)
    limit = (folder / case.split(",")[0] / "model.safetensors").stat().st_size // 2 if "full" in case else -1
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if rank == 0:
            lose_last(disk)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        with Made() if "stage" in case else nullcontext() as exporting:
            loop.exported(worker)
        if exporting:
            (folder / case / f"exported-{rank}.json").write_text(json.dumps(sorted(exporting.found)))
    except (finish.WrongExport, finish.StoreFailed, NotWritten) as error:
        remarks.append(str(error))
    except (parameter_files.Failed, RuntimeError) as error:
        if "files" not in case:
            raise
        (folder / case / f"failed-{rank}").write_text(f"{type(error).__name__}: {error}")
        os._exit(0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    if rank == 0:
        place.add_remarks(remarks)
    watchdog.stop()
    dist.barrier()


def lose_last(disk: Path) -> None:
    """Cut the file of the last parameter that has one."""
    for path in sorted(disk.glob("parameters-*/*"), key=lambda each: int(each.name))[-1:]:
        os.truncate(path, 100)


def go_on(worker: setup.Worker, config: dict[str, Any], parent: Path | None) -> None:
    """Save, with memory for copies at stage 1 alone, and see that a new start has the same state bit by bit."""
    lacking = worker.zero_stage == 2
    before = save_room.ALWAYS, save_room.SPARE_PERCENT
    save_room.ALWAYS, save_room.SPARE_PERCENT = (-1, 100) if lacking else before
    loop.begin_checkpoint(worker, STEPS)
    save_room.ALWAYS, save_room.SPARE_PERCENT = before
    loop.wait_copied(worker)
    assert worker.saver.direct == lacking
    assert (worker.saver.held == 0) == lacking
    loop.finish_checkpoint(worker)
    (outcome,) = worker.saver.outcomes()
    assert outcome.error is None
    store = Store(str(worker.folder.path.parent))
    point = resume.agree(store)
    assert point.step == STEPS
    begun, training = start.begin(worker.spec, worker.task, parent), worker.training
    engine = setup.make_engine(begun, training, config, torch.device("cpu"), store, point)
    states = [
        {(part.parameter, part.start, kind): part.tensors[kind] for part in one.fragments() for kind in part.tensors}
        for one in (worker.engine, engine)
    ]
    assert states[0].keys() == states[1].keys()
    for key, tensor in states[0].items():
        assert torch.equal(tensor, states[1][key]), key
        assert tensor.abs().sum() > 0, key
    weights = [one.model.module.state_dict() for one in (worker.engine, engine)]
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name


def refer(case: str, folder: Path) -> None:
    """Make the columns of a reference with the model as it begins."""
    spec, parent = spec_of(case, folder), folder / case.split(",")[0]
    assert spec.training is not None
    prepared = pickle.loads((folder / f"{parent.name}-preferences.prepared").read_bytes())
    task = prepared.task(spec)
    config = deepspeed_config(spec.training, 1, 1, precision=spec.training.precision, on_gpu=False)
    begun, store = start.begin(spec, task, parent, in_parts=True), Store(str(folder / case))
    engine = setup.make_engine(begun, spec.training, config, torch.device("cpu"), store, Point("a"))
    wanted = replace(prepared, reference="reference-group")
    engine.model.train()
    assert reference.without_missing(wanted).reference == ""
    reference.make_in_parts(engine, task, wanted, 0)
    assert engine.model.training
    assert reference.without_missing(wanted) is wanted
    assert rows_of(wanted, wanted.train_files).columns >= {"reference"}


def leave(weights: dict[str, torch.Tensor] | None, where: Path) -> None:
    """Write all weights, where this rank has them."""
    if weights is not None:
        save_file({name: tensor.clone() for name, tensor in weights.items()}, f"{where}.safetensors")


def run(case: str, rank: int, folder: Path) -> None:
    """Run a case."""
    export_in_parts.PAUSE_S = 0.01
    two_ranks.begin_run(case, rank, folder)
    os.environ[VARIABLE] = f"damage:rank=0:step={STEPS}:phase=exported" if "damaged" in case else ""
    if "preferences" in case:
        refer(case, folder)
    else:
        train(case, rank, folder)
