"""What one key may do: models, rates, concurrency, a budget of tokens, and its priority."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from cluster.names import Name
from cluster.strict import Strict

Count = Annotated[int, Field(ge=1, le=10**15)]
Priority = Literal["high", "normal", "low"]
PRIORITIES: tuple[Priority, ...] = ("high", "normal", "low")
"""Best first: a class is served when those before it have nothing waiting."""


class Limits(Strict):
    """The limits of a key. What is left out has none."""

    models: tuple[Name, ...] | None = None
    """Names of served models; any model when left out."""
    requests_per_minute: Count | None = None
    """Requests that may begin within a minute."""
    tokens_per_minute: Count | None = None
    """Tokens of prompts and answers within a minute."""
    concurrency: Count | None = None
    """Texts in flight at the same time: a request has `n` for each of its prompts."""
    tokens_per_day: Count | None = None
    """Budget of tokens, prompts and answers, a day in UTC."""
    tokens_per_month: Count | None = None
    """The same for a calendar month in UTC."""
    priority: Priority = "normal"
    """Who is served first when requests wait."""
    operator: bool = False
    """It reads /status and /metrics of all models and keys, and calls no model."""

    @field_validator("operator")
    @classmethod
    def _operators_call_no_model(cls, operator: bool, info: ValidationInfo) -> bool:
        others = [name for name, value in info.data.items() if value != cls.model_fields[name].default]
        if operator and others:
            raise ValueError(f"an operator's key calls no model: leave out {', '.join(others)}")
        return operator

    def allows(self, model: str) -> bool:
        """Whether the key may call this model."""
        return self.models is None or model in self.models


def month_of(day: date) -> date:
    """Return the first day of the month, from which a month's budget counts."""
    return day.replace(day=1)
