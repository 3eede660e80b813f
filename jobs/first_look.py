"""A look at a job's data, and at its first examples with the tokenizer of its parent, before there is a cluster."""

from __future__ import annotations

from functools import partial
from itertools import islice
from pathlib import Path, PurePath

from cluster.errors import UserError, check_all
from jobs.data import listing, remote_listing, sources
from jobs.data.compression import kind
from jobs.data.corpora import BUILT_IN
from jobs.data.examples import BadRow, Example, Source, bounded
from jobs.data.listing import NAMED
from jobs.data.tables import TableForm
from jobs.spec import JobSpec
from jobs.tasks import TaskSetupError, get, is_ours

MOST_BYTES = 64 << 20
"""Data that is larger takes seconds to open, and is left to the job."""
EXAMPLES = 3


def check(spec: JobSpec, base: Path, parent: Path) -> None:
    """Refuse what no example could be encoded with: a conversation, and a tokenizer without a chat template.

    What is wrong with the examples themselves is for the job to say, by file and line. Imports transformers.

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


def look_at_data(spec: JobSpec, base: Path) -> list[str]:
    """Refuse data that no job could open, and return in sentences what of it is not on this machine.

    What is not there yet may come before the job does, or lie on the cluster's machines only.

    Args:
        base: where relative paths start.

    Raises:
        UserError: files of an unknown kind, a URL, a table whose header has a column twice, and the like.
    """
    named = spec.data.trained_on() | {f"data.{key}": getattr(spec.data, key) for key in ("eval", "predict")}
    parts = [
        (key, part) for key, where in named.items() for part in ([where] if isinstance(where, str) else where or [])
    ]
    notes: list[str] = []
    check_all(*(partial(lambda key, part: notes.extend(_not_here(key, part, spec, base)), *each) for each in parts))
    return notes


def _not_here(key: str, part: str, spec: JobSpec, base: Path) -> list[str]:
    if part in BUILT_IN:
        return []
    if listing.existing(part, base) is None and (several := listing.braced(part)):
        return [note for each in several for note in _not_here(key, each, spec, base)][:NAMED]
    if remote_listing.is_uri(part) or part.startswith("hf://"):
        remote_listing.check_scheme(part)
        return [f"{key}: {part!r} lies behind a network, so it was not looked at"]
    part = part.removeprefix("file://")
    if listing.existing(part, base) is None:
        found = listing.of_glob(part, base)
        if not found.files and not found.left_out:
            return [f"{key}: nothing matches {part!r} on this machine (looked from {base}), so it was not looked at"]
    if _is_small(part, base):
        _try(sources.open_source(part, base, TableForm(spec.data.columns, spec.data.quotes)), spec, base)
    return []


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
