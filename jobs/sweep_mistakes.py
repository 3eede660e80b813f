"""What is wrong with a sweep's spec that only the task and the spec itself can say: metrics, and values of fields.

jobs/spec.py looks this module up while it checks a sweep.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, InitErrorDetails

from cluster.names import suggest
from jobs import spec_sweep
from jobs.spec_sweep import Location, SweepSpec
from jobs.tasks import TaskError, get
from jobs.tasks.options import DEFAULT, mistake


def found(spec: type[BaseModel], values: Mapping[str, Any], context: Mapping[str, Any]) -> list[InitErrorDetails]:
    """Return the mistakes of a sweep, each with its place.

    Args:
        spec: what a job's spec has to be.
        values: the sweep's, as they are in the file.
        context: `folder`, where a task of the user's own lies; `overridden`, the locations that `--set` gave.
    """
    told = [mistake(at, what, {}) for at, what in spec_sweep.contradictions(values, _metrics(values, context))]
    base = {_place(error) for error in _errors(spec, values, {}, context)}
    if not base and (wrong := _without_baseline(spec, values, context)):
        told.append(mistake(("sweep", "baseline"), wrong, {}))
    done: set[Location] = set()
    for at, chosen in spec_sweep.probes(values):
        field, is_inner = at[:3], len(at) == 3
        new = [error for error in _errors(spec, values, chosen, context) if _place(error) not in base]
        if not new or field in done or (is_inner and any(place[:3] == field for place in done)):
            continue  # a field that is not there is said once, and nothing of a range whose ends are wrong
        unknown = [error for error in new if error["type"] == "extra_forbidden"]
        done.add(field if unknown else at)
        if unknown:
            told.append(mistake(field, _no_field(spec, field[-1], unknown[0]), {}))
        else:
            told += [mistake(at, sentence, {}) for sentence in _sentences(chosen, new)]
    return told


def _without_baseline(spec: type[BaseModel], values: Mapping[str, Any], context: Mapping[str, Any]) -> str | None:
    """Say which of the spec's own values the first trial cannot have; None where it may, or needs not."""
    try:
        sweep = SweepSpec.model_validate(_written_out(values.get("sweep")))
    except ValidationError:
        return None  # which the section itself says
    job = spec.model_validate(spec_sweep.of_trial(values, {}), context=context)
    try:
        spec_sweep.baseline(job.model_dump(mode="json", by_alias=True), sweep.fields if sweep.baseline else {})
    except ValueError as error:
        return str(error)
    return None


def _written_out(sweep: Any) -> Any:
    scheduler = sweep.get("scheduler") if isinstance(sweep, Mapping) else None
    return {**sweep, "scheduler": {"name": scheduler}} if isinstance(scheduler, str) else sweep


def _metrics(values: Mapping[str, Any], context: Mapping[str, Any]) -> Mapping[str, str] | None:
    task = values.get("task", DEFAULT)
    name = task.get("name", DEFAULT) if isinstance(task, Mapping) else task
    try:
        return get(name, context.get("folder")).metrics if isinstance(name, str) else None
    except TaskError:
        return None  # which is said of the task itself


def _errors(
    spec: type[BaseModel], values: Mapping[str, Any], chosen: Mapping[str, Any], context: Mapping[str, Any]
) -> list[ErrorDetails]:
    try:
        spec.model_validate(spec_sweep.of_trial(values, chosen), context=context)
    except ValidationError as error:
        return error.errors(include_url=False)
    return []


def _place(error: ErrorDetails) -> tuple[Location, str]:
    return tuple(error["loc"]), error["type"]


def _sentences(chosen: Mapping[str, Any], errors: list[ErrorDetails]) -> list[str]:
    """Return what the spec says of a value, each thing once."""
    (path, value), told = next(iter(chosen.items())), []
    for error in errors:
        at = ".".join(map(str, error["loc"]))
        what = error["msg"].removeprefix("Value error, ")
        told.append(f"{value!r} cannot be its value: {what}{'' if at.startswith(path) or not at else f' ({at})'}")
    return list(dict.fromkeys(told))


def _no_field(spec: type[BaseModel], path: str | int, error: ErrorDetails) -> str:
    """Say that there is no such field, and which one may have been meant."""
    section = str(path).partition(".")[0]
    field = spec.model_fields.get(section)
    kinds = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
    models = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
    keys = error.get("ctx", {}).get("known") or [key for model in models for key in model.model_fields]
    known = [f"{section}.{key}" for key in keys] or [key for key in spec.model_fields if not key.endswith("_")]
    return f"there is no field {path!r} in a job's spec; {suggest(str(path), known)}"
