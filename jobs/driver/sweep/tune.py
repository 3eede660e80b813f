"""What Ray Tune decides for a sweep: ASHA, which trials go on; its OptunaSearch, which values come next.

Tune's own runner (`Tuner`) is not used: a trial here is a driver with a run's folder, a lease and a guard, which no
trainable has. Of ASHA's arguments only what it reads is given: the trial's id, and no controller.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.errors import UserError
from jobs.driver.sweep.trials import Trial
from jobs.spec_sweep import FieldSpec, SchedulerSpec

LONGEST = 10**6
"""Evaluations of a trial that are looked at; no trial is stopped for having made as many."""


@dataclass(frozen=True)
class _Known:
    """All that ASHA asks of a trial."""

    trial_id: str


class Halving:
    """Tells which trials to stop: asynchronous successive halving, or none of them."""

    def __init__(self, scheduler: SchedulerSpec, mode: str) -> None:
        """`mode`: "max" or "min", which way the metric is better."""
        from ray.tune.schedulers import AsyncHyperBandScheduler

        self._asha = None
        self._added: set[int] = set()
        if scheduler.name == "asha":
            self._asha = AsyncHyperBandScheduler(
                time_attr="evaluation",
                metric="value",
                mode=mode,
                max_t=max(LONGEST, scheduler.grace),
                grace_period=scheduler.grace,
                reduction_factor=scheduler.reduction_factor,
                stop_last_trials=False,
            )

    def stops(self, trial: int, evaluation: int, value: float) -> bool:
        """Take what a trial has measured, and say whether it should stop.

        Args:
            evaluation: which one it is for this trial, from 1.
        """
        if self._asha is None or not math.isfinite(value):
            return False
        known = _Known(str(trial))
        if trial not in self._added:
            self._added.add(trial)
            self._asha.on_trial_add(None, known)
        return self._asha.on_trial_result(None, known, {"evaluation": evaluation, "value": value}) == "STOP"


def suggested(fields: Mapping[str, FieldSpec], before: Sequence[Trial], mode: str, seed: int) -> dict[str, Any]:
    """Return what Optuna's tree-structured Parzen estimator tries next (Bergstra et al. 2011), knowing what was tried.

    Args:
        before: trials; those that go on tell nothing yet.
        mode: "max" or "min".

    Raises:
        UserError: optuna is not installed.
    """
    try:
        import optuna
        from ray.tune.search.optuna import OptunaSearch
    except ImportError as error:
        raise UserError("sweep.search: optuna is not installed here: pip install optuna, or search: random") from error

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {path: _distribution(field) for path, field in fields.items()}
    search = OptunaSearch(space, metric="value", mode=mode, seed=seed)
    for trial in before:
        has_value = trial.value is not None and math.isfinite(trial.value)
        if trial.ended is None or (trial.ended in ("stopped", "out of time") and not has_value):
            continue  # it tells nothing
        search.add_evaluated_point(
            {path: _encoded(field, trial.values[path]) for path, field in fields.items()},
            trial.value,
            error=trial.ended == "failed" or not has_value,
            pruned=trial.ended != "finished",
            intermediate_values=[value for _, value in trial.evaluations if math.isfinite(value)],
        )
    tried = search.suggest("next")
    return {path: _decoded(field, tried[path]) for path, field in fields.items()}


def _distribution(field: FieldSpec) -> Any:
    """Return a field as Optuna knows it: choices and steps by their index."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if field.choices is not None:
        return CategoricalDistribution(list(range(len(field.choices))))
    low, high = field.ends
    if field.size is None:
        return FloatDistribution(low, high, log=field.log)
    return IntDistribution(int(low), int(high), log=True) if field.log else IntDistribution(0, field.size - 1)


def _encoded(field: FieldSpec, value: Any) -> Any:
    if field.choices is not None:
        return field.choices.index(value)
    if field.size is None or field.log:
        return value
    return round((value - field.ends[0]) / (field.step or 1))


def _decoded(field: FieldSpec, value: Any) -> Any:
    if field.size is None:
        return field.rounded(value)
    return int(value) if field.log else field.nth(int(value))
