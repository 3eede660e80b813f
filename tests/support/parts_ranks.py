"""One of two ranks that begin at ZeRO stage 3 without a whole model, learn, and write what they learned in parts.

python tests/support/parts_ranks.py RANK STORE_FILE FOLDER CASE…      a case: PARENT or `new`, ADAPTERS, PRECISION

In FOLDER: <PARENT>/, the models to start from, with <PARENT>.prepared beside. Below FOLDER/<CASE> rank 0 leaves `begun`
and `trained` (all weights as they began, and after the steps), and the run, whose `model` is what was written.
"""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from jobs.checkpoint.catalog import Keep
from jobs.checkpoint.resume import Point
from jobs.checkpoint.saver import GroupNotes, Saver
from jobs.checkpoint.store import Store
from jobs.data.prepare import rows_of
from jobs.run_folder import RunFolder
from jobs.spec import JobSpec
from jobs.worker import evaluate, finish, proof, setup, start
from jobs.worker.fault_injection import VARIABLE, Injector
from jobs.worker.watchdog import Pulse, Watchdog
from jobs.worker.zero import deepspeed_config

LAYERS = {"attention": ["q_proj", "v_proj", "c_attn"], "head": ["lm_head"], "all-linear": "all-linear"}
STEPS = 2


def spec_of(case: str, folder: Path) -> JobSpec:
    """Return what a case trains."""
    parent, adapters, precision, *_ = case.split(",")
    new = {"architecture": "llama", "config": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}}
    new["config"] |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}  # type: ignore[operator]
    model: dict[str, Any] = new if parent == "new" else {"from": str(folder / parent)}
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
    if parent == "new":
        values["task"] = {"name": "causal-lm", "tokenizer": {"from": str(folder / "llama")}}
    return JobSpec.model_validate(values)


def stage_of(case: str) -> int:
    """Return the ZeRO stage of a case: 3, where it names no other."""
    return next((int(part.removeprefix("stage")) for part in case.split(",") if part.startswith("stage")), 3)


def run(case: str, rank: int, folder: Path) -> None:
    """Begin, learn, and write."""
    spec = spec_of(case, folder)
    parent = None if case.startswith("new") else folder / case.split(",")[0]
    prepared = pickle.loads((folder / f"{(parent or folder / 'llama').name}.prepared").read_bytes())
    assert spec.training is not None
    task, rows, precision = prepared.task(spec), rows_of(prepared, prepared.train_files), spec.training.precision
    begun = start.begin(spec, task, parent, in_parts=stage_of(case) == 3)
    place = RunFolder(folder / case / "run")
    config = deepspeed_config(spec.training, 1, 1, precision=precision, on_gpu=False)
    engine = setup.make_engine(begun, spec.training, config, torch.device("cpu"), Store(str(folder / case)), Point("a"))
    remarks = begun.said + start.look(spec, task, engine.model.module, rows.columns)
    leave(engine.state_dict(), folder / case / "begun")
    watchdog = Watchdog(place.stacks("a", rank), 600, Pulse(place.pulse("a", rank), "node"))
    worker = setup.Worker(
        spec, spec.training, precision, task, engine, rows, rows_of(prepared, prepared.eval_files), place, None,
        Saver(Store(str(folder / case)), "a", rank, 2, Keep(), notes=GroupNotes()), watchdog,
        Injector(place, rank), STEPS, 1, stage_of(case), model_directory=parent,
    )  # fmt: skip
    for step in range(STEPS):
        batch = evaluate.to_device(task.collate(rows.take(np.array([2 * step + rank]))), engine.device)
        engine.backward(task.loss(engine.model, batch)[0] / 30)
        engine.step()
    leave(engine.state_dict(), folder / case / "trained")
    sums = proof.measure_live(worker, worker.eval_rows, spec.data.eval_max_rows)
    worker.evaluations["final"] = task.summarise(sums)
    try:
        finish.export_weights(worker)
    except finish.WrongExport as error:
        remarks.append(str(error))
    if rank == 0:
        place.add_remarks(remarks)
    watchdog.stop()
    dist.barrier()


def leave(weights: dict[str, torch.Tensor] | None, where: Path) -> None:
    """Write all weights, where this rank has them."""
    if weights is not None:
        save_file({name: tensor.clone() for name, tensor in weights.items()}, f"{where}.safetensors")


def main(rank: int, meeting: str, folder: Path, cases: list[str]) -> None:
    """Meet the other rank; run every case."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    for case in cases:
        (folder / case / "run").mkdir(parents=True, exist_ok=True)
        if "damaged" in case:
            os.environ[VARIABLE] = f"damage:rank=0:step={STEPS}:phase=exported"
        if rank == 0:
            RunFolder(folder / case / "run").begin()
        dist.barrier()
        run(case, rank, folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
