"""From a loaded model to a runner that is known to reproduce it, with a cache that fits in memory."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from cluster import memory
from serve.engines.torch.batch import Runner
from serve.engines.torch.blocks import blocks_for
from serve.engines.torch.check import BLOCKS, UnsupportedArchitecture, check_sight, compare, reference_logits
from serve.engines.torch.linear import Weights
from serve.engines.torch.recurrent import Recurrent, RecurrentRunner
from serve.engines.torch.runner import TorchRunner
from serve.engines.torch.torch_internals import stored_int8

RunnerName = Literal["auto", "native", "torch"]
TOLERANCES: dict[Weights, float] = {"bf16": 0.1, "int8": 0.15, "int4": 0.6}
"""How far logits may be from the model's own, relatively. A forgotten term of attention costs more than rounding."""
CACHE_SHARE = 0.5
"""Part of the memory free at start that the cache may take."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What a runner is made for."""

    runner: RunnerName
    weights: Weights
    """What linear layers are kept in; bf16 stands for the model's own dtype."""
    threads: int
    max_running: int
    max_context: int
    cache_memory_bytes: int | None
    compiled: bool


def ready_runner(model: Any, plan: Plan) -> tuple[Runner, int]:
    """Return a runner whose logits are the model's own, and the blocks of its cache.

    Raises UnsupportedArchitecture when none is, or when the model sees tokens that come later.
    """
    check_sight(model, plan.max_context)
    blocks = max(BLOCKS, 1 + plan.max_running * blocks_for(plan.max_context))
    room = plan.cache_memory_bytes or cache_memory_bytes(torch.device(model.device))
    expected = reference_logits(model, plan.max_context)
    exact = model.dtype == torch.float32 and plan.weights == "bf16"
    tolerance = 1e-3 if exact else TOLERANCES[plan.weights]
    refusals = []
    for name, make in _candidates(model, plan):
        try:
            runner = make()
            got = runner.prepare(blocks, room)
            compare(runner, model, expected, plan.max_context, tolerance)
        except UnsupportedArchitecture as error:
            logger.warning("the %s runner does not serve this model: %s", name, error)
            refusals.append(error)
            continue
        runner.release()
        logger.info("the %s runner serves with %d threads and %d blocks of cache", name, plan.threads, got)
        return runner, got
    raise refusals[-1]


def _candidates(model: Any, plan: Plan) -> Iterator[tuple[str, Callable[[], Runner]]]:
    """Give the runners that may serve the model, the fastest first."""
    if isinstance(model, Recurrent):
        if plan.runner == "native":
            raise UnsupportedArchitecture("the native runner has no kernels for a model that carries a state")
        yield "recurrent", lambda: RecurrentRunner(model, plan.weights, plan.compiled)
        return
    reason = "it was not asked for" if plan.runner == "torch" else native_refusal(model, plan)
    if reason is None:
        from serve.engines.torch.native.runner import NativeRunner

        yield "native", lambda: NativeRunner(model, plan.threads, plan.weights, plan.max_context)
    elif plan.runner == "native":
        raise UnsupportedArchitecture(f"the native runner does not serve this model: {reason}")
    else:
        logger.info("not on the native runner: %s", reason)
    if plan.runner != "native":
        yield "torch", lambda: TorchRunner(model, plan.weights, plan.compiled)


def native_refusal(model: Any, plan: Plan) -> str | None:
    """Return why the native runner cannot serve the model, or None."""
    if model.device.type != "cpu":
        return f"the model is on {model.device.type}"
    if model.dtype != torch.bfloat16:
        return f"it computes in bf16, not in {str(model.dtype).removeprefix('torch.')}"
    if plan.compiled:
        return "torch.compile was asked for"
    from serve.engines.torch.native.runner import refusal

    reason: str | None = refusal(model, plan.weights)
    return reason


def weights_of(model: Any, precision: str) -> Weights:
    """Return what the linear layers are to be kept in: what was asked for, or as the model has stored them.

    Where fp32 was asked for by name, stored int8 weights are multiplied in fp32 by torchao, whatever it takes.
    """
    if precision == "fp32":
        return "bf16"
    stored = any(
        isinstance(module, torch.nn.Linear) and stored_int8(module.weight) is not None for module in model.modules()
    )
    if stored:
        return "int8"
    return precision if precision in get_args(Weights) else "bf16"  # type: ignore[return-value]


def cache_memory_bytes(device: torch.device) -> int:
    """Return the memory that the cache may take by default."""
    if device.type == "cuda":
        return int(CACHE_SHARE * torch.cuda.mem_get_info(device)[0])
    return int(CACHE_SHARE * memory.of_node().available)


def assigned_cpus() -> int:
    """Return the CPUs this process was given: Ray says so in OMP_NUM_THREADS, the kernel in the affinity mask."""
    assigned = os.environ.get("OMP_NUM_THREADS", "")
    return int(assigned) if assigned.isdigit() and int(assigned) > 0 else len(os.sched_getaffinity(0))
