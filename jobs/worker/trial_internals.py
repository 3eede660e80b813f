"""What trying a micro-batch takes of DeepSpeed's insides (0.19): a last pass of a step, and gradients thrown away.

deepspeed itself is imported in jobs/worker/deepspeed_internals.py alone; these are objects that it has made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cluster.internals import Internal

ENTRIES = (
    Internal(
        "DeepSpeedEngine.micro_steps",
        "set, to have a pass be the last one of a step and take the memory of reduced gradients without a step",
        "a micro-batch is tried without the memory that its last pass takes",
        "an engine can be told so for one pass; `set_gradient_accumulation_boundary` is for ever",
    ),
    Internal(
        "DeepSpeedZeroOptimizer.averaged_gradients, all_grad_tensors, micro_step_id",
        "emptied, as a step does that is skipped for an overflow: gradients of a trial are no part of the first step",
        "training begins with gradients of rows that were only tried",
        "`zero_grad` throws them away at stages 1 and 2 too",
    ),
    Internal(
        "DeepSpeedZeroOptimizer.gradient_accumulation_steps",
        "set beside the engine's when the micro-batch is known, which `set_train_batch_size` does not do",
        "ZeRO's optimizers count with another number of passes than the engine",
        "`set_train_batch_size` sets both",
    ),
)


@contextmanager
def thrown_away(engine: Any) -> Iterator[Callable[[], None]]:
    """Yield a function that makes the next pass the last of a step; afterwards no gradient is left, and none counts.

    Before it is called, a pass is one of several. No step must be taken within.
    """
    before = engine.micro_steps
    steps = engine.gradient_accumulation_steps()
    begin = before - before % steps
    engine.micro_steps = begin

    def last() -> None:
        engine.micro_steps = begin + steps - 1

    try:
        yield last
        _forget_gradients(engine)
    finally:
        engine.micro_steps = before


def _forget_gradients(engine: Any) -> None:
    """Throw gradients away at whatever stage, as DeepSpeed does where it skips a step."""
    if not engine.zero_optimization():
        engine.zero_grad()
        return
    optimizer = engine.optimizer
    optimizer.zero_grad()
    for name in ("averaged_gradients", "all_grad_tensors"):
        gradients = getattr(optimizer, name, {})
        for group in gradients:
            gradients[group] = None  # the same mapping: others refer to it
    if engine.zero_optimization_stage() in (1, 2) and hasattr(optimizer, "micro_step_id"):
        optimizer.micro_step_id = -1


def set_accumulation(engine: Any, micro_batch: int, steps: int) -> None:
    """Have a step of an engine that has taken none be of so many passes of so many rows."""
    engine.set_train_micro_batch_size(micro_batch)
    engine.set_train_batch_size(micro_batch * steps * engine.dp_world_size)
    if hasattr(engine.optimizer, "gradient_accumulation_steps"):
        engine.optimizer.gradient_accumulation_steps = steps
