"""Task `forecasting`: the next steps of a time series, as quantiles, from the steps before.

Rows (jobs/tasks/forecast_rows.py): context (N, C) and future (N, H) float32, observed (N, C) and known (N, H) uint8,
targets (N,) int32; rows to be measured also have naive (N, H) and scale (N,) float32, and drawn (N,) int32.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from cluster.strict import Text
from jobs.tasks import Columns, TaskError, TaskOptions, forecast_scores, time_steps
from jobs.tasks.forecast_rows import Shape, padded, to_learn, to_predict
from jobs.tasks.grouping import Grouping
from jobs.tasks.held_ends import HeldEnd
from jobs.tasks.labels import check_columns, chosen, column_of
from jobs.tasks.quantile_forecaster import QuantileForecaster
from jobs.tasks.series import LARGEST, Series, SeriesFindings, series_of, value_of
from jobs.tasks.time_steps import Step

if TYPE_CHECKING:
    import torch

FILE = "forecasting.json"
LEVELS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
HORIZON = 12
LONGEST = 1024
"""A context is no longer unless it is asked for."""


class ForecastingOptions(TaskOptions):
    """How rows become series, and how far ahead these are forecast."""

    series_column: Text | None = None
    """The column that names the series; left out: all rows are one."""
    time_column: Text = "time"
    """The column of the stamps: numbers, or dates and times in ISO 8601."""
    target_column: Text = "target"
    """The column of the values."""
    horizon: int | None = Field(None, ge=1, le=10_000)
    """So many steps are forecast; the last ones of each series are held out. Left out: 12, or as many as the model that
    the job starts from forecasts."""
    context_length: int | None = Field(None, ge=1, le=65_536)
    """So many steps are read. Left out: two seasons or four horizons, whichever is more, as far as the data reaches."""
    frequency: Text | None = None
    """How long a step is: hour, 15 minutes, month, or a number. Left out: what most series' stamps say."""
    season: int | None = Field(None, ge=1, le=65_536)
    """How many steps a season has, for the seasonal naive forecast. Left out: by the step: hours a day, days a week."""
    gaps: Literal["refuse", "missing"] = "refuse"
    """Steps without a value: refuse the series, or keep them, neither learned nor measured."""
    scaling: Literal["mean-absolute", "standard"] | None = None
    """What a context is divided by: its mean absolute value, or, less its mean, its deviation. Left out: mean-absolute,
    or as the model that the job starts from has it."""
    stride: int | None = Field(None, ge=1, le=65_536)
    """A window to learn from begins every so many steps. Left out: a quarter of the horizon."""
    quantiles: list[float] | None = Field(None, min_length=1, max_length=99)
    """Which are forecast: 0.5 and pairs around it. Left out: 0.1, 0.2, … 0.9."""

    @field_validator("frequency")
    @classmethod
    def _is_a_step(cls, value: str | None) -> str | None:
        return None if value is None else str(time_steps.parsed(value))

    @field_validator("quantiles")
    @classmethod
    def _in_pairs(cls, value: list[float] | None) -> list[float] | None:
        if value is None:
            return None
        pairs = all(abs(low + high - 1) < 1e-9 for low, high in zip(value, value[::-1], strict=True))
        if not (pairs and value == sorted(set(value)) and value[0] > 0 and 0.5 in value):
            raise ValueError(f"{value} are not 0.5 and pairs around it, rising, as 0.1, 0.5, 0.9")
        return value

    @model_validator(mode="after")
    def _columns_differ(self) -> ForecastingOptions:
        return check_columns(self, "series_column", "time_column", "target_column")


class Forecasting(QuantileForecaster):
    """Answers the quantiles of the next steps of a series, from its history alone.

    It reads the latest steps of one series: no other columns, no holidays, no other series. What lies outside of what
    the training data has shown is extrapolated in the shape of it. Quantiles are of each step, not of their sum.
    """

    name: ClassVar[str] = "forecasting"
    version: ClassVar[int] = 2
    Options: ClassVar[type[TaskOptions]] = ForecastingOptions
    networks: ClassVar[Mapping[str, str]] = {
        "transformer": "jobs.tasks.patch_transformer:PatchTransformer",
        "gru": "jobs.tasks.gru_forecaster:GruForecaster",
    }
    learned_files: ClassVar[tuple[str, ...]] = (FILE,)
    cuts_each: ClassVar[str] = "the last task.horizon steps of each series"
    counted: ClassVar[Mapping[str, str]] = {
        "short": "series are too short for a window: nothing is learned from them",
        "flat": "series do not change within their history from season to season: left out of MASE",
        "told": "series' steps to predict are among those that the model has learned: how good it is, they do not say",
        "sparse": "series have no value at most of their steps: see task.frequency",
        "coarse": "series vary so little around their level that 32-bit numbers round it away: take the level off",
    }

    options: ForecastingOptions

    def __init__(self, options: TaskOptions | Mapping[str, Any] | None = None) -> None:
        super().__init__(options)
        own = self.options
        self.horizon, self.scaling = chosen(own.horizon, HORIZON), chosen(own.scaling, "mean-absolute")
        self.levels = own.quantiles or LEVELS
        self.step: Step | None = time_steps.parsed(own.frequency) if own.frequency else None
        self.season = own.season or 1
        self.ends: dict[str, float] = {}
        """The last moment that was learned of each series, by its name."""

    # -- data -------------------------------------------------------------------------------------------------------

    def grouping(self) -> Grouping:
        """Say that the rows of a series are one example."""
        series, time = self.options.series_column, self.options.time_column
        options = {time: "time_column", **({series: "series_column"} if series else {})}
        return Grouping((series,) if series else (), time, options, whole=True)

    def check(self, example: Mapping[str, Any]) -> None:
        """Raise TaskError for a row without a number to forecast."""
        column = self.options.target_column
        value_of(column_of(example, column, "target_column"), column, self.options.gaps == "missing")

    def content(self, example: Mapping[str, Any]) -> Any:
        """Return the series, which must be regular."""
        series = self._series(example)
        return [series.name, str(example[self.options.time_column][0]), series.values]

    def unused(self, example: Mapping[str, Any]) -> list[str]:
        """Return the columns that are neither series, time nor target."""
        own = self.options
        read = {own.series_column, own.time_column, own.target_column}
        return [key for key, value in example.items() if key not in read and any(each is not None for each in value)]

    def cut(self, example: Mapping[str, Any], at: float) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Return a series without its last `horizon` steps, and the whole with a mark that these are to be predicted.

        None where fewer than two steps would be left.
        """
        own, series = self.options, self._series(example)
        end = len(series.values) - self.horizon
        rows = sum(place < end for place in series.places)
        if end < 2 or rows < 2:
            return None
        first = {key: value if key == own.series_column else value[:rows] for key, value in example.items()}
        return first, {**example, own.target_column: HeldEnd(example[own.target_column])}

    def observe(self, examples: Sequence[Mapping[str, Any]]) -> SeriesFindings:
        """Note the steps, how long series are and how much of them is missing."""
        return SeriesFindings.of([self._series(example) for example in examples])

    def fit(self, findings: SeriesFindings) -> list[str]:
        """Decide step, season and context, as far as the options leave them open."""
        own = self.options
        if self.step is None and findings.steps:
            self.step = findings.steps.most_common(1)[0][0]
        self.season = own.season or (self.step.season() if self.step else 1)
        reach = max(1, findings.longest - self.horizon)
        self.context_length = own.context_length or min(max(2 * self.season, 4 * self.horizon, 8), reach, LONGEST)
        self.drawn, self.ends = list(findings.first), findings.ends
        said = [
            f"{findings.series} series, {findings.values} steps of {self.step or 'unknown length'}"
            f"{'' if own.frequency else ', by their stamps'}; a season has {self.season}"
            f"{'' if own.season else ', by the step' if self.season > 1 else ', as none is known: set task.season'}",
            f"{self.context_length} steps are read, {self.horizon} are forecast; windows begin every {self._stride()},"
            " one of four with a shorter past",
        ]
        other = sum(findings.steps.values()) - findings.steps.get(self.step, 0) if self.step else 0
        said += [f"{other} series have other steps than {self.step}"] * bool(other)
        return [*said, *[f"{findings.missing} steps are missing: not learned"] * bool(findings.missing)]

    def inherit(self, parent: Path | str) -> bool:
        """Keep the parent's horizon, context, step and quantiles; options that ask for others are refused."""
        own = self.options
        super().inherit(parent)
        step = time_steps.parsed(own.frequency) if own.frequency else None
        asked = {
            "horizon": (own.horizon, self.horizon),
            "context_length": (own.context_length, self.context_length),
            "frequency": (step, self.step),
            "quantiles": (own.quantiles, self.levels),
            "scaling": (own.scaling, self.scaling),
        }
        for name, (wanted, had) in asked.items():
            if wanted is not None and wanted != had:
                raise TaskError(f"task.{name} is {wanted}, but the model it starts from has {had}: set that")
        self.season = own.season or self.season
        return True

    def follow(self, parent: Path | str) -> None:
        """Cut as many steps off as the parent forecasts, of series with its step."""
        self.inherit(parent)

    def inherited(self) -> list[str]:
        """Say what is the parent's."""
        return [f"steps of {self.step}: {self.context_length} are read, {self.horizon} forecast, as the model has it"]

    def save(self, directory: Path) -> None:
        """Write forecasting.json: what `fit` decided, and what a server must know."""
        known = {
            "horizon": self.horizon,
            "context_length": self.context_length,
            "quantiles": self.levels,
            "frequency": None if self.step is None else str(self.step),
            "season": self.season,
            "scaling": self.scaling,
            "drawn": self.drawn,
            "ends": self.ends,
        }
        (directory / FILE).write_text(json.dumps(known, indent=2), encoding="utf-8")

    @classmethod
    def load(cls, directory: Path, options: TaskOptions | Mapping[str, Any] | None = None) -> Forecasting:
        """Read what `save` wrote."""
        task = cls(options)
        try:
            known = json.loads((Path(directory) / FILE).read_text(encoding="utf-8"))
            task.horizon, task.context_length = known["horizon"], known["context_length"]
            task.levels, task.season, task.scaling = known["quantiles"], known["season"], known["scaling"]
            task.step = time_steps.parsed(known["frequency"]) if known["frequency"] else None
            task.drawn, task.ends = known["drawn"], known.get("ends", {})
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise TaskError(f"{directory} holds no forecaster of Tandem: {FILE}: {error}") from error
        return task

    def encode(self, examples: Sequence[Mapping[str, Any]]) -> Columns:
        """Cut series into N windows, or note the end of each with what seasonal naive makes of it: columns (N, …)."""
        held = [isinstance(example[self.options.target_column], HeldEnd) for example in examples]
        assert all(held) or not any(held), "a chunk holds rows to learn from, or ends to predict"
        shape = Shape(self.context_length, self.horizon, self.season, self._stride(), self.drawn, self.ends)
        series = [self._series(example) for example in examples]
        return to_predict(series, shape) if all(held) else to_learn(series, shape)

    def figures(self, sums: Mapping[str, Any]) -> dict[str, bytes]:
        """Draw the forecasts of the first few series."""
        drawn = forecast_scores.drawn_of(sums, len(self.drawn))
        if not drawn[:, 0].any():
            return {}
        shape = (self.context_length, self.horizon)
        return {"forecasts.png": forecast_scores.picture(drawn, self.drawn, *shape, self.levels)}

    # -- use --------------------------------------------------------------------------------------------------------

    def instance(self, example: Mapping[str, Any]) -> Any:
        """Return the values of a series, NaN where one is missing: the steps behind them are forecast.

        Raises:
            TaskError: the last ones have none, so that these may be what is to be forecast; or its rows are mostly
                several of the model's steps apart.
        """
        values, usual = self._series(example).values, time_steps.inferred(list(example[self.options.time_column]))
        if self.step is not None and usual is not None and usual.size > 1.5 * self.step.size:
            raise TaskError(
                f"rows of the series are {usual} apart, and the model's steps are {self.step}: most steps would be "
                "missing"
            )
        if np.isnan(values[-1]):
            empty = int(np.argmin(np.isnan(values[::-1]))) or len(values)
            raise TaskError(
                f"the last {empty} step(s) of the series have no value, and what is forecast are the steps behind the "
                "last row: leave such rows out"
            )
        return {"history": values}

    def predict(self, model: torch.nn.Module, instances: Sequence[Any]) -> list[dict[str, Any]]:
        """Forecast the steps behind each history.

        Args:
            instances: mappings with history, numbers (n,), the latest last, NaN for a missing one, and horizon, at most
                the trained one, where given.

        Raises:
            TaskError: of a history, what is read holds no finite number, or it holds an infinite one; or the horizon is
                out of range.
        """
        asked = [each if isinstance(each, Mapping) else {"history": each} for each in instances]
        histories = [np.asarray(each["history"], dtype=np.float64).ravel() for each in asked]
        ahead = [int(each.get("horizon", self.horizon)) for each in asked]
        for history, steps in zip(histories, ahead, strict=True):
            if (np.abs(history) > LARGEST).any() or np.isnan(history).all():
                raise TaskError(f"a history holds an infinite number, or one beyond {LARGEST:g}, or no number at all")
            if np.isnan(history[-self.context_length :]).all():
                raise TaskError(f"the last {self.context_length} steps of a history, which are read, hold no number")
            if not 1 <= steps <= self.horizon:
                raise TaskError(f"horizon is {steps}; the model forecasts from 1 to {self.horizon} steps")
        found = self.forecast(model, [padded(history, self.context_length) for history in histories])
        middle = len(self.levels) // 2
        return [
            {"quantiles": row[:steps].tolist(), "median": row[:steps, middle].tolist()}
            for row, steps in zip(found, ahead, strict=True)
        ]

    def inputs(self) -> list[dict[str, Any]]:
        """Describe history and horizon."""
        return [
            {"name": "history", "datatype": "FP32", "shape": [-1, -1]},
            {"name": "horizon", "datatype": "INT32", "shape": [-1], "parameters": {"optional": True}},
        ]

    def outputs(self) -> list[dict[str, Any]]:
        """Describe quantiles and median."""
        if self.answers_otherwise(Forecasting):
            return []
        levels = {"parameters": {"quantiles": self.levels}}
        return [
            {"name": "quantiles", "datatype": "FP32", "shape": [-1, -1, len(self.levels)], **levels},
            {"name": "median", "datatype": "FP32", "shape": [-1, -1]},
        ]

    # -- inside -----------------------------------------------------------------------------------------------------

    def _series(self, example: Mapping[str, Any]) -> Series:
        own = self.options
        return series_of(
            example, own.series_column, own.time_column, own.target_column, self.step, own.gaps == "missing"
        )

    def _stride(self) -> int:
        return self.options.stride or max(1, self.horizon // 4)
