"""Raw examples → encoded, packed rows on disk: once, in parallel, cached by a digest of data and settings.

storage/data/<digest>/   train-00000.arrow … eval-00000.arrow …   encoded rows (jobs/data/rows.py)
                         task/                                     what the task learned: tokenizer, labels
                         meta.json                                 written last; without it the folder is no cache
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from jobs.data import rows, sources
from jobs.data.examples import BadRow, BadRows, Example, Source
from jobs.spec import JobSpec
from jobs.tasks import Columns, Task, TaskError, get

FORMAT = 1
CHUNK_BYTES = 4 << 20
"""Raw bytes encoded in one go; fixed, so that the rows do not depend on the number of CPUs."""
CLUSTER_BYTES = 64 << 20
"""From this size on, chunks are encoded by tasks all over the cluster; below, starting workers would take longer."""

OnProgress = Callable[[str, int, int], None]
Chunk = tuple[str, list[Example]]
"""What is encoded in one go, and whether it is for `train` or `eval`."""


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
    cached: bool = False

    @property
    def task_directory(self) -> Path:
        """Where the task's tokenizer or labels lie."""
        return Path(self.directory) / "task"


def prepare(
    spec: JobSpec,
    base: Path,
    storage: Path,
    *,
    parent: Path | None,
    on_progress: OnProgress,
    cluster_bytes: int = CLUSTER_BYTES,
) -> Prepared:
    """Encode the data of `spec`, or find it already encoded.

    Args:
        base: where relative paths start.
        parent: the model directory whose tokenizer or labels are kept, if the job starts from weights.
        on_progress: called with (phase, done, total).
        cluster_bytes: see CLUSTER_BYTES.

    Raises:
        UserError, TaskError: the data cannot be read or encoded; nothing is left behind.
    """
    data = spec.data
    train = sources.open_source(data.train, base) if data.train else None
    held_out = sources.open_source(data.eval, base) if data.eval else None
    digest = _digest(spec, train, held_out, parent)
    directory = storage / "data" / digest[:16]
    if (directory / "meta.json").is_file():
        meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        return Prepared(**{**meta, "directory": str(directory), "cached": True})
    partial = directory.with_name(f"{directory.name}.{os.getpid()}.partial")
    (partial / "task").mkdir(parents=True)
    try:
        source = train or held_out
        assert source is not None
        meta = _write(spec, partial, train, held_out, parent, on_progress, cluster_bytes)
        meta.update(name=source.name, digest=digest)
        (partial / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        _publish(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Prepared(**{**meta, "directory": str(directory)})


def load_task(spec: JobSpec, prepared: Prepared) -> Task:
    """Load the task with what it learned from the data."""
    return get(spec.task).load(prepared.task_directory, spec.task_options())


def _digest(spec: JobSpec, train: Any, held_out: Any, parent: Path | None) -> str:
    what = {
        "format": FORMAT,
        "sources": [source.digest if source else None for source in (train, held_out)],
        "data": spec.data.model_dump(mode="json", by_alias=True, exclude={"train", "eval", "eval_max_rows"}),
        "task": spec.task,
        "parent": _parent_digest(parent) if parent else None,
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _parent_digest(parent: Path) -> str:
    files = [parent / name for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")]
    found = [path.read_bytes() for path in files if path.is_file()]
    return hashlib.sha256(b"".join(found) or str(parent).encode()).hexdigest()


def _write(
    spec: JobSpec,
    directory: Path,
    train: Source | None,
    held_out: Source | None,
    parent: Path | None,
    on_progress: OnProgress,
    cluster_bytes: int,
) -> dict[str, Any]:
    data = spec.data
    bad = BadRows(data.max_bad_rows if data.bad_rows == "skip" else 0)
    on_progress("read", 0, 1)
    examples = _read(spec, train, data.max_examples, bad) if train else []
    if held_out is not None:
        evaluated = _read(spec, held_out, None, bad)
    else:
        examples, evaluated = sources.split(examples, data.eval_fraction, data.split_seed, data.text_column)
    on_progress("read", 1, 1)
    task = _fit(spec, examples, parent, on_progress)
    task.save(directory / "task")
    if spec.phase in ("evaluate", "quantize"):
        examples = []
    chunks = [("train", c) for c in _chunks(examples)] + [("eval", c) for c in _chunks(evaluated)]
    encode = _encode_on_cluster if sum(map(_size, examples)) >= cluster_bytes else _encode_here
    counts = encode(spec, task, directory, chunks, on_progress, bad)
    if examples and not sum(counts[f] for f in counts if f.startswith("train")):
        raise UserError(f"data: nothing of {train.name if train else ''} fits: every example is empty or too long")
    files = {
        split: sorted(f for f, count in counts.items() if f.startswith(split) and count) for split in ("train", "eval")
    }
    return {
        "train_files": files["train"],
        "eval_files": files["eval"],
        "train_rows": sum(counts[f] for f in files["train"]),
        "eval_rows": sum(counts[f] for f in files["eval"]),
        "bad_rows": bad.count,
        "first_bad": [str(row) for row in bad.first],
    }


def _read(spec: JobSpec, source: Source, limit: int | None, bad: BadRows) -> list[Example]:
    """Read a source; what its task cannot use is bad as well."""
    task = get(spec.task)(spec.task_options())
    good = []
    for example in source.examples(limit, bad):
        try:
            task.check(example)
            good.append(example)
        except TaskError as error:
            bad.add(BadRow(example.where or source.name, str(error)))
    if not good:
        raise UserError(f"data: {source.name}: none of its {bad.count} examples can be used; {bad.first[0]}")
    return good


def _fit(spec: JobSpec, examples: list[Example], parent: Path | None, on_progress: OnProgress) -> Task:
    tokenizer = spec.data.tokenizer
    if parent is not None and not (tokenizer.train or tokenizer.source):
        return get(spec.task).load(parent, spec.task_options())
    task = get(spec.task)(spec.task_options())
    on_progress("fit", 0, 1)
    task.fit(examples)
    on_progress("fit", 1, 1)
    return task


def _chunks(examples: list[Example]) -> Iterator[list[Example]]:
    chunk: list[Example] = []
    size = 0
    for example in examples:
        chunk.append(example)
        size += _size(example)
        if size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _size(example: Example) -> int:
    return sum(len(v) if isinstance(v, str | bytes) else getattr(v, "nbytes", 200) for v in example.values())


def _encode_here(
    spec: JobSpec, task: Task, directory: Path, chunks: list[Chunk], on_progress: OnProgress, bad: BadRows
) -> dict[str, int]:
    counts = {}
    for index, (split, chunk) in enumerate(chunks):
        on_progress("encode", index, len(chunks))
        name = f"{split}-{index:05d}.arrow"
        counts[name], left_out = _encode_chunk(task, chunk, directory / name)
        _count(left_out, bad)
    on_progress("encode", len(chunks), len(chunks))
    return counts


def _encode_on_cluster(
    spec: JobSpec, task: Task, directory: Path, chunks: list[Chunk], on_progress: OnProgress, bad: BadRows
) -> dict[str, int]:
    """Encode chunks by Ray tasks, a few more in flight than there are CPUs, so the driver never holds them twice."""
    import ray

    remote = ray.remote(num_cpus=1, max_retries=3)(_encode_remotely)
    limit = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    counts: dict[str, int] = {}
    running: dict[Any, str] = {}
    queue = list(enumerate(chunks))
    while queue or running:
        while queue and len(running) < limit:
            index, (split, chunk) = queue.pop(0)
            name = f"{split}-{index:05d}.arrow"
            running[remote.remote(spec, str(directory), chunk, name)] = name
        done, _ = ray.wait(list(running), num_returns=1)
        counts[running.pop(done[0])], left_out = ray.get(done[0])
        _count(left_out, bad)
        on_progress("encode", len(counts), len(chunks))
    return counts


def _encode_remotely(spec: JobSpec, directory: str, chunk: list[Example], name: str) -> tuple[int, list[BadRow]]:
    task = get(spec.task).load(Path(directory) / "task", spec.task_options())
    return _encode_chunk(task, chunk, Path(directory) / name)


def _encode_chunk(task: Task, chunk: list[Example], path: Path) -> tuple[int, list[BadRow]]:
    """Encode and write a chunk; return its rows, and the examples that could not be encoded."""
    left_out: list[BadRow] = []
    try:
        columns: Columns = task.encode(chunk)
    except TaskError as error:
        chunk, left_out = _sieve(task, chunk)
        if not left_out:  # each can be encoded alone: what is wrong is not one of them
            raise
        if not chunk:
            raise UserError(str(left_out[0])) from error
        columns = task.encode(chunk)
    if "targets" not in columns:
        raise TaskError(f"task {task.name!r}: encode() must return a column `targets`; it returned {sorted(columns)}")
    return (rows.write(path, columns) if len(columns["targets"]) else 0), left_out


def _sieve(task: Task, chunk: list[Example]) -> tuple[list[Example], list[BadRow]]:
    """Tell the examples that can be encoded from those that cannot."""
    good, left_out = [], []
    for example in chunk:
        try:
            task.encode([example])
            good.append(example)
        except TaskError as error:
            left_out.append(BadRow(example.where, str(error)))
    return good, left_out


def _count(left_out: list[BadRow], bad: BadRows) -> None:
    for row in left_out:
        bad.add(row)


def _publish(partial: Path, directory: Path) -> None:
    """Rename into place; if another job was faster, its result is the same."""
    try:
        partial.rename(directory)
    except OSError:
        if not (directory / "meta.json").is_file():
            raise


def rows_of(prepared: Prepared, files: list[str]) -> rows.Rows:
    """Open the rows of some of the data set's files."""
    return rows.Rows([Path(prepared.directory) / file for file in files])
