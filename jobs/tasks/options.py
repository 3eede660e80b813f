"""Where a task's options stand in a spec, and what is wrong with them: the keys of `task`, or of `data` as well.

jobs/spec.py looks this module up while it checks a spec; it knows nothing of jobs but the tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from jobs.tasks import TASKS, Task, TaskError, TaskOptions, get

DEFAULT = "causal-lm"
"""The task of a spec that names none."""


def in_their_place(
    values: Mapping[str, Any], data_keys: list[str], context: Mapping[str, Any]
) -> tuple[dict[str, Any], list[InitErrorDetails]]:
    """Put the task's options, checked and complete, into one place, the mapping `task`; return what is wrong as well.

    Options may be written under `data` too, as before tasks had their own; `--set` may name either place.

    Args:
        values: a job's, as they are in the file.
        data_keys: the keys of `data` that are no task's.
        context: `folder`, where a task of the user's own lies; `overridden`, the locations that `--set` gave.
    """
    data, task = values.get("data") or {}, values.get("task", {})
    task = {"name": task} if isinstance(task, str) else task
    if not (isinstance(task, Mapping) and isinstance(data, Mapping) and isinstance(task.get("name", ""), str)):
        return dict(values), []  # their types are wrong, which the sections themselves say
    name = task.get("name", DEFAULT)
    given = {key: value for key, value in task.items() if key != "name"}
    under_data = {key: value for key, value in data.items() if key not in data_keys}
    rest = {key: value for key, value in data.items() if key in data_keys}
    options, mistakes = _one_place(given, under_data, context.get("overridden", ()))
    try:
        kind = get(name, context.get("folder"))
        checked = kind.Options.model_validate(options)
        mistakes += _metric_mistakes(values.get("checkpoint"), kind.metrics_of(checked))
        options = checked.model_dump(mode="json", by_alias=True)
        mistakes += _origin_mistakes(kind, checked, values.get("model"))
        mistakes += _parallel_mistakes(kind, checked, values.get("training"))
    except TaskError as error:
        mistakes.append(mistake(("task", "name"), str(error), name))
    except ValidationError as error:
        mistakes += _option_mistakes(error, kind.Options, under_data.keys() - given.keys(), data_keys)
    return {**values, "task": {"name": name, **options}, "data": rest}, mistakes


def decisive(task: Mapping[str, Any]) -> dict[str, Any]:
    """Return the mapping `task` of a checked spec without what a task got later and what is at its default there.

    So a run, and prepared data, are known by the digests that they had before.
    """
    name = task["name"]
    if name not in TASKS:
        return dict(task)
    options = get(name).Options
    defaults = options().model_dump(mode="json", by_alias=True)
    same = {key for key in options.later if task.get(key, defaults[key]) == defaults[key]}
    return {key: value for key, value in task.items() if key not in same}


def _origin_mistakes(kind: type[Task], options: TaskOptions, model: Any) -> list[InitErrorDetails]:
    source = model.get("from") if isinstance(model, Mapping) else None
    try:
        kind.check_options(options, source if isinstance(source, str) else None)
    except TaskError as error:
        return [mistake(("model", "from"), str(error), source)]
    return []


def _parallel_mistakes(kind: type[Task], options: TaskOptions, training: Any) -> list[InitErrorDetails]:
    parallel = training.get("parallel") if isinstance(training, Mapping) else None
    parts = parallel.get("sequence", 1) if isinstance(parallel, Mapping) else 1
    try:
        if isinstance(parts, int) and parts > 1:
            kind.check_shared_rows(options)
    except TaskError as error:
        return [mistake(("training", "parallel", "sequence"), str(error), parts)]
    return []


def refusal(title: str, mistakes: list[InitErrorDetails], error: ValidationError | None = None) -> ValidationError:
    """Return one error with these mistakes and those of another."""
    found = error.errors(include_url=False) if error else []
    others = [mistake(e["loc"], e["msg"], e["input"], e["type"], ctx=e.get("ctx")) for e in found]
    return ValidationError.from_exception_data(title, others + mistakes)


def _one_place(
    given: dict[str, Any], under_data: dict[str, Any], overridden: Any
) -> tuple[dict[str, Any], list[InitErrorDetails]]:
    """Return the options of both places; one in both is a mistake, unless `--set` gave one of the two."""
    options, mistakes = {**given, **under_data}, []
    for key in sorted(given.keys() & under_data.keys()):
        task_set, data_set = (any(at[:2] == (section, key) for at in overridden) for section in ("task", "data"))
        if task_set == data_set:
            mistakes.append(mistake(("data", key), f"is given as `task.{key}` too; keep that one", under_data[key]))
        first, last = (under_data[key], given[key]) if task_set else (given[key], under_data[key])
        options[key] = _merged(first, last)
    return options, mistakes


def _merged(first: Any, last: Any) -> Any:
    if not (isinstance(first, Mapping) and isinstance(last, Mapping)):
        return last
    return {**first, **{key: _merged(first.get(key), value) for key, value in last.items()}}


def _metric_mistakes(checkpoint: Any, known: Mapping[str, str]) -> list[InitErrorDetails]:
    metric = checkpoint.get("metric") if isinstance(checkpoint, Mapping) else None
    if not isinstance(metric, str) or metric in known:
        return []
    return [mistake(("checkpoint", "metric"), "the task has no such metric", metric, "unknown_word", sorted(known))]


def _option_mistakes(
    error: ValidationError, options: type[BaseModel], in_data: Set[str], data_keys: list[str]
) -> list[InitErrorDetails]:
    """Return the mistakes where the user wrote them, each unknown key with those that would have been right."""
    mistakes = []
    for found in error.errors(include_url=False):
        place, known = "data" if found["loc"] and found["loc"][0] in in_data else "task", None
        if found["type"] == "extra_forbidden":
            beside = data_keys if place == "data" and len(found["loc"]) == 1 else []
            known = sorted(_keys_at([options], found["loc"][:-1]) + beside)
        at = (place, *found["loc"])
        mistakes.append(mistake(at, found["msg"], found["input"], found["type"], known, found.get("ctx")))
    return mistakes


def mistake(
    location: tuple[str | int, ...],
    message: str,
    given: Any,
    kind: str = "value_error",
    known: list[str] | None = None,
    ctx: Mapping[str, Any] | None = None,
) -> InitErrorDetails:
    """Return a mistake, for `refusal`; of the words that are `known`, cluster/mistakes.py suggests the closest."""
    context: Any = {**(ctx or {}), "message": message.removeprefix("Value error, "), "known": known or []}
    return InitErrorDetails(type=PydanticCustomError(kind, "{message}", context), loc=location, input=given)  # type: ignore[arg-type]


def _keys_at(models: list[Any], location: tuple[str | int, ...]) -> list[str]:
    """Return the keys that the section at `location` of an options model has."""
    for part in location:
        fields = [field for model in models for key, field in model.model_fields.items() if part in (key, field.alias)]
        kinds = [kind for field in fields for kind in (field.annotation, *get_args(field.annotation))]
        models = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)] or models
    return [field.alias or key for model in models for key, field in model.model_fields.items()]
