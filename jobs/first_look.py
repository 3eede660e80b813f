"""A look at a job's data, and at its first examples with the tokenizer of its parent, before there is a cluster."""

from __future__ import annotations

from functools import partial
from itertools import islice
from pathlib import Path, PurePath

from cluster.errors import UserError, check_all
from jobs.data import listing, mixture_sources, origins, remote_listing, sources, tables
from jobs.data.compression import kind
from jobs.data.corpora import BUILT_IN
from jobs.data.examples import BadRow, BadRows, Example, Source, bounded
from jobs.data.joining import joined, once
from jobs.data.listing import NAMED
from jobs.data.mixture_sources import SourceRows
from jobs.data.stream import Stream
from jobs.data.tables import TableForm
from jobs.spec import JobSpec
from jobs.spec_mixture import names_of
from jobs.tasks import Task, TaskSetupError, get, is_ours

MOST_BYTES = 64 << 20
"""Data that is larger takes seconds to open, and is left to the job."""
EXAMPLES = 3


def check(spec: JobSpec, base: Path, parent: Path) -> None:
    """Refuse what no example could be encoded with: a conversation, and a tokenizer without a chat template.

    Imports transformers.

    Args:
        base: where relative paths start.
        parent: the model that the job starts from.

    Raises:
        TaskSetupError: the task cannot work with that parent.
    """
    for where in [*spec.data.trained_on().values()] or ([spec.data.eval] if spec.data.eval else []):
        if _is_small(where, base):
            _check(spec, where, base, parent)


def _check(spec: JobSpec, where: str | list[str], base: Path, parent: Path) -> None:
    task = get(spec.task.name, base)(spec.task.options)
    try:
        examples = list(
            sources.open_source(where, base, TableForm(spec.data.columns, spec.data.quotes)).examples(EXAMPLES)
        )
        if task.inherit(parent):
            task.encode(examples)
    except TaskSetupError:
        raise
    except Exception:  # an example's own fault, or the parent's: the job says where
        return


def check_reference(spec: JobSpec, task: Task) -> None:
    """Refuse what a task that compares with the model as it was does not go with.

    Raises:
        UserError: the spec wants data that comes while it trains, or a base in few bits, which begins as another model.
    """
    if not task.refers():
        return
    if spec.model.lora is not None and spec.model.lora.base != "whole":
        raise UserError(
            f"model.lora.base: task {spec.task.name} compares with answers of the model as it is, and training would "
            f"begin with another one, in {spec.model.lora.base}: leave base out"
        )
    if spec.data.start_early:
        raise UserError(
            f"data.start_early: task {spec.task.name} compares with a reference, which reads all rows before "
            "training; leave start_early out"
        )


def look_at_data(spec: JobSpec, base: Path) -> list[str]:
    """Refuse data that no job could open, and return in sentences what of it is not on this machine.

    What is not there yet may come before the job does, or lie on the cluster's machines only. What is refused is
    refused by what the job asks, too, and in its words.

    Args:
        base: where relative paths start.

    Raises:
        UserError: files of an unknown kind, a URL, a table whose header has a column twice, a file in two sources of a
            mixture, a file of which nothing can be read, first rows that the task cannot use, and the like.
    """
    named = spec.data.trained_on() | {f"data.{key}": getattr(spec.data, key) for key in ("eval", "predict")}
    named = {key: [where] if isinstance(where, str) else where for key, where in named.items() if where}
    notes: list[str] = []
    check_all(
        lambda: mixture_sources.check_apart(spec.data.mixture or [], base),
        lambda: _check_form(spec, base, [part for parts in named.values() for part in parts]),
        lambda: check_reference(spec, get(spec.task.name, base)(spec.task.options)),
        *(partial(_look, key, parts, spec, base, notes) for key, parts in named.items()),
    )
    return notes


def _check_form(spec: JobSpec, base: Path, parts: list[str]) -> None:
    """Refuse what only tables need to be told, where all data is known from here and none of it is a table."""
    form = TableForm(spec.data.columns, spec.data.quotes)
    if form == tables.PLAIN:
        return
    found = [origins.of(part, base) if origins.are_known(part) else [] for part in parts]
    if all(found):
        tables.check_used(form, any(origins.is_table(origin) for each in found for origin in each))


def _look(key: str, parts: list[str], spec: JobSpec, base: Path, notes: list[str]) -> None:
    """Look at what a key of the spec names; its notes are added."""
    files = [each for part in parts for each in _written_out(part, base)]
    opened, missing = list[Source](), list[str]()
    check_all(*(partial(_open, key, file, spec, base, missing, opened) for file in files))
    notes += missing[:NAMED] if len(files) > len(parts) else missing
    if len(opened) == len(files) and key != "data.predict":
        _survey_first(once(opened), spec, base, key)


def _written_out(part: str, base: Path) -> list[str]:
    """Return what a name with braces stands for; of another one itself."""
    is_a_name = part in BUILT_IN or listing.existing(part, base) is not None
    return [part] if is_a_name else listing.braced(part) or [part]


def _open(key: str, part: str, spec: JobSpec, base: Path, notes: list[str], opened: list[Source]) -> None:
    """Open what is here and small; else add a note, if there is one, of why it was not."""
    if part in BUILT_IN:
        return
    if remote_listing.is_uri(part) or part.startswith("hf://"):
        remote_listing.check_scheme(part)
        notes.append(f"{key}: {part!r} lies behind a network, so it was not looked at")
        return
    part = part.removeprefix("file://")
    if listing.existing(part, base) is None:
        found = listing.of_glob(part, base)
        if not found.files and not found.left_out:
            notes.append(
                f"{key}: nothing matches {part!r} on this machine (looked from {base}), so it was not looked at"
            )
            return
    if _is_small(part, base):
        opened.append(sources.open_source(part, base, TableForm(spec.data.columns, spec.data.quotes)))
        _try(opened[-1], spec, base)


def _survey_first(opened: list[Source], spec: JobSpec, base: Path, key: str) -> None:
    """Survey the first rows of every file as the job does, whose survey ends at the first row that it cannot use.

    Raises:
        UserError: there is such a row, or there is none at all.
    """
    task = get(spec.task.name, base)(spec.task.options)
    whole, bad = joined(opened), BadRows(spec.data.max_bad_rows if spec.data.bad_rows == "skip" else 0)
    most = spec.data.max_examples if key == "data.train" else None
    read = 0
    for single in whole.singles if most is None else whole.singles[:1]:
        limit = min(EXAMPLES, most or EXAMPLES)
        if task.grouping() is not None or type(task).follow is not Task.follow:  # what makes an example is not known
            read += sum(1 for _ in single.found(limit, bad, None))
        else:
            found = Stream(single, task, limit).survey(bad)
            read += len(found.contents) + len(found.left_out)
    if read or most is not None:
        return
    mixed = key.removeprefix("data.mixture.").removesuffix(".train")
    if mixed.isdecimal():
        name = names_of(spec.data.mixture or [])[int(mixed)]
        mixture_sources.check([SourceRows(name, train_rows=0, train_targets=0, eval_rows=0)])
    raise whole.nothing(bad)


def _try(source: Source, spec: JobSpec, base: Path) -> None:
    """Refuse archives whose first samples the task can make nothing of: how members are named decides what they are.

    Raises:
        UserError: says what of the last of them the task misses.
    """
    archives = [single for single in source.singles if kind(PurePath(single.name)) == ".tar"]
    task = get(spec.task.name, base)(spec.task.options) if archives else None
    if task is None or not is_ours(task) or task.grouping() is not None:
        return
    for archive in archives[:EXAMPLES]:
        found = [row for row in islice(archive.read(), EXAMPLES) if isinstance(row, Example)]
        said = [made for row in found if isinstance(made := bounded(partial(task.check, row), row.where), BadRow)]
        if found and len(said) == len(found):
            raise UserError(f"data: {archive.name}: none of its first {len(found)} samples can be used; {said[-1]}")


def _is_small(where: str | list[str], base: Path) -> bool:
    """Say whether the data is files on this machine, and few bytes."""
    parts = [where] if isinstance(where, str) else where
    if any(part in BUILT_IN or "://" in part for part in parts):
        return False
    try:
        files = [_files(part, base) for part in parts]
        return all(files) and sum(file.stat().st_size for each in files for file in each) < MOST_BYTES
    except (OSError, ValueError, UserError):  # what cannot be read, or has no name that can be: the job says it
        return False


def _files(where: str, base: Path) -> list[Path]:
    place = listing.existing(where, base)
    if place is None:
        return listing.of_glob(where, base).files
    return listing.of_folder(place).files if place.is_dir() else [place]
