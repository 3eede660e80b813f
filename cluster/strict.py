"""What the sections of every spec have in common, tasks' and engines' options too: nothing is taken for what it is not.

steps: true         is no number
learning_rate: .inf is no number either
learning_rat: 1e-4  is no key
"""

from __future__ import annotations

from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Text = Annotated[str, Field(pattern=r"\S")]
"""Text with something in it."""
Texts = Annotated[list[Text], Field(min_length=1)]
"""One of them or more."""


class Strict(BaseModel):
    """A frozen section: no unknown key, no infinite number, and true and false only where they are meant."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, validate_by_name=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        takes = _types(cls.model_fields[str(info.field_name)].annotation)
        numbers = {int, float} & takes or any(type(each) is int for each in takes)
        if numbers and not takes & {bool, Any} and _has_bool(value):
            raise ValueError("takes a number, not true or false (which is also how YAML reads yes, no, on and off)")
        return value


def _types(annotation: Any) -> set[Any]:
    """Return an annotation and all that it is made of."""
    return {annotation, *(inner for each in get_args(annotation) for inner in _types(each) if _is_hashable(inner))}


def _is_hashable(value: Any) -> bool:
    return getattr(value, "__hash__", None) is not None


def _has_bool(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, list | tuple) and any(map(_has_bool, value)))
