"""A fine-tuning set packed against padded: tokens/s of real tokens, the same examples and as many updates.

    python benchmarks/packing.py [--data FILE] [--examples 512] [--length 512] [--rows 8] [--rounds 3]

    packed        several conversations in a row by best fit, none of which sees another (task.pack: true, the default)
    padded        one conversation a row, padded to `sequence_length` (task.pack: false)
    to the longest   the same, cut to the longest of each micro-batch, as transformers' padding collators do

Each goes over the same examples once with the task's rows, collator and loss and a DeepSpeed engine of one process,
`rows` rows a forward pass, in --updates updates. The rounds alternate. Real tokens are those of the conversations: no
padding. Printed: tokens/s at the median round of each, the share of places that hold a token, and the ratios.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cluster.precision import Precision, resolve, this_cpu  # noqa: E402
from jobs.data.prepare import prepare, rows_of  # noqa: E402
from jobs.spec import JobSpec  # noqa: E402
from jobs.tasks import Batch, Task  # noqa: E402
from jobs.worker import start  # noqa: E402
from jobs.worker.deepspeed_engine import Engine, import_deepspeed  # noqa: E402
from jobs.worker.evaluate import to_device  # noqa: E402
from jobs.worker.zero import deepspeed_config  # noqa: E402

SHAPE = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4}
VOCABULARY = 4096
LONGEST = "to the longest"


def spec_of(options: argparse.Namespace, packed: bool) -> JobSpec:
    """Return the job: a Llama of 4M parameters on conversations."""
    task = {"name": "causal-lm", "sequence_length": options.length, "pack": packed}
    return JobSpec.model_validate(
        {
            "name": "bench-packing",
            "phase": "pretrain",
            "task": {**task, "tokenizer": {"train": "bpe", "vocab_size": VOCABULARY}},
            "model": {"architecture": "llama", "config": SHAPE},
            "data": {"train": options.data, "max_examples": options.examples, "eval_fraction": 0},
            "training": {"steps": options.updates, "global_batch_size": options.rows, "deepspeed": {"zero_stage": 0}},
        }
    )


def cut(batch: Batch) -> Batch:
    """Leave out the places at the end of (B, S) in which no row learns anything."""
    last = int((batch["labels"] >= 0).any(dim=0).nonzero().max()) + 1
    return {name: tensor[:, :last] for name, tensor in batch.items()}


class Contestant:
    """One way to make batches of the examples, with an engine of its own that begins with the same weights."""

    def __init__(self, name: str, task: Task, batches: list[Batch], model: torch.nn.Module, updates: int) -> None:
        self.name, self.batches = name, batches
        self._task = task
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        on_gpu = self._device.type == "cuda"
        precision: Precision = "bf16" if on_gpu else resolve("auto", [this_cpu()])
        accumulation = math.ceil(len(batches) / updates)
        spec = JobSpec.model_validate({**BASE, "training": {"steps": 1, "deepspeed": {"zero_stage": 0}}})
        assert spec.training is not None
        rows = len(batches[0]["input_ids"])
        config = deepspeed_config(spec.training, rows, accumulation, precision=precision, on_gpu=on_gpu)
        self._engine = Engine(model, spec.training, config, self._device)

    def seconds(self) -> float:
        """Go over all examples once; return how long that took."""
        began = time.perf_counter()
        for batch in self.batches:
            loss, count = self._task.loss(self._engine.model, to_device(batch, self._device))
            self._engine.backward(loss / count)
            self._engine.step()
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began


BASE = {"name": "x", "phase": "pretrain", "data": {"train": "x.txt"}, "model": {"architecture": "llama"}}


def contestants(options: argparse.Namespace, folder: Path) -> tuple[list[Contestant], int]:
    """Prepare the examples both ways; return who competes, and the real tokens of the examples."""
    made, model, real, learned = [], None, 0, []
    for name, packed in (("packed", True), ("padded", False)):
        spec = spec_of(options, packed)
        prepared = prepare(spec, Path.cwd(), folder, parent=None, on_progress=lambda *_: None)
        task, rows = prepared.task(spec), rows_of(prepared, prepared.train_files)
        if model is None:
            model = start.begin_whole(spec, task, None).model
        task.prepare_model(model, rows.columns)
        order = np.random.default_rng(0).permutation(len(rows))
        parts = [order[at : at + options.rows] for at in range(0, len(order), options.rows)]
        batches = [task.collate(rows.take(part)) for part in parts]
        learned.append(sum(int((batch["labels"] >= 0).sum()) for batch in batches))
        made.append(Contestant(name, task, batches, copy.deepcopy(model), options.updates))
        if not packed:
            padding = task.tokenizer.pad_token_id  # type: ignore[attr-defined]
            real = sum(int((batch["input_ids"] != padding).sum()) for batch in batches)
            made.append(Contestant(LONGEST, task, [*map(cut, batches)], copy.deepcopy(model), options.updates))
    if learned[0] != learned[1]:
        raise SystemExit(f"packed rows learn {learned[0]} tokens, padded ones {learned[1]}: not the same examples")
    if len(made[0].batches) < options.updates:
        raise SystemExit(f"{len(made[0].batches)} packed micro-batches are too few for {options.updates} updates")
    print(f"{options.examples} examples, {real:,} tokens, of which {learned[0]:,} are learned")
    return made, real


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="python-stdlib-docstrings", help="conversations: a built-in name or a file")
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--length", type=int, default=512, help="places in a row (default 512)")
    parser.add_argument("--rows", type=int, default=8, help="rows in a forward pass (default 8)")
    parser.add_argument("--updates", type=int, default=4, help="optimiser steps a round (default 4)")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    os.environ.setdefault("LOCAL_RANK", "0")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import_deepspeed()
    with tempfile.TemporaryDirectory(prefix="tandem-packing-") as folder:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=0, world_size=1)
        made, real = contestants(options, Path(folder))
        taken = {each.name: [] for each in made}  # type: dict[str, list[float]]
        for _ in range(options.rounds):
            for each in made:
                taken[each.name].append(each.seconds())
        torch.distributed.destroy_process_group()
    rates = {name: real / statistics.median(seconds) for name, seconds in taken.items()}
    for each in made:
        places = sum(batch["input_ids"].numel() for batch in each.batches)
        print(f"{each.name:15} {rates[each.name]:9,.0f} tokens/s   {real / places:4.0%} of the places hold a token")
    print(f"packed over padded: {rates['packed'] / rates['padded']:.2f}")
    print(f"packed over padded to the longest of a micro-batch: {rates['packed'] / rates[LONGEST]:.2f}")


if __name__ == "__main__":
    main()
