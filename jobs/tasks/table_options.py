"""The options of the task `tabular`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from cluster.strict import Text
from jobs.tasks import TaskOptions
from jobs.tasks.table_columns import MOST_CATEGORIES, Wishes


class TabularOptions(TaskOptions):
    """Which columns of the table are read, and how."""

    target_column: Text = "target"
    """The column that holds what is to be predicted."""
    kind: Literal["auto", "classification", "regression"] = "auto"
    """Whether the target is a label or an amount. auto: texts, true and false, and few whole numbers are labels; the
    log says what was decided."""
    categorical: list[Text] = Field(default_factory=list)
    """Columns that hold names, though they look like numbers or like names of rows."""
    numeric: list[Text] = Field(default_factory=list)
    """Columns that hold numbers, so that a row with anything else is refused."""
    ignore: list[Text] = Field(default_factory=list)
    """Columns that are not read."""
    max_categories: int = Field(MOST_CATEGORIES, ge=1, le=50_000)
    """Categories of one column that are told apart; the rarer ones are one."""

    @model_validator(mode="after")
    def _each_column_once(self) -> TabularOptions:
        lists = {"categorical": self.categorical, "numeric": self.numeric, "ignore": self.ignore}
        given = [
            ("target_column", self.target_column),
            *((key, name) for key, names in lists.items() for name in names),
        ]
        seen: dict[str, str] = {}
        for key, name in given:
            if name in seen:
                raise ValueError(f"column {name!r} stands in {seen[name]} and in {key}: keep one of them")
            seen[name] = key
        return self

    def wishes(self) -> Wishes:
        """Return what they say of the columns."""
        lists = tuple(self.categorical), tuple(self.numeric), tuple(self.ignore)
        return Wishes(self.target_column, *lists, self.max_categories)
