"""How the numbers of a training section go together: its length and its learning rate's schedule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

DECAYING = "warmup-stable-decay"
SCHEDULES = {"constant", "cosine", "linear", DECAYING}
SCHEDULE = "cosine"
LEARNING_RATE = 3e-4
"""What a training section says that leaves it out."""


def schedule(training: Mapping[str, Any]) -> Iterator[str]:
    """Yield what of a training section's numbers does not go together, as it was written or as it was read."""
    numbers = {key: value for key, value in training.items() if type(value) in (int, float)}
    if training and (training.get("steps") is None) == (training.get("epochs") is None):
        yield "give exactly one of `steps` and `epochs`"
    rate, low = numbers.get("learning_rate", LEARNING_RATE), numbers.get("min_learning_rate", 0)
    name = str(training.get("schedule", SCHEDULE))
    if low > rate:
        yield f"min_learning_rate {low:g} is above learning_rate {rate:g}"
    if training.get("decay_steps") is not None and name in SCHEDULES - {DECAYING}:
        yield f"decay_steps is for schedule {DECAYING}; {name} has no such part"
    if low and name == "constant":
        yield "min_learning_rate is where a schedule ends; schedule constant stays at learning_rate"
    if numbers.get("steps", 0) > 0 and (wrong := too_long(numbers, int(numbers["steps"]), name)):
        yield wrong


def too_long(numbers: Mapping[str, Any], steps: int, name: Any) -> str | None:
    """Return which part of the schedule `name` does not fit into so many steps, in a sentence; None if all do."""
    warmup, decay = numbers.get("warmup_steps") or 0, numbers.get("decay_steps") or 0
    if warmup >= steps:
        return f"warmup_steps {warmup} leaves nothing of {steps} steps"
    if name == DECAYING and warmup + decay > steps:
        share = "; a share of the steps, such as 0.2, fits any number of them"
        return f"warmup_steps {warmup} and decay_steps {decay} are more than {steps} steps{share}"
    return None
