"""One process of a calibration, started by jobs/plan/calibrate.py.

python -m jobs.plan.calibrate_rank RANK WORLD FOLDER rates|engine PRECISION cpu|cuda

Leaves FOLDER/rank-<rank>.json. Tensors are made on the device that torch has as its default, which `main` sets. What is
here for GPUs has not been run on one.
"""

from __future__ import annotations

import importlib
import json
import pickle
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cluster.precision import Precision
from jobs.checkpoint import resume
from jobs.checkpoint.store import Store
from jobs.data.prepare import rows_of
from jobs.spec import JobSpec
from jobs.tasks.cross_entropy import cross_entropy_sum
from jobs.worker import setup, start, zero
from jobs.worker.deepspeed_engine import dtype_of
from jobs.worker.deepspeed_internals import import_deepspeed
from jobs.worker.peak_memory import own_status, peak_bytes, resident

REPEATS = 5
ENOUGH_S = 1.5
"""A measurement that has taken so long is not repeated any more."""
LONGEST_S = 5.0
"""A call that would take longer is left out: a curve has its last rate for what lies beyond."""
ROW = 64
STEPS = 8


@dataclass(frozen=True)
class Scale:
    """Sizes at which a kind of device is measured."""

    hidden: tuple[int, ...]
    tokens: tuple[int, ...]
    lengths: tuple[int, ...]
    wide: int
    """Of the output head."""
    head_tokens: int
    elements: int
    """Of what is copied, updated, summed and gathered."""


SCALES = {
    "cpu": Scale((128, 384, 1024), (128, 512, 2048), (128, 512, 2048), 8192, 512, 1 << 23),
    "cuda": Scale((1024, 2048, 4096), (1024, 4096, 16384), (512, 2048, 8192), 32768, 4096, 1 << 27),
}


def seconds(call: Callable[[], object]) -> float:
    """Return the median seconds of a call that all ranks begin together; the first one only warms up."""
    taken: list[float] = []
    while len(taken) <= REPEATS:
        dist.barrier()
        _wait()
        began = time.perf_counter()
        call()
        _wait()
        taken.append(time.perf_counter() - began)
        enough = torch.tensor(float(sum(taken) > ENOUGH_S and len(taken) > 1))
        dist.all_reduce(enough)  # the same answer on all ranks
        if enough:
            break
    return statistics.median(taken[1:])


def _wait() -> None:
    """Wait until a GPU has done what it was given."""
    if torch.get_default_device().type == "cuda":
        torch.cuda.synchronize()


def curve(sizes: tuple[int, ...], rate: Callable[[int], float], work: Callable[[int], float]) -> list[Any]:
    """Measure rates, each of work a second, at sizes that grow, until a call would take too long on some rank.

    Returns:
        (size, rate), one at least.
    """
    found: list[tuple[int, float]] = []
    for size in sizes:
        if found:
            expected = torch.tensor(work(size) / found[-1][1])
            dist.all_reduce(expected, dist.ReduceOp.MAX)  # the same answer on all ranks
            if expected > LONGEST_S:
                break
        found.append((size, rate(size)))
    return found


def layer_rate(hidden: int, tokens: int, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a pass through two layers of a Llama."""
    import transformers

    sizes = {"hidden_size": hidden, "intermediate_size": 11 * hidden // 4, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(vocab_size=8, num_attention_heads=max(1, hidden // 64), **sizes)
    model = transformers.LlamaModel(config).to(dtype).train()
    given = torch.randn(tokens // ROW, ROW, hidden, dtype=dtype, requires_grad=True)

    def learn() -> None:
        model(inputs_embeds=given, use_cache=False).last_hidden_state.float().sum().backward()
        model.zero_grad()

    return layer_work(hidden, tokens) / seconds(learn)


def layer_work(hidden: int, tokens: int) -> float:
    """Return the FLOPs of a pass through these two layers: 6 a weight and token, and attention's."""
    weights = 2 * (4 * hidden**2 + 3 * hidden * (11 * hidden // 4) + 2 * hidden)
    return 6 * weights * tokens + 2 * 12 * hidden * ROW * tokens


def product_rate(inner: int, wide: int, tokens: int, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a pass of so many tokens through a linear layer."""
    layer = torch.nn.Linear(inner, wide, bias=False, dtype=dtype)
    given = torch.randn(tokens, inner, dtype=dtype, requires_grad=True)
    back = torch.randn(tokens, wide, dtype=dtype)

    def learn() -> None:
        layer(given).backward(back)
        layer.zero_grad()

    return 6 * tokens * inner * wide / seconds(learn)


def attention_rate(length: int, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a pass through causal attention of four heads of 64."""
    rows = max(1, 512 // length)
    query, key, value = (torch.randn(rows, 4, length, 64, dtype=dtype, requires_grad=True) for _ in range(3))
    back = torch.randn(rows, 4, length, 64, dtype=dtype)

    def learn() -> None:
        torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True).backward(back)

    return attention_work(length) / seconds(learn)


def attention_work(length: int) -> float:
    """Return the FLOPs of such a pass."""
    return 12 * max(1, 512 // length) * 256 * length * length


def logits_rate(wide: int, tokens: int, dtype: torch.dtype) -> float:
    """Return how many logits a second get their cross-entropy and gradient."""
    logits, labels = torch.randn(tokens, wide, dtype=dtype, requires_grad=True), torch.arange(tokens)
    return tokens * wide / seconds(lambda: cross_entropy_sum(logits, labels).backward())


def update_rate(elements: int) -> float:
    """Return how many elements a second AdamW updates, with norm and clipping."""
    weight = torch.nn.Parameter(torch.randn(elements))
    optimizer = torch.optim.AdamW([weight], fused=True)
    weight.grad = torch.randn(elements)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_([weight], 1.0)
        optimizer.step()

    return elements / seconds(update)


def bandwidth(elements: int) -> float:
    """Return the bytes a second that a copy reads and writes."""
    source, target = torch.randn(elements), torch.empty(elements)
    return 8 * elements / seconds(lambda: target.copy_(source))


def collectives(world: int, elements: int) -> dict[str, Any]:
    """Return the rates of collectives; none of one rank."""
    if world == 1:
        return {}
    whole, part, one = torch.zeros(elements), torch.zeros(elements // world), torch.zeros(1)
    return {
        "reduced_per_s": 4 * elements / seconds(lambda: dist.all_reduce(whole)),
        "gathered_per_s": 4 * elements / seconds(lambda: dist.all_gather_into_tensor(whole, part)),
        "collective_s": seconds(lambda: dist.all_reduce(one)),
    }


def rates(world: int, dtype: torch.dtype) -> dict[str, Any]:
    """Measure everything but engines."""
    scale = SCALES[torch.get_default_device().type]
    layers: list[tuple[int, int, float]] = []
    for hidden in scale.hidden:
        found = curve(scale.tokens, partial(layer_rate, hidden, dtype=dtype), partial(layer_work, hidden))
        layers += [(hidden, *point) for point in found]
    head = curve(
        scale.hidden,
        lambda hidden: product_rate(hidden, scale.wide, scale.head_tokens, dtype),
        lambda hidden: 6 * hidden * scale.wide * scale.head_tokens,
    )
    return {
        "layers": layers,
        "products": head,
        "attention": curve(scale.lengths, partial(attention_rate, dtype=dtype), attention_work),
        "logits_per_s": logits_rate(scale.wide, scale.head_tokens, dtype),
        "updated_per_s": update_rate(scale.elements),
        "bandwidth": bandwidth(2 * scale.elements),
        **collectives(world, 2 * scale.elements),
    }


def engine(folder: Path, rank: int, world: int) -> dict[str, float]:
    """Measure what an engine adds to a model so small that it takes next to nothing itself, begun as a worker does."""
    import transformers

    spec = JobSpec.model_validate(json.loads((folder / "spec.json").read_text()))
    prepared, device, training = (
        pickle.loads((folder / "prepared").read_bytes()),
        torch.get_default_device(),
        spec.training,
    )
    assert training is not None
    precision: Any = training.precision
    task, rows = prepared.task(spec), rows_of(prepared, prepared.train_files)
    settings = zero.deepspeed_config(training, 1, 1, precision=precision, on_gpu=device.type == "cuda")
    process = resident(own_status())
    with torch.device("cpu"):
        begun = start.begin(spec, task, None, zero.sliceable(settings), dtype_of(settings) == torch.bfloat16)
        store = Store(str(folder / "checkpoints"))
        made = setup.make_engine(begun, training, settings, device, store, resume.Point("calibration"))
    engine_s = _steps(made.model, made.backward, made.step)
    peak = peak_bytes(device)
    sizes = {**spec.model.config, "vocab_size": made.model.module.config.vocab_size}
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).to(device).train()
    plain_s = _steps(plain, lambda loss: loss.backward(), lambda: None)
    assert len(rows)
    return {
        "overhead_s": max(0.0, engine_s - plain_s) / len(list(plain.parameters())),
        "process_bytes": process,
        "engine_bytes": peak - (process if device.type == "cpu" else 0),
    }


def _steps(model: Any, backward: Callable[[torch.Tensor], object], step: Callable[[], object]) -> float:
    """Return the median seconds of a step with 32 tokens."""
    ids, taken = torch.arange(32)[None], []
    for _ in range(STEPS):
        dist.barrier()
        began = time.perf_counter()
        backward(model(input_ids=ids, use_cache=False).logits.float().mean())
        step()
        _wait()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[2:])


def main(rank: int, world: int, folder: Path, what: str, precision: Precision, kind: str) -> None:
    """Measure, and leave what was found."""
    import_deepspeed()
    importlib.import_module("transformers.modeling_utils")
    importlib.import_module("jobs.worker.loop")  # what a worker imports
    if kind == "cuda":
        torch.cuda.set_device(rank)
    torch.set_default_device(torch.device(kind, rank) if kind == "cuda" else torch.device("cpu"))
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world
    )
    if what == "rates":
        found = rates(world, torch.bfloat16 if precision == "bf16" else torch.float32)
    else:
        found = engine(folder, rank, world)
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    dist.barrier()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], sys.argv[5], sys.argv[6])  # type: ignore[arg-type]
