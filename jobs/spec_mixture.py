"""`data.mixture` of a job's spec: several sources, and the share of a run's rows that each gives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import Field

from cluster.names import Name
from cluster.strict import Strict, Text, Texts

MOST = 256
"""So many sources: each worker keeps the order of each."""


class MixedSource(Strict):
    """One source of a mixture."""

    name: Name | None = None
    """What the log and MLflow call it; left out: source-1, source-2, … by its place in the list."""
    train: Text | Texts
    """Its data, as `data.train` has it."""
    weight: float = Field(gt=0, le=1e9)
    """Its share of the rows of a run, beside the weights of the others: 0.7 and 0.3 are as 7 and 3. Rows are those of
    the encoded data: where examples are packed, each has as many tokens as another."""
    max_epochs: float | None = Field(None, gt=0, le=1e6)
    """A job that would see its rows more often than so is refused before any worker starts."""


def names_of(mixture: list[MixedSource]) -> list[str]:
    """Return what the sources are called."""
    return [_called(source.name, index) for index, source in enumerate(mixture)]


def contradictions(data: Mapping[str, Any]) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Yield what a mixture cannot be, each with its place; what is of a wrong type is passed over."""
    mixture = data.get("mixture")
    if mixture is None:
        return
    at = ("data", "mixture")
    if data.get("train") is not None:
        yield at, "stands beside `data.train`, and one of them says what is learned from: keep one"
    if data.get("max_examples") is not None:
        yield ("data", "max_examples"), "is for `data.train`; a mixture takes what `weight` and `max_epochs` say"
    if not isinstance(mixture, list):
        return
    if not 2 <= len(mixture) <= MOST:
        one = "; one source is `data.train`" if len(mixture) == 1 else ""
        yield at, f"takes from 2 to {MOST} sources, and this is {len(mixture)}{one}"
    seen = set[str]()
    for index, source in enumerate(mixture):
        given = source.get("name") if isinstance(source, Mapping) else None
        if not isinstance(given, str | None):
            continue
        if (name := _called(given, index)) in seen:
            yield (*at, index, "name"), f"two sources are called {name!r}"
        seen.add(name)


def _called(name: str | None, index: int) -> str:
    return f"source-{index + 1}" if name is None else name
