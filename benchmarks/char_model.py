"""The larger character model beside a plain PyTorch loop: the same first weights, the same rows, losses compared.

    python benchmarks/char_model.py /path/to/tinyshakespeare.txt [--steps 300] [--batch 64] [--micro-batch 16]

Both train the model of jobs/specs/shakespeare-char-large.yaml in fp32, one after the other within each step, so that
both see the same machine. Tandem's side is its task, its rows in its order, and its DeepSpeed engine, without Ray; the
other is a copy of the first weights, torch.optim.AdamW, `clip_grad_norm_`, and a cosine of the learning rate of its
own. Dropout draws the same masks on both sides. Printed: both losses every tenth step, the largest relative difference
of any step's, and seconds a step of each.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cluster import specfile  # noqa: E402
from jobs.data import batches  # noqa: E402
from jobs.data.prepare import prepare, rows_of  # noqa: E402
from jobs.data.rows import Rows  # noqa: E402
from jobs.spec import JobSpec, TrainingSpec  # noqa: E402
from jobs.tasks import Batch, Task  # noqa: E402
from jobs.worker import start  # noqa: E402
from jobs.worker.deepspeed_engine import Engine, import_deepspeed  # noqa: E402
from jobs.worker.evaluate import to_device  # noqa: E402
from jobs.worker.loop import step_seed  # noqa: E402
from jobs.worker.optimizers import parameter_groups  # noqa: E402
from jobs.worker.schedules import learning_rate  # noqa: E402
from jobs.worker.zero import deepspeed_config  # noqa: E402

SPEC = ROOT / "jobs" / "specs" / "shakespeare-char-large.yaml"


def rows_of_steps(task: Task, rows: Rows, training: TrainingSpec, micro: int, steps: int) -> Iterator[list[Batch]]:
    """Yield each step's micro-batches, as the worker of a job of one gets them."""
    order = batches.Order(len(rows), training.seed)
    for step in range(steps):
        chosen = order.take(step * training.global_batch_size, training.global_batch_size)
        yield [task.collate(rows.take(part)) for part in batches.share(chosen, 0, 1, micro)]


def by_tandem(task: Task, engine: Engine, parts: list[Batch], targets: int) -> float:
    """Take one step; return the loss per token."""
    total = 0.0
    for part in parts:
        loss, _ = task.loss(engine.model, part)
        engine.backward(loss / targets)
        engine.step()
        total += loss.item()
    return total / targets


def by_torch(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, parts: list[Batch], targets: int, clip: float
) -> float:
    """Take one step; return the loss per token."""
    total = 0.0
    for part in parts:
        logits = model(input_ids=part["input_ids"], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), part["labels"].flatten(), reduction="sum")
        (loss / targets).backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad()
    return total / targets


def plain_rate(training: TrainingSpec, step: int, steps: int) -> float:
    """Return the learning rate of a step, from 0: nanoGPT's get_lr, but that the warm-up ends at its last step."""
    warmup, high, low = training.warmup_steps, training.learning_rate, training.min_learning_rate
    if step < warmup:
        return high * (step + 1) / warmup
    share = (step - warmup) / (steps - warmup)
    return low + 0.5 * (1.0 + math.cos(math.pi * share)) * (high - low)


def compare(spec: JobSpec, folder: Path, steps: int) -> None:
    """Train both, and print."""
    assert spec.training is not None
    training, device = spec.training, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert training.steps is not None
    prepared = prepare(spec, folder, folder, parent=None, on_progress=lambda *_: None)
    task, rows = prepared.task(spec), rows_of(prepared, prepared.train_files)
    micro = batches.micro_batch_size(training.micro_batch_size, training.global_batch_size, 1)
    accumulation = batches.accumulation_steps(training.global_batch_size, 1, micro)
    begun = start.begin_whole(spec, task, None)
    model = copy.deepcopy(begun.model).to(device)
    groups = parameter_groups(model.named_parameters(), training.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=training.betas, eps=training.epsilon)
    config = deepspeed_config(training, micro, accumulation, precision="fp32", on_gpu=device.type == "cuda")
    engine = Engine(begun.model, training, config, device)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{count:,} parameters, {len(rows):,} rows, {accumulation} micro-batches of {micro} rows a step, fp32, {device}"
    )
    worst, taken = 0.0, [0.0, 0.0]
    for step, given in enumerate(rows_of_steps(task, rows, training, micro, steps)):
        parts = [to_device(part, device) for part in given]
        targets = sum(int((part["labels"] >= 0).sum()) for part in parts)
        engine.set_learning_rate(learning_rate(training, step, training.steps))
        for group in optimizer.param_groups:
            group["lr"] = plain_rate(training, step, training.steps)
        began = time.perf_counter()
        torch.manual_seed(step_seed(training.seed, step, 0))
        ours = by_tandem(task, engine, parts, targets)
        between = time.perf_counter()
        torch.manual_seed(step_seed(training.seed, step, 0))
        plain = by_torch(model, optimizer, parts, targets, training.clip)
        taken = [taken[0] + between - began, taken[1] + time.perf_counter() - between]
        worst = max(worst, abs(ours - plain) / plain)
        if step % 10 == 0 or step + 1 == steps:
            print(f"step {step + 1:4}  loss {ours:.6f}  plain PyTorch {plain:.6f}", flush=True)
    print(f"largest relative difference of the losses of {steps} steps: {worst:.2e}")
    print(f"seconds a step: {taken[0] / steps:.3f}, plain PyTorch {taken[1] / steps:.3f}")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="tinyshakespeare.txt")
    parser.add_argument("--steps", type=int, default=300, help="of the spec's 5,000 (default 300)")
    parser.add_argument("--batch", type=int, default=64, help="rows a step (default 64, the spec's)")
    parser.add_argument("--micro-batch", type=int, default=16, help="rows a forward pass (default 16)")
    options = parser.parse_args()
    os.environ.setdefault("LOCAL_RANK", "0")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import_deepspeed()
    overrides = [
        f"data.train={options.text.absolute()}", "training.precision=fp32",
        f"training.global_batch_size={options.batch}", f"training.micro_batch_size={options.micro_batch}",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="tandem-char-") as folder:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=0, world_size=1)
        compare(specfile.load(SPEC, JobSpec, overrides), Path(folder), options.steps)
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
