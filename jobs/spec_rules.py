"""What the sections of a job's spec must have of each other; each section's own rules are its own.

Read from the spec as it was written, so that these mistakes are listed beside those within the sections.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Location = tuple[str | int, ...]


def contradictions(values: Mapping[str, Any]) -> Iterator[tuple[Location, str]]:
    """Yield what a phase lacks or cannot honour, each with its place; sections of a wrong type are passed over."""
    phase = values.get("phase")
    yield from _model(phase, _section(values, "model"))
    if phase in ("pretrain", "finetune"):
        yield from _training(phase, values)
    elif phase in ("evaluate", "quantize"):
        data = _section(values, "data")
        if not (data.get("eval") or data.get("train")):
            yield (), f"phase {phase} needs `data.eval`, or `data.train` with an `eval_fraction`"
    if phase == "evaluate" and values.get("register", values.get("register_")) is not None:
        yield (
            ("register",),
            "phase evaluate makes no model that `register` could name; promote the one it measures",
        )
    training, checkpoint = values.get("training"), _section(values, "checkpoint")
    if checkpoint.get("keep_best") and isinstance(training, Mapping) and training.get("eval_every") is None:
        yield (
            ("checkpoint", "keep_best"),
            "`checkpoint.keep_best` needs `training.eval_every`: without, no checkpoint is measured",
        )


def _training(phase: str, values: Mapping[str, Any]) -> Iterator[tuple[Location, str]]:
    if values.get("training") is None:
        yield (), f"phase {phase} needs a `training` section, at least `training: {{steps: 100}}`"
    if _section(values, "data").get("train") is None:
        yield (), f"phase {phase} needs `data.train`: files, a glob, or python-stdlib"


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
