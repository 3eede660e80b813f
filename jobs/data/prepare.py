"""Raw examples → encoded, packed rows on disk: once, in parallel, cached by a digest of data and settings.

storage/data/<digest>/   train-00000.arrow … eval-00000.arrow …   encoded rows (jobs/data/rows.py)
                         task/                                     what the task learned: tokenizer, labels
                         meta.json                                 written last; without it the folder is no cache
storage/data/<digest>-eval/                                        the held-out rows only, for a job that trains nothing

Examples are streamed (jobs/data/stream.py): memory does not grow with the data.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from jobs.data import chunks, rows, sources, stream
from jobs.data.examples import BadRows, Example, Source
from jobs.data.stream import Split, Stream, Survey
from jobs.spec import JobSpec
from jobs.tasks import Task, code_digest, get

FORMAT = 2
CLUSTER_BYTES = 64 << 20
"""From this size on, chunks are encoded by tasks all over the cluster; below, starting workers would take longer."""

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Prepared:
    """A data set that is ready to be trained on."""

    directory: str
    name: str
    digest: str
    train_files: list[str]
    eval_files: list[str]
    train_rows: int
    eval_rows: int
    bad_rows: int = 0
    """How many raw examples were left out."""
    first_bad: tuple[str, ...] = ()
    """The first of them: where, and why."""
    notes: tuple[str, ...] = ()
    """Sentences for the log: what the task chose, and what it counted."""
    cached: bool = False

    @property
    def task_directory(self) -> Path:
        """Where the task's tokenizer or labels lie."""
        return Path(self.directory) / "task"

    def task(self, spec: JobSpec) -> Task:
        """Load the task with what it learned from the data."""
        return get(spec.task.name).load(self.task_directory, spec.task.options)


def prepare(
    spec: JobSpec,
    base: Path,
    storage: Path,
    *,
    parent: Path | str | None,
    on_progress: OnProgress,
    cluster_bytes: int = CLUSTER_BYTES,
) -> Prepared:
    """Encode the data of `spec`, or find it already encoded.

    Args:
        base: where relative paths start.
        parent: the model whose tokenizer or labels are kept, if the job starts from weights: directory or hub id.
        on_progress: called with (phase, done, total).
        cluster_bytes: see CLUSTER_BYTES.

    Raises:
        UserError, TaskError: the data cannot be read or encoded; nothing is left behind.
    """
    data = spec.data
    train = sources.open_source(data.train, base, data.columns) if data.train else None
    held_out = sources.open_source(data.eval, base, data.columns) if data.eval else None
    digest = _digest(spec, train, held_out, parent)
    whole = storage / "data" / digest[:16]
    directory = whole if _trains(spec) else whole.with_name(f"{whole.name}-eval")
    for known in (whole, directory):
        if (known / "meta.json").is_file():
            meta = json.loads((known / "meta.json").read_text(encoding="utf-8"))
            return Prepared(**{**meta, "directory": str(known), "cached": True})
    partial_ = directory.with_name(f"{directory.name}.{os.getpid()}.partial")
    (partial_ / "task").mkdir(parents=True)
    try:
        source = train or held_out
        assert source is not None
        meta = _Preparation(spec, partial_, train, held_out, parent, on_progress, cluster_bytes).run()
        meta.update(name=source.name, digest=digest)
        (partial_ / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        _publish(partial_, directory)
    finally:
        shutil.rmtree(partial_, ignore_errors=True)
    return Prepared(**{**meta, "directory": str(directory)})


def _check_measurable(spec: JobSpec, task: Task, parent: Path | str | None) -> None:
    """Refuse to measure a model by labels or by a tokenizer that it did not learn: the figures would be of nothing.

    Raises:
        UserError: the model does not say what it learned, and nothing else does.
    """
    tokenizer = getattr(task.options, "tokenizer", None)
    if _trains(spec) or (task.generates and getattr(tokenizer, "source", None)):
        return
    given = " without task.tokenizer" if getattr(tokenizer, "is_given", False) else ""
    raise UserError(
        f"phase {spec.phase} measures what a model has learned, and {parent} does not say that for {spec.task.name}"
        f"{given} ({' or '.join(task.learned_files)}): "
        f"{'leave task.tokenizer out' if given else 'fine-tune it first'}"
    )


def _trains(spec: JobSpec) -> bool:
    return spec.phase in ("pretrain", "finetune")


def _digest(spec: JobSpec, train: Source | None, held_out: Source | None, parent: Path | str | None) -> str:
    task = get(spec.task.name)
    what = {
        "format": FORMAT,
        "sources": [source.digest if source else None for source in (train, held_out)],
        "data": spec.data.model_dump(mode="json", by_alias=True, exclude={"train", "eval", "eval_max_rows"}),
        "task": {**spec.task.model_dump(), "version": task.version, "code": code_digest(spec.task.name)},
        "parent": _parent_digest(parent, task) if parent else None,
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _parent_digest(parent: Path | str, task: type[Task]) -> str:
    """Digest what the parent learned, not its weights: another version of the same model encodes alike."""
    files = [Path(parent) / name for name in task.learned_files]
    found = [f"{path.name} {len(path.read_bytes())} ".encode() + path.read_bytes() for path in files if path.is_file()]
    return hashlib.sha256(b"".join(found) or str(parent).encode()).hexdigest()


class _Preparation:
    """One preparation, from the first reading of the sources to what meta.json says."""

    def __init__(
        self,
        spec: JobSpec,
        directory: Path,
        train: Source | None,
        held_out: Source | None,
        parent: Path | str | None,
        on_progress: OnProgress,
        cluster_bytes: int,
    ) -> None:
        self._spec, self._directory, self._parent, self._on_progress = spec, directory, parent, on_progress
        self._bad = BadRows(spec.data.max_bad_rows if spec.data.bad_rows == "skip" else 0)
        checker = get(spec.task.name)(spec.task.options)
        self._train = Stream(train, checker, spec.data.max_examples) if train else None
        self._held_out = Stream(held_out, checker) if held_out else None
        self._cluster_bytes = cluster_bytes

    def run(self) -> dict[str, Any]:
        """Survey, learn, encode; return the entries of meta.json."""
        self._on_progress("read", 0, 1)
        self._survey = self._train.survey(self._bad) if self._train else Survey(0, 0, False)
        self._held_out_survey = self._held_out.survey(self._bad) if self._held_out else Survey(0, 0, False)
        self._on_progress("read", 1, 1)
        self._size = self._survey.size + self._held_out_survey.size
        self._on_cluster = self._size >= self._cluster_bytes
        notes = self._learn()
        encoded = list(self._encode())
        notes += _counted(get(self._spec.task.name), encoded)
        return {**self._files(encoded), "notes": notes} | {
            "bad_rows": self._bad.count,
            "first_bad": [str(row) for row in self._bad.first],
        }

    def _learn(self) -> list[str]:
        """Let the task learn from the training examples, or take over what the parent knows; save it."""
        task = get(self._spec.task.name)(self._spec.task.options)
        notes: list[str] = []
        if self._parent is None or not task.inherit(self._parent):
            _check_measurable(self._spec, task, self._parent)
            if self._train is None:
                raise UserError("data.train is missing: there is nothing to learn the tokenizer or the labels from")
            self._on_progress("fit", 0, 1)
            skip_bad = self._spec.data.bad_rows == "skip"
            work = partial(chunks.observe, self._spec.task, skip_bad)
            training = (example for split, example in self._examples() if split == "train")
            notes = task.fit(_merged(chunks.everywhere(work, stream.chunks(training), self._on_cluster)))
            self._on_progress("fit", 1, 1)
        task.save(self._directory / "task")
        return notes

    def _encode(self) -> Iterator[chunks.Encoded]:
        total = max(1, -(-self._size // stream.CHUNK_BYTES))
        self._on_progress("encode", 0, total)
        wanted = (item for item in self._examples() if item[0] == "eval" or _trains(self._spec))
        work = partial(chunks.encode, self._spec.task, self._directory)
        for done, encoded in enumerate(chunks.everywhere(work, _numbered(wanted), self._on_cluster), 1):
            for row in encoded.left_out:
                self._bad.add(row)
            self._on_progress("encode", done, max(total, done + 1))
            yield encoded
        self._on_progress("encode", total, total)

    def _examples(self) -> Iterator[tuple[Split, Example]]:
        """Yield all examples, each with the split it belongs to."""
        if self._train and self._held_out:
            yield from (("train", example) for example in self._train.again())
        elif self._train:
            yield from stream.told_apart(self._train, self._survey, self._spec.data)
        if self._held_out:
            yield from (("eval", example) for example in self._held_out.again())

    def _files(self, encoded: list[chunks.Encoded]) -> dict[str, Any]:
        of = {split: [e for e in encoded if e.file.startswith(split)] for split in ("train", "eval")}
        made = {split: sum(e.rows for e in of[split]) for split in of}
        if of["train"] and not made["train"]:
            name = self._train.source.name if self._train else ""
            raise UserError(f"data: nothing of {name} fits: every example is empty or too long")
        names = {f"{split}_files": sorted(e.file for e in of[split] if e.rows) for split in of}
        return {**names, **{f"{split}_rows": made[split] for split in of}}


def _merged(findings: Iterator[Any]) -> Any:
    """Add findings up, in the order of their chunks; None where nothing was found."""
    whole = None
    for found in findings:
        whole = found if whole is None else whole if found is None else whole.merged(found)
    return whole


def _numbered(examples: Iterator[tuple[Split, Example]]) -> Iterator[tuple[str, list[Example]]]:
    """Name the file that each chunk goes to."""
    counts: Counter[str] = Counter()
    for split, chunk in stream.split_chunks(examples):
        yield f"{split}-{counts[split]:05d}.arrow", chunk
        counts[split] += 1


def _counted(task: type[Task], encoded: list[chunks.Encoded]) -> list[str]:
    """Say what the task counted while it encoded."""
    examples = sum(e.examples for e in encoded)
    counts = {key: sum(e.counts.get(key, 0) for e in encoded) for key in task.counted}
    return [f"{counts[key]} of {examples} {what}" for key, what in task.counted.items() if counts[key]]


def _publish(partial_: Path, directory: Path) -> None:
    """Rename into place; if another job was faster, its result is the same."""
    try:
        partial_.rename(directory)
    except OSError:
        if not (directory / "meta.json").is_file():
            raise


def rows_of(prepared: Prepared, files: list[str]) -> rows.Rows:
    """Open the rows of some of the data set's files."""
    return rows.Rows([Path(prepared.directory) / file for file in files])
