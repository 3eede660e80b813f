"""One preparation, from the first reading of the sources to what meta.json says."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from jobs.data import chunks, stream
from jobs.data.corpora import BUILT_IN
from jobs.data.examples import BadRows, Example, Source
from jobs.data.stream import Split, Stream, Survey
from jobs.spec import JobSpec
from jobs.tasks import TASKS, Task, get

OnProgress = Callable[[str, int, int], None]


class Preparation:
    """Reads, learns and encodes the data of one spec into a directory."""

    def __init__(
        self,
        spec: JobSpec,
        directory: Path,
        sources: tuple[Source | None, Source | None],
        parent: Path | str | None,
        on_progress: OnProgress,
        cluster_bytes: int,
    ) -> None:
        """Take what `run` needs; `sources` are those to train on and to hold out."""
        self._spec, self._directory, self._parent, self._on_progress = spec, directory, parent, on_progress
        most = spec.data.max_bad_rows if spec.data.bad_rows == "skip" else 0
        self._bad = BadRows(most, own_code=spec.task.name not in TASKS)
        train, held_out = sources
        checker = get(spec.task.name)(spec.task.options)
        if parent is not None:
            checker.follow(parent)
        self._train = Stream(train, checker, spec.data.max_examples) if train else None
        self._held_out = Stream(held_out, checker) if held_out else None
        self._cluster_bytes = cluster_bytes

    def run(self) -> dict[str, Any]:
        """Survey, learn, encode; return the entries of meta.json."""
        self._on_progress("read", 0, 1)
        self._survey = self._train.survey(self._bad) if self._train else Survey()
        self._held_out_survey = self._held_out.survey(self._bad) if self._held_out else Survey()
        self._on_progress("read", 1, 1)
        self._size = self._survey.size + self._held_out_survey.size
        self._on_cluster = self._size >= self._cluster_bytes
        notes = self._said_of_content() + self._said_of_split() + self._learn()
        encoded = list(self._encode())
        notes = ([] if self._is_cut() else _said_of_examples(encoded)) + notes
        counted = _counted(get(self._spec.task.name), encoded)
        files = self._files(encoded, counted)
        return {**files, "notes": notes + counted} | {
            "rows": hashlib.sha256("".join(sorted(f"{e.file} {e.digest}\n" for e in encoded)).encode()).hexdigest(),
            "bad_rows": self._bad.count,
            "first_bad": [str(row) for row in self._bad.first],
            "bad_reasons": self._bad.other_reasons(),
        }

    def _is_cut(self) -> bool:
        """Tell whether examples are cut to hold their ends out, so that each stands on both sides."""
        return self._held_out is None and stream.way_of(self._survey, self._spec.data) == "cut"

    def _said_of_content(self) -> list[str]:
        both = ((self._train, self._survey, ""), (self._held_out, self._held_out_survey, "held out: "))
        owned = [(survey, prefix) for at, survey, prefix in both if at and at.source.name not in BUILT_IN]
        return [prefix + note for survey, prefix in owned for note in stream.said_of_content(survey)]

    def _said_of_split(self) -> list[str]:
        if self._train and self._held_out:
            short = self._held_out_survey.uncut
            said = [f"{short} of the held-out examples are too short to be predicted: left out"] if short else []
            return said + stream.said_of_overlap(self._survey, self._held_out_survey)
        return stream.said_of_split(self._survey, self._spec.data) if self._train else []

    def _learn(self) -> list[str]:
        """Let the task learn from the training examples, or take over what the parent knows; save it."""
        task = get(self._spec.task.name)(self._spec.task.options)
        if self._parent is None or not task.inherit(self._parent):
            _check_measurable(self._spec, task, self._parent)
            named = task.generates and getattr(getattr(task.options, "tokenizer", None), "source", None)
            if self._train is None and not named:
                raise UserError("data.train is missing: there is nothing that the task could be fitted to")
            self._on_progress("fit", 0, 1)
            notes = task.fit(self._findings())
            self._on_progress("fit", 1, 1)
        else:
            notes = task.inherited()
        task.save(self._directory / "task")
        return notes

    def _findings(self) -> Any:
        """Return what the task finds in the training examples."""
        work = partial(chunks.observe, self._spec.task, self._spec.data.bad_rows == "skip")
        training = (example for split, example in self._examples() if split == "train")
        return _merged(chunks.everywhere(work, stream.chunks(training), self._on_cluster))

    def _encode(self) -> Iterator[chunks.Encoded]:
        total = max(1, -(-self._size // stream.CHUNK_BYTES))
        self._on_progress("encode", 0, total)
        wanted = (item for item in self._examples() if item[0] == "eval" or trains(self._spec))
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
            yield from (("train", example) for _, example in self._train.again(self._survey))
        elif self._train:
            yield from stream.told_apart(self._train, self._survey, self._spec.data)
        if self._held_out:
            yield from (("eval", example) for example in self._held_out.ends(self._held_out_survey))

    def _files(self, encoded: list[chunks.Encoded], counted: list[str]) -> dict[str, Any]:
        """Return the files with rows; what was asked for must have left some that count."""
        of = {split: [e for e in encoded if e.file.startswith(split)] for split in ("train", "eval")}
        asked = {"train": self._train, "eval": self._held_out or (None if trains(self._spec) else self._train)}
        for split, parts in of.items():
            stream_ = asked[split]
            if not parts or any(part.targets for part in parts):
                continue
            if stream_ is not None:
                raise UserError(_nothing_left(stream_.source.name, parts, self._spec.task.options, self._bad, counted))
            else:
                counted.append("of the held-out examples none has anything to predict: nothing is evaluated")
        names = {f"{split}_files": sorted(e.file for e in of[split] if e.rows) for split in of}
        return {**names, **{f"{split}_rows": sum(e.rows for e in of[split]) for split in of}}


def trains(spec: JobSpec) -> bool:
    """Tell whether the job's phase learns from rows, or measures only."""
    return spec.phase in ("pretrain", "finetune")


def _check_measurable(spec: JobSpec, task: Task, parent: Path | str | None) -> None:
    """Refuse to measure a model by labels or by a tokenizer that it did not learn: the figures would be of nothing.

    Raises:
        UserError: the model does not say what it learned, and nothing else does.
    """
    tokenizer = getattr(task.options, "tokenizer", None)
    if trains(spec) or (task.generates and getattr(tokenizer, "source", None)):
        return
    given = " without task.tokenizer" if getattr(tokenizer, "is_given", False) else ""
    raise UserError(
        f"phase {spec.phase} measures what a model has learned, and {parent} does not say that for {spec.task.name}"
        f"{given} ({' or '.join(task.learned_files)}): "
        f"{'leave task.tokenizer out' if given else 'fine-tune it first'}"
    )


def _nothing_left(
    name: str, parts: list[chunks.Encoded], options: dict[str, Any], bad: BadRows, counted: list[str]
) -> str:
    """Say why no example has anything to learn or to predict."""
    count = sum(part.examples for part in parts)
    if bad.count and sum(len(part.left_out) for part in parts) == count:
        return f"data: {name}: none of its {count} examples can be used; {bad.first[0]}"
    length = options.get("sequence_length")
    why = (
        f"all are longer than sequence_length ({length} tokens) before their answers begin, or empty, or too short"
        if length
        else ""
    )
    return f"data: {name}: none of its {count} examples has anything to predict: " + "; ".join(
        filter(None, (why, *counted))
    )


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


def _said_of_examples(encoded: list[chunks.Encoded]) -> list[str]:
    """Say how many examples the rows are made of, where these are not as many."""
    of = {split: [e for e in encoded if e.file.startswith(split)] for split in ("train", "eval")}
    count = {split: sum(e.examples - len(e.left_out) for e in parts) for split, parts in of.items()}
    if all(count[split] == sum(e.rows for e in parts) for split, parts in of.items()):
        return []
    return [f"made of {count['train']} examples to train on, {count['eval']} held out"]


def _counted(task: type[Task], encoded: list[chunks.Encoded]) -> list[str]:
    """Say what the task counted while it encoded, of the training data and of what is held out."""
    said = []
    for split, prefix in (("train", ""), ("eval", "held out: ")):
        of = [e for e in encoded if e.file.startswith(split)]
        examples = sum(e.examples for e in of)
        counts = {key: sum(e.counts.get(key, 0) for e in of) for key in task.counted}
        said += [f"{prefix}{counts[key]} of {examples} {what}" for key, what in task.counted.items() if counts[key]]
    return said
