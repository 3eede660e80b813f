"""The options of the task `policy`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from cluster.strict import Text
from jobs.tasks import TaskOptions
from jobs.tasks.policy_log import Names


class PolicyOptions(TaskOptions):
    """Which columns of the log are read."""

    observation_column: Text = "observation"
    """The column that holds what was observed: a list of numbers, or an image as lists [H][W] or [H][W][C]."""
    observation_columns: list[Text] = Field(default_factory=list)
    """Columns of a number each that together are what was observed, in place of `observation_column`."""
    action_column: Text = "action"
    """The column that holds what was done: a name, a number, or a list of numbers."""
    action_columns: list[Text] = Field(default_factory=list)
    """Columns of a number each that together are what was done, in place of `action_column`."""
    episode_column: Text | None = None
    """The column that says which episode a row belongs to: each is held out as a whole. Left out: rows stand alone."""
    kind: Literal["auto", "discrete", "continuous"] = "auto"
    """Whether actions are chosen from a few, or are amounts. auto: names and few whole numbers are chosen; the log says
    what was decided."""

    @model_validator(mode="after")
    def _each_column_once(self) -> PolicyOptions:
        names = self.names()
        given = [*(names.observations or [names.observation]), *(names.actions or [names.action])]
        given += [self.episode_column] if self.episode_column else []
        if twice := next((name for at, name in enumerate(given) if name in given[:at]), None):
            raise ValueError(f"column {twice!r} is named twice")
        return self

    def names(self) -> Names:
        """Return the names of the columns."""
        columns = tuple(self.observation_columns), tuple(self.action_columns)
        return Names(self.observation_column, columns[0], self.action_column, columns[1])
