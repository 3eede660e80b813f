"""The section `sweep` of a job's spec: over which fields, how many trials, by which metric, and what would be wrong.

Free of everything but pydantic and the standard library. What a trial trains with is the job's own spec with a few
fields set (`of_trial`), and each end of a range is tried in it while the spec is checked (`probes`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from cluster.strict import Strict
from jobs.spec_sections import OrItsName, Positive, Seed

Location = tuple[str | int, ...]
Phase = Literal["pretrain", "finetune"]
DIGITS = 6
"""Significant digits of what is drawn from a range, so that what is printed is what was trained with."""
MOST_POINTS = 100_000

SAME_RESULT = ("resources", "storage", "failures", "max_failures", "checkpoint", "register", "evaluate", "quantize")
SAME_RESULT_IN_TRAINING = ("micro_batch_size", "gradient_checkpointing", "compile", "deepspeed", "eval_every")
HELD_OUT = ("eval", "eval_fraction", "split_seed", "eval_max_rows")


class FieldSpec(Strict):
    """The values that one field may take: a range from `min` to `max`, or `choices`."""

    min: int | float | None = None
    """The lower end of a range, itself a value."""
    max: int | float | None = None
    """The upper end."""
    log: bool = False
    """Draw evenly from the logarithm: each order of magnitude is as likely."""
    step: int | float | None = Field(None, gt=0)
    """Only `min`, `min + step`, `min + 2 step`, …"""
    whole: bool | None = None
    """Whole numbers only. To be said where both ends are written as whole numbers."""
    choices: list[Any] | None = Field(None, min_length=1)
    """The values themselves, instead of a range."""

    @model_validator(mode="after")
    def _is_one_of_both(self) -> FieldSpec:
        if wrong := _wrong_with(self):
            raise ValueError(wrong)
        return self

    @property
    def size(self) -> int | None:
        """How many values there are; None where a range has no steps."""
        if self.choices is not None:
            return len(self.choices)
        low, high = self.ends
        if self.step is not None:
            return math.floor((high - low) / self.step + 1e-9) + 1
        return int(high) - int(low) + 1 if self.whole else None

    def nth(self, index: int) -> Any:
        """Return the value of that index, from 0, of a field that has a size."""
        if self.choices is not None:
            return self.choices[index]
        low, _ = self.ends
        value = low + index * (self.step or 1)
        return int(value) if self.whole else float(f"{value:.12g}")

    def at(self, share: float) -> Any:
        """Return the value that lies at `share`, from 0 to below 1, of all there are: evenly drawn, evenly spread."""
        if self.size is not None and not self.log:
            return self.nth(math.floor(share * self.size))
        low, high = self.ends
        if self.whole:
            return min(math.floor(low * ((high + 1) / low) ** share), int(high))
        return self.rounded(low * (high / low) ** share if self.log else low + share * (high - low))

    def rounded(self, value: float) -> float:
        """Return a value of a range without steps with DIGITS significant digits, within the range."""
        low, high = self.ends
        return min(max(float(f"{value:.{DIGITS}g}"), low), high)

    def has(self, value: Any) -> bool:
        """Say whether a value is one of the field's."""
        if self.choices is not None:
            return value in self.choices
        low, high = self.ends
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            return False
        if self.step is not None:
            return math.isclose(self.nth(round((value - low) / self.step)), value, rel_tol=1e-9, abs_tol=1e-12)
        return not self.whole or value == int(value)

    @property
    def ends(self) -> tuple[float, float]:
        """Both ends of a range."""
        assert self.min is not None, "a range has a lower end"
        assert self.max is not None, "a range has an upper end"
        return self.min, self.max


class SchedulerSpec(Strict):
    """Which trials go on to their end."""

    name: Literal["asha", "none"] = "asha"
    """asha (Li et al. 2018, arXiv:1810.05934) stops trials that do worse than others did at the same evaluation; none
    stops none."""
    grace: Positive = 1
    """So many evaluations each trial makes before it may be stopped."""
    reduction_factor: float = Field(3.0, gt=1, le=100)
    """At the evaluations grace, grace × this, grace × this², …, the best one in so many goes on."""


class SweepSpec(Strict):
    """Trials of one training job with other values of some fields, of which the best one stays."""

    phase: Phase | None = None
    """What each trial is: pretrain, or finetune where `model.from` is given."""
    fields: dict[str, FieldSpec] = Field(min_length=1)
    """Dotted path of a field of this spec → its values: `training.learning_rate: {min: 1e-4, max: 1e-2, log: true}`."""
    metric: str = "loss"
    """What trials are compared by, on the held-out rows: one of the task's metrics. The task knows which way is
    better."""
    trials: Positive | None = None
    """How many; left out, with `search: grid`, all points of the grid."""
    seed: Seed = 0
    """Decides what is drawn."""
    search: Literal["random", "grid", "optuna"] = "random"
    """random draws values, grid takes all combinations, optuna (its TPE sampler) learns from the trials before."""
    baseline: bool = False
    """The first trial has the values that the spec itself gives: is anything better than them?"""
    scheduler: Annotated[SchedulerSpec, OrItsName] = SchedulerSpec()
    """asha, none, or `{name: asha, grace: …}`."""
    parallel: Positive | None = None
    """How many trials at once; left out, as many as the cluster has room for."""
    time_budget_s: float | None = Field(None, gt=0, le=1e9)
    """After so long no trial begins, and those that run are stopped."""

    @model_validator(mode="after")
    def _can_be_made(self) -> SweepSpec:
        if wrong := _wrong_with_number(self):
            raise ValueError(wrong)
        return self

    @property
    def points(self) -> int | None:
        """How many combinations there are; None where a field has no end of values."""
        sizes = [field.size for field in self.fields.values()]
        return None if None in sizes else math.prod(size for size in sizes if size)

    @property
    def count(self) -> int:
        """How many trials the sweep makes."""
        return self.trials or self.points or 0


def _wrong_with(field: FieldSpec) -> str | None:
    """Say why a field has no values, or which is not known; None where all is well."""
    if field.choices is not None:
        if any((field.min is not None, field.max is not None, field.log, field.step, field.whole is not None)):
            return "give either `choices` or a range (`min`, `max`), not both"
        twice = [value for index, value in enumerate(field.choices) if value in field.choices[:index]]
        return f"choices: {twice[0]!r} is there twice" if twice else None
    if field.min is None or field.max is None:
        return "give `min` and `max`, or `choices`"
    if field.min >= field.max:
        return f"the range is empty: min {field.min:g} is not below max {field.max:g}"
    written_whole = all(isinstance(value, int) for value in (field.min, field.max))
    if field.whole and not written_whole:
        return "whole: true needs whole numbers as `min` and `max`"
    if field.whole and field.step is not None and not isinstance(field.step, int):
        return "whole: true needs a whole number as `step`"
    if written_whole and field.whole is None and not isinstance(field.step, float):
        return "both ends are whole numbers: say `whole: true` for whole numbers only, `whole: false` for all between"
    if field.log and field.min <= 0:
        return f"log: true needs a `min` above 0, not {field.min:g}"
    if field.log and field.step is not None:
        return "a range has either `log: true` or a `step`"
    if field.step is not None and field.step > field.max - field.min:
        return f"step {field.step:g} is wider than the range"
    return None


def _wrong_with_number(sweep: SweepSpec) -> str | None:
    """Say why so many trials cannot be made; None where they can."""
    if sweep.scheduler.name == "none" and sweep.scheduler != SchedulerSpec(name="none"):
        return "scheduler: none stops no trial; leave grace and reduction_factor out"
    if sweep.search != "grid" and sweep.trials is None:
        return f"search: {sweep.search} needs `trials`: how many to make"
    endless = [path for path, field in sweep.fields.items() if field.size is None]
    if sweep.search == "grid" and endless:
        return f"search: grid needs a `step`, whole numbers or `choices` for each field, and {endless[0]} has no end"
    points = sweep.points
    if points is not None and points > MOST_POINTS and sweep.search == "grid":
        return f"the grid has {points} points, more than {MOST_POINTS}: draw some by search: random"
    if sweep.trials is not None and points is not None and sweep.search == "grid" and sweep.trials != points:
        return f"the grid has {points} points, and trials is {sweep.trials}: leave `trials` out, or draw them by random"
    if sweep.baseline and sweep.search == "grid":
        return "search: grid tries what it lists and nothing else; leave `baseline` out"
    if sweep.trials is not None and points is not None and sweep.trials > points:
        return f"there are {points} combinations, fewer than {sweep.trials} trials: use search: grid"
    return None


def phase_of(values: Mapping[str, Any]) -> Any:
    """Return what each trial of a sweep is, from its spec as it was written; the phase of any other job."""
    if values.get("phase") != "sweep":
        return values.get("phase")
    given = _section(values, "sweep").get("phase")
    return given or ("finetune" if _section(values, "model").get("from") is not None else "pretrain")


def of_trial(values: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Return a sweep's spec as that of one trial: an ordinary job with the chosen fields set, which registers nothing.

    Args:
        values: the sweep's, as written or resolved.
        chosen: dotted path → value.
    """
    trial = {key: value for key, value in values.items() if key not in ("sweep", "register", "register_")}
    trial["phase"] = phase_of(values)
    for path, value in chosen.items():
        _set(trial, path.split("."), value)
    return trial


def baseline(resolved: Mapping[str, Any], fields: Mapping[str, FieldSpec]) -> dict[str, Any]:
    """Return the values that a resolved spec itself has in the fields of its sweep.

    Raises:
        ValueError: it has none, or another one than the sweep may try; the message names the field.
    """
    found = {}
    for path, field in fields.items():
        value: Any = resolved
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if not field.has(value):
            raise ValueError(f"the spec has {path}: {value!r}, which is none of the values that the sweep may try")
        found[path] = value
    return found


def contradictions(values: Mapping[str, Any], metrics: Mapping[str, str] | None) -> Iterator[tuple[Location, str]]:
    """Yield what a sweep cannot do, each with its place; sections of a wrong type are passed over.

    Args:
        metrics: the task's, each with "max" or "min"; None where the task is not known.
    """
    sweep = values.get("sweep")
    if not isinstance(sweep, Mapping):
        yield (), "phase sweep needs a `sweep` section: `fields`, `metric` and `trials`"
        return
    metric = sweep.get("metric", "loss")
    if metrics is not None and isinstance(metric, str) and metric not in metrics:
        yield ("sweep", "metric"), f"the task has no metric {metric!r}; it has {', '.join(sorted(metrics))}"
    data = _section(values, "data")
    if not data.get("eval") and data.get("eval_fraction", True) == 0:
        yield ("sweep",), "nothing is held out to compare trials by: give `data.eval`, or an `eval_fraction` above 0"
    if _scheduler(sweep) == "asha" and _section(values, "training").get("eval_every") is None:
        yield (
            ("sweep", "scheduler"),
            "asha compares trials at their evaluations: give `training.eval_every`, or `scheduler: none`",
        )
    for path in _section(sweep, "fields"):
        if isinstance(path, str) and (wrong := _not_for_sweeps(path, bool(data.get("eval")))):
            yield ("sweep", "fields", path), wrong


def probes(values: Mapping[str, Any]) -> Iterator[tuple[Location, dict[str, Any]]]:
    """Yield (place of a value, the fields that are set) for the values that are to be tried in the spec, one at a time.

    They are all choices, both ends of a range, and something between them: what a field takes is for the spec to say.
    """
    for path, given in _section(_section(values, "sweep"), "fields").items():
        if not isinstance(path, str) or _not_for_sweeps(path, has_eval=True):
            continue
        try:
            field = FieldSpec.model_validate(given)
        except ValueError:
            continue  # which the section itself says
        at: Location = ("sweep", "fields", path)
        if field.choices is not None:
            yield from (((*at, "choices", index), {path: value}) for index, value in enumerate(field.choices))
        else:
            ends = ((("min",), field.min), (("max",), field.max), ((), field.at(0.37)))
            yield from (((*at, *key), {path: value}) for key, value in ends)


def _not_for_sweeps(path: str, has_eval: bool) -> str | None:
    """Say why a field cannot differ between trials; None where it can."""
    section, _, key = path.partition(".")
    if section in ("name", "phase", "sweep") or path in ("task", "task.name", "model.from"):
        return "is the same for all trials of a sweep: make a sweep for each"
    if section in SAME_RESULT or (section == "training" and key.split(".")[0] in SAME_RESULT_IN_TRAINING):
        return "decides nothing about the result that trials are compared by"
    if path == "model.export":
        return "trials export nothing to a store: train once more with the best values, and with `model.export`"
    if path == "data.start_early":
        return "trials begin when their data is encoded, which they share: leave it out"
    if section == "data" and (key in HELD_OUT or not has_eval):
        way = "" if key in HELD_OUT else "; give the held-out rows a source of their own, `data.eval`"
        return f"decides which rows are held out: trials would be measured on different ones{way}"
    return None


def _scheduler(sweep: Mapping[str, Any]) -> Any:
    given = sweep.get("scheduler", "asha")
    return given.get("name", "asha") if isinstance(given, Mapping) else given


def _set(values: dict[str, Any], path: list[str], value: Any) -> None:
    """Set a value at a path, in copies of the mappings on the way; a section in short form is written out."""
    for key in path[:-1]:
        inner = values.get(key)
        if isinstance(inner, str) and key == "task":
            inner = {"name": inner}
        values[key] = dict(inner) if isinstance(inner, Mapping) else {}
        values = values[key]
    values[path[-1]] = value


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = values.get(name)
    return found if isinstance(found, Mapping) else {}
