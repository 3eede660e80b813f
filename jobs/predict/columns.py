"""Columns of the output: those of the input that are kept, those of the predictions, and how a format takes both.

Nothing becomes a text to fit: a value that a format does not take is refused with its column, or fails its own row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from cluster.errors import UserError
from jobs.data.examples import Example
from jobs.spec_predict import Format

ERROR, WHERE = "error", "where"
"""Columns beside the predictions' own, behind the same prefix."""
ONLY_PARQUET = "predict.format: parquet takes it, and predict.columns leaves columns out"
ONLY_JSON = "predict.format: jsonl takes it, and predict.columns leaves columns out"


@dataclass
class KeptColumns:
    """The input's columns that the output keeps, as they are learned from the rows."""

    format: Format
    wanted: Sequence[str] | None = None
    """Those that the spec names; None: all."""
    known: Mapping[str, Any] = field(default_factory=dict)
    """Arrow types of columns, where the input itself says them."""
    names: list[str] = field(default_factory=list)
    """Those that are kept and were seen, in their order."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Those that are not kept → in how many rows they are."""
    _types: dict[str, Any] = field(default_factory=dict)

    def kept(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return the columns of a row that are kept."""
        return kept(row, self.wanted)

    def learn(self, rows: Sequence[Example]) -> dict[int, str]:
        """Take the names and types of the columns of some rows; return what cannot be written: place in `rows` → why.

        Raises:
            UserError: a column as a whole cannot be written.
        """
        for row in rows:
            for name in row:
                if self.wanted is not None and name not in self.wanted:
                    self.left_out[name] = self.left_out.get(name, 0) + 1
                elif name not in self._types:
                    self._types[name] = None
                    self.names.append(name)
        if self.format == "jsonl":
            return _not_json([self.kept(row) for row in rows])
        return self._not_arrow([self.kept(row) for row in rows])

    def check(self, predicted: Sequence[str], prefix: str, where: bool) -> None:
        """Refuse a kept column that the input lacks or that is called as one of the predictions'; `learn` comes first.

        Args:
            predicted: the names of the predictions' columns, without the prefix.

        Raises:
            UserError: names the column, and the way out.
        """
        missing = [name for name in self.wanted or () if name not in self._types]
        if missing:
            raise UserError(f"predict.columns: no row has a column {missing[0]!r}; there are {sorted(self.left_out)}")
        refuse_collision(self.names, [*predicted, ERROR, *([WHERE] if where else [])], prefix)
        if self.format == "parquet":
            _check_parquet(self.schema())

    def schema(self) -> Any:
        """Return the Arrow schema of the kept columns."""
        import pyarrow

        known = ((name, self._types[name]) for name in self.names)
        return pyarrow.schema([(name, pyarrow.null() if kind is None else kind) for name, kind in known])

    def _not_arrow(self, rows: Sequence[Mapping[str, Any]]) -> dict[int, str]:
        found: dict[int, str] = {}
        for name in self.names:
            values = {at: row[name] for at, row in enumerate(rows) if name in row}
            failed = _failing(values, self.known.get(name))
            if len(failed) == len(values) > 1 and len(set(failed.values())) == 1:
                raise UserError(
                    f"data: column {name!r} cannot be written to Parquet: {failed[min(failed)]}; {ONLY_JSON}"
                )
            found |= {at: f"column {name!r}: {why}" for at, why in failed.items()}
            self._merge(name, [value for at, value in values.items() if at not in failed])
        return found

    def _merge(self, name: str, values: Sequence[Any]) -> None:
        array = _array(values, self.known.get(name))
        if array is None:
            kinds = sorted({type(value).__name__ for value in values if value is not None})
            raise UserError(f"data: column {name!r} holds values of different kinds ({', '.join(kinds)}); {ONLY_JSON}")
        before = self._types[name]
        self._types[name] = array.type if before is None else merged(name, before, array.type, "data")


def kept(row: Mapping[str, Any], wanted: Sequence[str] | None) -> dict[str, Any]:
    """Return the columns of a row that are wanted, in the order in which they are; None: all."""
    return {name: value for name, value in row.items() if wanted is None or name in wanted}


def refuse_collision(columns: Sequence[str], predicted: Sequence[str], prefix: str) -> None:
    """Refuse a column of the input that is called as one of the output's own.

    Raises:
        UserError: names it.
    """
    twice = next((name for name in predicted if prefix + name in columns), None)
    if twice is not None:
        raise UserError(
            f"predict: the input has a column {prefix + twice!r}, which is what the predictions' {twice!r} is called: "
            "choose another predict.prefix, or leave the column out by predict.columns"
        )


def merged(name: str, one: Any, other: Any, where: str) -> Any:
    """Return the Arrow type that takes values of both types.

    Raises:
        UserError: there is none.
    """
    import pyarrow

    binary = {pyarrow.types.is_binary(kind) for kind in (one, other) if not pyarrow.types.is_null(kind)}
    try:
        if len(binary) > 1:
            raise pyarrow.ArrowTypeError("texts and bytes")
        both = [pyarrow.schema([(name, kind)]) for kind in (one, other)]
        return pyarrow.unify_schemas(both, promote_options="permissive").field(name).type
    except (pyarrow.ArrowTypeError, pyarrow.ArrowInvalid):
        raise UserError(
            f"{where}: column {name!r} holds values of different kinds ({one} and {other}); {ONLY_JSON}"
        ) from None


def arrow(values: Sequence[Any], kind: Any = None) -> Any:
    """Return an Arrow array of values; of arrays with several axes, nested lists.

    Raises:
        Exception: whatever Arrow raises for what it does not take.
    """
    import pyarrow

    return pyarrow.array([nested(value) for value in values], type=kind)


def nested(value: Any) -> Any:
    """Return a value with arrays of several axes as lists of arrays of one."""
    if value is None or isinstance(value, str | int | float | bytes):
        return value
    if isinstance(value, np.ndarray) and value.ndim > 1:
        return [nested(inner) for inner in value]
    if isinstance(value, np.ndarray) and value.ndim == 0:
        return value.item()
    if isinstance(value, Mapping):
        return {key: nested(inner) for key, inner in value.items()}
    return [nested(inner) for inner in value] if isinstance(value, list | tuple) else value


def json_line(values: Mapping[str, Any]) -> str:
    """Return a row as a line of JSON, without its end; numbers and arrays of NumPy as JSON's own.

    Raises:
        ValueError: it holds NaN or infinity, half a character.
        TypeError: it holds what JSON has not, such as bytes.
    """
    line = json.dumps(values, ensure_ascii=False, allow_nan=False, default=_plain)
    line.encode()
    return line


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(type(value).__name__)


def _not_json(rows: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    found = {}
    for at, row in enumerate(rows):
        try:
            json_line(row)
        except TypeError as error:
            name = next(name for name, value in row.items() if _reason(partial(json_line, {name: value})))
            raise UserError(f"data: column {name!r} holds {error}, which JSON has not; {ONLY_PARQUET}") from None
        except (ValueError, RecursionError) as error:
            found[at] = not_in_json(error)
    return found


def not_in_json(error: Exception) -> str:
    """Say what is wrong with a value that JSON has no form for."""
    if isinstance(error, UnicodeEncodeError):
        return "half a character (a lone surrogate), which no text in UTF-8 holds"
    return "NaN or infinity, which JSON has not" if "range" in str(error) or "nan" in str(error) else str(error)


def _failing(values: Mapping[int, Any], kind: Any) -> dict[int, str]:
    """Return which of some values cannot be written even by themselves, and why; none where all go together."""
    if _array(list(values.values()), kind) is not None:
        return {}
    return {at: why for at, value in values.items() if (why := _reason(partial(arrow, [value], kind)))}


def _array(values: Sequence[Any], kind: Any) -> Any | None:
    try:
        return arrow(values, kind)
    except Exception:  # Arrow raises many kinds: the row or the column is named by whoever asks
        return None


def _reason(work: Callable[[], object]) -> str | None:
    """Say why something cannot be done; None where it can."""
    try:
        work()
    except UnicodeEncodeError as error:
        return not_in_json(error)
    except Exception as error:  # as above
        return " ".join(str(error).split())[:200] or type(error).__name__
    return None


def _check_parquet(schema: Any) -> None:
    import pyarrow
    import pyarrow.parquet

    for at, name in enumerate(schema.names):
        try:
            pyarrow.parquet.write_table(pyarrow.schema([schema.field(at)]).empty_table(), pyarrow.BufferOutputStream())
        except pyarrow.ArrowNotImplementedError as error:
            raise UserError(f"data: column {name!r} cannot be written to Parquet: {error}; {ONLY_JSON}") from None
