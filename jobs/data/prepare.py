"""Raw examples → encoded, packed rows on disk: once, in parallel, cached by a digest of all that decides them.

storage/data/<digest>/   train-00000.arrow … eval-00000.arrow …   encoded rows (jobs/data/rows.py)
                         task/                                     what the task learned: tokenizer, labels
                         meta.json                                 written last; without it the folder is no cache
storage/digests/                                                   of files that were read before: unchanged.py
storage/data/<digest>-eval/                                        the held-out rows only, for a job that trains nothing

What decides the rows is in jobs/data/identity.py; how they are made, in jobs/data/preparation.py. Sources are read in
ranges (jobs/data/ranges.py), by tasks where they are large; a preparation that was killed leaves a folder that the next
one goes on from (jobs/data/unfinished.py).
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from jobs import spec_unused
from jobs.checkpoint.store import Store
from jobs.data import arrivals, identity, mixture_sources, opening, rows, sources, stored, tables, unchanged, unfinished
from jobs.data.chunks import Encoded
from jobs.data.identity import Noted
from jobs.data.meter import OnProgress
from jobs.data.mixture import Part
from jobs.data.mixture_sources import SourceRows
from jobs.data.preparation import Overlap, Preparation, trains
from jobs.data.ranges import SIZES, Sizes
from jobs.data.spread import Helpers
from jobs.data.stored_work import StoredWork, this_node
from jobs.data.tables import TableForm
from jobs.spec import JobSpec, TaskSpec
from jobs.tasks import Task, get, tokenization

Fetch = Callable[[Path], bool]
MARK = ".early-"
DIGESTS = "digests"
"""In the storage: what is known of the files of data (jobs/data/unchanged.py)."""


@dataclass(frozen=True)
class Arriving:
    """Where data is looked for whose rows a run learns from as they come (jobs/data/arrivals.py)."""

    files: str
    """The list of its files of rows to train on."""
    before: str
    """The folder that all of it is in until it is whole, and gets its own; "" where it is."""
    mark: str = ""
    """A file in it, where nodes share no folder: by it this node knows that it sees the driver's."""
    work: StoredWork | None = None
    """Through what other nodes come to it, then."""
    held_out: Mapping[str, str] = field(default_factory=dict)
    """The files of what is held out, then, with their digests."""
    away: str = ""
    """The folder that other nodes have it in until it is whole, then."""

    @property
    def place(self) -> Path | None:
        """Where this node has it until it is whole; None where it is."""
        if not self.before:
            return None
        here = Path(self.before)
        return here if self.work is None or (here / self.mark).exists() else Path(self.away)

    def bring(self) -> None:
        """Have on this node, which shares no folder with the driver, what training begins with."""
        assert self.work is not None, "nodes share no folder"
        self.work.bring_begun(Path(self.away), self.held_out)

    def fetch(self, directory: Path) -> arrivals.Fetch | None:
        """Return what has a file of rows on this node, if nodes share no folder; `directory`: of the whole data."""
        if self.work is None:
            return None
        work, place = self.work, self.place or directory

        def one(file: str, digest: str) -> None:
            if not (directory / file).is_file():
                work.bring_rows(place, {file: digest})

        return one


@dataclass(frozen=True)
class Prepared:
    """A data set that is ready to be trained on."""

    directory: str
    name: str
    digest: str
    train_files: list[str] = field(default_factory=list)
    eval_files: list[str] = field(default_factory=list)
    train_rows: int = 0
    eval_rows: int = 0
    bad_rows: int = 0
    """How many raw examples were left out."""
    first_bad: tuple[str, ...] = ()
    """The first of them: where, and why."""
    bad_reasons: tuple[str, ...] = ()
    """Sentences about those that are left out for another reason than the first one."""
    notes: Sequence[str] = ()
    """Sentences for the log: what was left out or chosen, and what the task counted."""
    cached: bool = False
    parts: Mapping[str, str] = field(default_factory=dict)
    """What decides the rows: name of a part → digest (jobs/data/identity.py)."""
    rows: str = ""
    """SHA-256 (hex) of the encoded rows."""
    mixture: Sequence[SourceRows] = ()
    """What each source of a mixture came to; none where the data is no mixture."""
    reference: str = ""
    """The folder, within `directory`, of the columns that a model has made of the rows (jobs/driver/reference.py); ""
    where there are none."""
    arriving: Arriving | None = None
    """Where its rows are looked for as they come; None: all are there."""

    @property
    def task_directory(self) -> Path:
        """Where the task's tokenizer or labels lie."""
        return Path(self.directory) / "task"

    @property
    def is_whole(self) -> bool:
        """Whether all of it was there when this was made."""
        return self.arriving is None or not self.arriving.before

    def task(self, spec: JobSpec) -> Task:
        """Load the task with what it learned from the data."""
        load, options = get(spec.task.name).load, spec.task.options
        if before := _before(self):
            try:
                return load(before / "task", options)
            except Exception:  # whatever a library says where files are gone: they have got into their own folder
                if before.is_dir():
                    raise
        return load(self.task_directory, options)

    def sources(self, spec: JobSpec) -> tuple[Part, ...]:
        """Return the sources that a run of `spec` mixes; none where it mixes none."""
        return mixture_sources.parts_of(self.mixture, spec.data)

    def held_out(self) -> dict[str, int]:
        """Return how many held-out rows each source of a mixture has, in the order of the rows; those of `data.eval`
        are of none."""
        found = {source.name: source.eval_rows for source in self.mixture if source.eval_rows}
        assert sum(found.values()) in (0, self.eval_rows), "held-out rows are of the sources, or of data.eval"
        return found


def prepare(
    spec: JobSpec,
    base: Path,
    storage: Path,
    *,
    parent: Path | str | None,
    on_progress: OnProgress,
    sizes: Sizes = SIZES,
    before: Noted | None = None,
    uri: str | None = None,
) -> Prepared:
    """Encode the data of `spec`, or find it already encoded.

    Args:
        base: where relative paths start.
        parent: the model whose tokenizer or labels are kept, if the job starts from weights: directory or hub id.
        on_progress: see jobs/data/meter.py.
        sizes: who reads what.
        before: what the run that goes on has noted about its data; other data is refused.
        uri: see `stages`.

    Raises:
        UserError, TaskError: the data cannot be read or encoded, or is not that of the run; nothing is left behind.
    """
    *_, whole = stages(spec, base, storage, parent=parent, on_progress=on_progress, sizes=sizes, before=before, uri=uri)
    return whole


def stages(
    spec: JobSpec,
    base: Path,
    storage: Path,
    *,
    parent: Path | str | None,
    on_progress: OnProgress,
    sizes: Sizes = SIZES,
    before: Noted | None = None,
    overlap: Overlap | None = None,
    fetch: Fetch | None = None,
    uri: str | None = None,
) -> Iterator[Prepared]:
    """Yield the data of `spec` once it is whole; with an `overlap` before that too, where it is not encoded yet.

    That is when the task has learned and what is held out is encoded: of the rows to train on nothing is known then.
    Arguments and errors are those of `prepare`.

    Args:
        fetch: has the data of a folder brought to it from where it was prepared before; tells whether it was.
        uri: the object store that it is kept in, where `storage` is this machine's own: what nodes prepare goes there.
    """
    data, before = spec.data, before or Noted()
    form = TableForm(data.columns, data.quotes)
    with unchanged.kept_in(storage / DIGESTS), opening.told(on_progress):
        train = mixture_sources.open_train(data, base, form, sizes.range_bytes)
        held_out = sources.open_source(data.eval, base, form, sizes.range_bytes) if data.eval is not None else None
        tables.check_used(form, any(source.tables for source in (train, held_out) if source))
        parts = identity.parts_of(spec, train, held_out, parent, base, sizes)
    identity.check_same(before, parts)
    whole = storage / "data" / identity.digest_of(parts)[:16]
    directory = whole if trains(spec) else whole.with_name(f"{whole.name}-eval")
    known = next((place for place in (whole, directory) if _is_there(place, fetch)), None)
    if known is None:
        source = train or held_out
        assert source is not None, "the spec names data"
        named = {"name": source.name, "digest": identity.digest_of(parts)}
        helpers = Helpers(overlap.taken_cpus if overlap else 0.0)
        with unfinished.folder_for(directory) as place, helpers, _stored_work(uri, directory) as work:
            own = _anchored(spec, base)
            both, overlapped = (train, held_out), overlap is not None
            preparation = Preparation(own, place, both, parent, on_progress, sizes, helpers, work, overlapped)
            late = None if identity.changed(before.parts, parts) else overlap  # changed: its rows are compared first
            try:
                made, (notes, encoded) = _first(preparation, late is not None)
            except FileNotFoundError:
                if fetch is None or not fetch(directory):
                    raise
                known = directory  # another one was faster, and has removed from the store what this one went on from
                shutil.rmtree(place, ignore_errors=True)
            else:
                if late is not None:
                    begun = Prepared(str(directory), named["name"], named["digest"], parts=parts)
                    begun = _begun(begun, place, encoded)
                    yield _apart(begun, place, encoded, preparation.stored) if work else begun
                    with _failing(late):
                        made = preparation.rest(encoded, notes, late)
                _publish(place, directory, {**made, **named})
    idle = spec_unused.unused(spec)
    left_out = [note for source in (train, held_out) if source for note in source.notes]
    meta = json.loads(((known or directory) / unfinished.META).read_text(encoding="utf-8"))
    notes = [*idle, *left_out, *meta["notes"], *identity.check_same(before, parts, meta["rows"])]
    meta["mixture"] = [SourceRows(**each) for each in meta.get("mixture", ())]
    yield Prepared(
        **{**meta, "notes": notes, "parts": parts, "directory": str(known or directory), "cached": known is not None}
    )


def _is_there(place: Path, fetch: Fetch | None) -> bool:
    return (place / unfinished.META).is_file() or (fetch is not None and fetch(place))


@contextmanager
def _stored_work(uri: str | None, directory: Path) -> Iterator[StoredWork | None]:
    """Yield what nodes that share no folder work through; what it has stored is removed where the data is at fault."""
    try:
        yield StoredWork(uri, directory.name, this_node()) if uri else None
    except UserError:
        if uri:
            stored.forget(Store(uri), directory.name)
        raise


def _first(preparation: Preparation, late: bool) -> tuple[dict[str, Any], tuple[list[str], list[Encoded]]]:
    """Prepare all; or, where the rows to train on come `late`, the others. Return the entries of meta.json; the notes
    and the files of what is held out, which `rest` takes then."""
    if late:
        return {}, (preparation.learned(), preparation.held_out())
    return preparation.run(), ([], [])


def _begun(prepared: Prepared, place: Path, held_out: list[Encoded]) -> Prepared:
    """Return what is known of data in `place` when its held-out rows are encoded."""
    files = sorted(each.file for each in held_out if each.rows)
    rows = sum(each.rows for each in held_out)
    return replace(prepared, eval_files=files, eval_rows=rows, arriving=Arriving("", str(place)))


def _apart(begun: Prepared, place: Path, held_out: list[Encoded], work: StoredWork | None) -> Prepared:
    """Return the same for nodes that share no folder."""
    assert begun.arriving is not None, "its rows are still to come"
    mark = f"{MARK}{secrets.token_hex(8)}"
    (place / mark).touch()
    digests = {each.file: each.digest for each in held_out if each.digest}
    return replace(begun, arriving=replace(begun.arriving, mark=mark, work=work, held_out=digests))


@contextmanager
def _failing(overlap: Overlap) -> Iterator[None]:
    """Let those that read what is encoded end before it may be removed."""
    try:
        yield
    except BaseException:
        overlap.failed()
        raise


def _anchored(spec: JobSpec, base: Path) -> JobSpec:
    """Return the spec with the whole path of a tokenizer beside it: where a job's code lies, only small files are."""
    return spec.model_copy(
        update={"task": TaskSpec(name=spec.task.name, **tokenization.anchored(spec.task.options, base))}
    )


def _publish(place: Path, directory: Path, meta: Mapping[str, Any]) -> None:
    """Write meta.json and rename into place; if another job was faster, its result is the same."""
    unfinished.done(place)
    for mark in place.glob(f"{MARK}*"):
        mark.unlink()
    (place / unfinished.META).write_text(json.dumps(meta), encoding="utf-8")
    try:
        place.rename(directory)
    except OSError:
        if not (directory / unfinished.META).is_file():
            raise


def rows_of(prepared: Prepared, files: list[str]) -> rows.Rows:
    """Open the rows of some of the data set's files."""
    directory = Path(prepared.directory)
    beside = [directory / prepared.reference / file for file in files] if prepared.reference else []
    return rows.Rows([directory / file for file in files], beside, before=_before(prepared))


def rows_to_train_on(prepared: Prepared) -> rows.Rows:
    """Open the rows to train on; of those that arrive, wait for the first.

    Raises:
        NoMore: none come.
    """
    if prepared.arriving is None:
        return rows_of(prepared, prepared.train_files)
    directory = Path(prepared.directory)
    fetch = prepared.arriving.fetch(directory)
    return arrivals.Arriving(Path(prepared.arriving.files), directory, prepared.arriving.place, fetch)


def _before(prepared: Prepared) -> Path | None:
    return prepared.arriving.place if prepared.arriving else None
