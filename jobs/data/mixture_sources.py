"""What `data.mixture` names: its sources as one that is prepared as a whole, and what each of them came to in rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from cluster.errors import UserError
from cluster.stores import shown
from jobs.data import hub, origins, sources
from jobs.data.chunks import Encoded
from jobs.data.examples import Source
from jobs.data.joining import joined, sha256
from jobs.data.mixture import Part
from jobs.data.ranges import RANGE_BYTES
from jobs.data.tables import PLAIN, TableForm
from jobs.spec import DataSpec
from jobs.spec_mixture import MixedSource, names_of

NAMED = 3
"""So many sources give the whole its name."""
FITTED = "what is learned from the data before training is learned from all sources together, whatever their weights"


@dataclass(frozen=True)
class SourceRows:
    """What one source of a mixture came to. Rows of the sources follow each other in the files, in this order."""

    name: str
    train_rows: int
    train_targets: int
    """Terms of the loss in them."""
    eval_rows: int
    """0 where `data.eval` is what is held out."""


def open_train(data: DataSpec, base: Path, form: TableForm = PLAIN, range_bytes: int = RANGE_BYTES) -> Source | None:
    """Open what a job is to learn from: `data.train`, or the sources of `data.mixture`; None where there is none.

    Raises:
        UserError: one cannot be opened, or two sources of a mixture hold the same file.
    """
    if data.mixture is None:
        return sources.open_source(data.train, base, form, range_bytes) if data.train is not None else None
    return mixed(data.mixture, base, form, range_bytes)


def mixed(mixture: list[MixedSource], base: Path, form: TableForm, range_bytes: int) -> Source:
    """Open the sources of a mixture as one, which knows them apart. Its digest holds their names, not their weights."""
    names = names_of(mixture)
    check_apart(mixture, base)
    opened = [sources.open_source(source.train, base, form, range_bytes) for source in mixture]
    _refuse_twice(names, [[single.origin for single in source.singles] for source in opened])
    apart = tuple(replace(joined([source]), name=name) for name, source in zip(names, opened, strict=True))
    digest = sha256("".join(f"{source.name} {source.digest}\n" for source in apart))
    return replace(joined(opened), name=_listed(names), digest=digest, mixed=apart)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def check_apart(mixture: list[MixedSource], base: Path) -> None:
    """Refuse two sources of which their names tell that one has rows of the other: neither is read, nor a store asked.

    Raises:
        UserError: there are; or they read a data set of the hub, one whole and one by its files, which tells nothing.
    """
    names = names_of(mixture)
    _refuse_twice(names, [origins.of(source.train, base) for source in mixture])
    _refuse_spelt_twice(names, [source.train for source in mixture])


def _refuse_twice(names: Sequence[str], origins_of: Sequence[Sequence[str]]) -> None:
    """Refuse an origin of two sources; "" is none.

    Raises:
        UserError: there is one.
    """
    holders: dict[str, str] = {}
    for name, found in zip(names, origins_of, strict=True):
        for origin in filter(None, found):
            if (other := holders.setdefault(origin, name)) != name:
                raise UserError(
                    f"data.mixture: the sources {other!r} and {name!r} both hold {shown(origin)}: its rows would count "
                    "for both; take it out of one"
                )


def _refuse_spelt_twice(names: Sequence[str], places: Sequence[str | list[str]]) -> None:
    """Refuse a data set of the hub of which one source takes a split and another one files.

    Raises:
        UserError: there is one.
    """
    named = zip(names, ([where] if isinstance(where, str) else where for where in places), strict=True)
    parts = [(name, part, of) for name, where in named for part in where if (of := hub.repository(part)) is not None]
    splits, files = ([each for each in parts if origins.is_of_hub(each[1]) == whole] for whole in (True, False))
    for (one, split, first), (other, file, second) in product(splits, files):
        if one != other and first == second:
            raise UserError(
                f"data.mixture: the sources {one!r} ({split}) and {other!r} ({file}) read one data set of the hub, by "
                "a split and by files, so that it cannot be told whether rows would count for both: name its files in "
                "both, or take it out of one"
            )


def by_source(source: Source, ranges: Sequence[Source], encoded: Sequence[tuple[int, Encoded]]) -> list[SourceRows]:
    """Add up what became of the sources of a mixture. Pure.

    Args:
        ranges: of the whole; each bears the name of its source.
        encoded: each with the number of its range.
    """
    found = []
    for name in (each.name for each in source.mixed):
        of = [made for number, made in encoded if ranges[number].name == name]
        train, held_out = ([made for made in of if made.file.startswith(split)] for split in ("train", "eval"))
        sums = (sum(m.rows for m in train), sum(m.targets for m in train), sum(m.rows for m in held_out))
        found.append(SourceRows(name, *sums))
    return found


def check(found: Sequence[SourceRows]) -> None:
    """Refuse a source of which nothing is left to learn from.

    Raises:
        UserError: there is one.
    """
    for source in found:
        if not source.train_targets:
            raise UserError(
                f"data.mixture: source {source.name!r} has no row to train on ({source.eval_rows} held out): all its "
                "examples are held out, copies of an earlier source's that data.duplicates drops, or have nothing to "
                "predict. Give it more data, or take it out"
            )


def said(found: Sequence[SourceRows]) -> list[str]:
    """Say what the sources come to."""
    told = ", ".join(f"{source.name} {source.train_rows:,} ({source.eval_rows:,} held out)" for source in found)
    return [f"rows to train on by source: {told}"]


def parts_of(found: Sequence[SourceRows], data: DataSpec) -> tuple[Part, ...]:
    """Return the sources of a mixture with their weights; none where there is no mixture."""
    asked = data.mixture or []
    return tuple(
        Part(source.name, source.train_rows, wanted.weight, wanted.max_epochs)
        for source, wanted in zip(found, asked, strict=True)
    )
