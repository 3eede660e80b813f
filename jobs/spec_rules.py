"""What the sections of a job's spec must have of each other; each section's own rules are its own.

Read from the spec as it was written, so that these mistakes are listed beside those within the sections.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

DECAYING = "warmup-stable-decay"
SCHEDULES = {"constant", "cosine", "linear", DECAYING}
SCHEDULE = "cosine"
LEARNING_RATE = 3e-4
"""What a training section says that leaves it out."""

Location = tuple[str | int, ...]


def contradictions(values: Mapping[str, Any]) -> Iterator[tuple[Location, str]]:
    """Yield what a phase lacks or cannot honour, each with its place; sections of a wrong type are passed over."""
    phase = values.get("phase")
    yield from _model(phase, _section(values, "model"))
    if phase in ("pretrain", "finetune"):
        yield from _training(phase, values)
    elif phase in ("evaluate", "quantize"):
        data = _section(values, "data")
        if not (data.get("eval") or (data.get("train") and data.get("eval_fraction", True))):
            yield (), f"phase {phase} needs `data.eval`, or `data.train` with an `eval_fraction` above 0"
    yield from _data(_section(values, "data"))
    if phase == "evaluate" and values.get("register", values.get("register_")) is not None:
        yield (
            ("register",),
            "phase evaluate makes no model that `register` could name; promote the one it measures",
        )
    training, checkpoint = values.get("training"), _section(values, "checkpoint")
    yield from ((("training",), wrong) for wrong in schedule(_section(values, "training")))
    if checkpoint.get("keep_best") and isinstance(training, Mapping) and training.get("eval_every") is None:
        yield (
            ("checkpoint", "keep_best"),
            "`checkpoint.keep_best` needs `training.eval_every`: without, no checkpoint is measured",
        )
    if checkpoint.get("keep_best") and _holds_nothing_out(_section(values, "data")):
        yield ("checkpoint", "keep_best"), "nothing is held out to be measured: give `data.eval`, or an `eval_fraction`"


def _training(phase: str, values: Mapping[str, Any]) -> Iterator[tuple[Location, str]]:
    if values.get("training") is None:
        yield (), f"phase {phase} needs a `training` section, at least `training: {{steps: 100}}`"
    if _section(values, "data").get("train") is None:
        yield (), f"phase {phase} needs `data.train`: files, a glob, or python-stdlib"


def _holds_nothing_out(data: Mapping[str, Any]) -> bool:
    return not data.get("eval") and data.get("eval_fraction", True) == 0


def _data(data: Mapping[str, Any]) -> Iterator[tuple[Location, str]]:
    columns = data.get("columns")
    if isinstance(columns, list) and (twice := [name for name in columns if columns.count(name) > 1]):
        yield ("data", "columns"), f"the column {twice[0]!r} is there twice"
    if data.get("max_examples") is not None and data.get("train") is None and data.get("eval") is not None:
        yield ("data", "max_examples"), "limits `data.train`, which is not given; name a shorter `data.eval`"


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


def _model(phase: Any, model: Mapping[str, Any]) -> Iterator[tuple[Location, str]]:
    source, architecture = model.get("from", model.get("source")), model.get("architecture")
    if source is None and phase in ("finetune", "evaluate", "quantize"):
        yield (), f"phase {phase} needs `model.from`: models:/name@alias or a directory"
    elif source is None and architecture is None:
        yield (), "give `model.architecture` (with `config`) or `model.from`"
    if source is not None and architecture is not None:
        yield ("model",), "give either `model.architecture` or `model.from`, not both"
    if phase in ("evaluate", "quantize"):
        given = {"lora": model.get("lora") is not None, "config": bool(model.get("config"))}
        for key in (key for key, is_given in given.items() if is_given):
            yield ("model", key), f"phase {phase} takes the model as it is, without `model.{key}`"


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = values.get(name)
    return found if isinstance(found, Mapping) else {}


def unused(spec: Mapping[str, Any]) -> list[str]:
    """Return sentences about what a spec, as it was written, says to no effect."""
    phase, data = spec.get("phase"), _section(spec, "data")
    own = {"evaluate": ("evaluate",), "quantize": ("quantize",)}.get(str(phase), ("training",))
    idle = [name for name in ("training", "evaluate", "quantize") if _section(spec, name) and name not in own]
    said = [f"phase {phase} makes no use of the section `{name}`" for name in idle]
    if data.get("eval") and data.get("eval_fraction"):
        said.append("data.eval_fraction has no effect: what is held out is data.eval")
    if phase in ("pretrain", "finetune") and _section(spec, "training").get("eval_every") and _holds_nothing_out(data):
        said.append("training.eval_every has no effect: nothing is held out")
    return said
