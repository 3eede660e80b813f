"""One preparation, from the first reading of the sources to what meta.json says."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from cluster.errors import UserError
from jobs.data import chunks, mixture_sources, said, shares, stream, surveying, unfinished
from jobs.data.arrivals import place_of_range
from jobs.data.corpora import BUILT_IN
from jobs.data.examples import BadRows, Source
from jobs.data.meter import OnProgress
from jobs.data.ranges import Sizes, ranges_of
from jobs.data.rounds import Rounds, layout_of
from jobs.data.spread import Helpers
from jobs.data.stored_work import StoredWork
from jobs.data.stream import Split
from jobs.data.surveying import Reading, Surveyed
from jobs.spec import JobSpec
from jobs.tasks import TASKS, Task, get


class Overlap(Protocol):
    """Who trains while rows are still encoded."""

    seed: int
    """Decides the order of the files."""
    taken_cpus: float
    """CPUs of the cluster that the workers have."""

    def arrived(self, file: str, rows: int, digest: str) -> None:
        """Take note of a file of rows to train on; `digest`: of its content, where it is in a store, else ""."""

    def check(self) -> None:
        """Raise Abandoned where nobody waits any more; called often."""

    def failed(self) -> None:
        """Take note that no more files come; return once nobody reads those that are there."""


class Preparation:
    """Reads, learns and encodes the data of one spec into a directory."""

    def __init__(
        self,
        spec: JobSpec,
        directory: Path,
        sources: tuple[Source | None, Source | None],
        parent: Path | str | None,
        on_progress: OnProgress,
        sizes: Sizes,
        helpers: Helpers,
        stored: StoredWork | None = None,
        overlapped: bool = False,
    ) -> None:
        """Take what `run` needs; `sources` are those to train on and to hold out. `stored`, `overlapped`: see
        Rounds."""
        self._spec, self._directory, self._parent, self._sizes = spec, directory, parent, sizes
        most = spec.data.max_bad_rows if spec.data.bad_rows == "skip" else 0
        self._bad = BadRows(most, own_code=spec.task.name not in TASKS)
        checker = get(spec.task.name)(spec.task.options)
        if parent is not None:
            checker.follow(parent)
        train, held_out = sources
        self._train: Surveyed | None = None
        self._held_out: Surveyed | None = None
        limit = spec.data.max_examples
        self._train_reading = self._reading("train", train, checker, limit) if train else None
        self._held_out_reading = self._reading("held-out", held_out, checker, None) if held_out else None
        self._rounds = Rounds(directory, on_progress, sizes, most, helpers, stored, overlapped)

    def _reading(self, name: str, source: Source, checker: Task, limit: int | None) -> Reading:
        ranges = ranges_of(source, checker, limit, self._sizes)
        return Reading(name, source, checker, limit, ranges, self._directory / unfinished.SURVEYS)

    def run(self) -> dict[str, Any]:
        """Survey, learn, encode; return the entries of meta.json."""
        notes = self.learned()
        return self._whole(list(self._encode()), notes)

    @property
    def stored(self) -> StoredWork | None:
        """The way through the store for nodes that share no folder, once what is held out is encoded."""
        return self._rounds.stored

    def learned(self) -> list[str]:
        """Survey, and let the task learn; return what is to be said of it."""
        readings = [reading for reading in (self._train_reading, self._held_out_reading) if reading]
        unfinished.keep_if(self._directory, layout_of(readings, self._sizes))
        drop = self._spec.data.duplicates == "drop"
        surveyed = {found.reading.name: found for found in self._rounds.survey(readings, self._bad, drop)}
        self._train, self._held_out = surveyed.get("train"), surveyed.get("held-out")
        if self._train and not self._held_out:
            self._train.divide(self._spec.data)
        return self._said_of_content() + self._said_of_split() + self._learn()

    def held_out(self) -> list[chunks.Encoded]:
        """Encode the rows that are held out, once the task has learned."""
        own = self._held_out or (self._train if self._holds_out() else None)
        made = list(self._kept(self._rounds.encode(self._spec.task, frozenset({"eval"}), [own]))) if own else []
        self._rounds.bring_rows(made)
        return made

    def rest(self, held_out: list[chunks.Encoded], notes: list[str], overlap: Overlap) -> dict[str, Any]:
        """Encode the rows to train on, in the order of a run; return the entries of meta.json.

        Args:
            held_out: what `held_out` returned.
            notes: what `learned` did.
            overlap: who is told of each file.
        """
        assert self._train is not None, "there is something to train on"
        found, of = list(held_out), [self._train]
        order = partial(place_of_range, overlap.seed)
        made = self._rounds.encode(self._spec.task, frozenset({"train"}), of, order, overlap.check)
        for encoded in self._kept(made):
            found.append(encoded)
            if encoded.rows:
                self._rounds.bring_rows([encoded])
                overlap.arrived(encoded.file, encoded.rows, encoded.digest if self.stored else "")
            overlap.check()
        return self._whole(found, notes)

    def _holds_out(self) -> bool:
        """Tell whether any of the examples to train on, or the end of one, is held out."""
        return self._train is not None and (self._train.held > 0 or self._is_cut())

    def _whole(self, encoded: list[chunks.Encoded], notes: list[str]) -> dict[str, Any]:
        """Return the entries of meta.json."""
        notes = ([] if self._is_cut() else _said_of_examples(encoded)) + notes
        counted = _counted(get(self._spec.task.name), encoded)
        files = self._files(encoded, counted)
        self._rounds.bring_rows(encoded)
        by_source = self._by_source(encoded)
        mixed = {"mixture": list(map(asdict, by_source))} if by_source else {}
        notes = [*mixture_sources.said(by_source), *notes] if by_source else notes
        return {**files, **mixed, "notes": notes + counted} | {
            "rows": hashlib.sha256("".join(sorted(f"{e.file} {e.digest}\n" for e in encoded)).encode()).hexdigest(),
            "bad_rows": self._bad.count,
            "first_bad": [str(row) for row in self._bad.first],
            "bad_reasons": self._bad.other_reasons(),
        }

    def _is_cut(self) -> bool:
        """Tell whether examples are cut to hold their ends out, so that each stands on both sides."""
        if self._held_out is not None or self._train is None:
            return False
        return stream.way_of(self._train.survey, self._spec.data) == "cut"

    def _said_of_content(self) -> list[str]:
        both = ((self._train, ""), (self._held_out, "held out: "))
        owned = [(found, prefix) for found, prefix in both if found and found.reading.source.name not in BUILT_IN]
        notes = [prefix + note for found, prefix in owned for note in said.said_of_content(found.survey)]
        return notes + [
            prefix + note for found, prefix in both if found for note in said.said_of_dropped(*found.dropped)
        ]

    def _said_of_split(self) -> list[str]:
        if self._train and self._held_out:
            short = self._held_out.survey.uncut
            notes = [f"{short} of the held-out examples are too short to be predicted: left out"] if short else []
            shared = surveying.shared(self._train, self._held_out)
            return notes + said.said_of_overlap(self._train.survey, self._held_out.survey, shared)
        return said.said_of_split(self._train.survey, self._spec.data, self._train.held) if self._train else []

    def _learn(self) -> list[str]:
        """Let the task learn from the training examples, or take over what the parent knows; save it."""
        before = unfinished.learned(self._directory)
        if before is not None:
            return before
        task = get(self._spec.task.name)(self._spec.task.options)
        if self._parent is None or not task.inherit(self._parent):
            _check_measurable(self._spec, task, self._parent)
            named = task.generates and getattr(getattr(task.options, "tokenizer", None), "source", None)
            if self._train is None and not named:
                raise UserError("data.train is missing: there is nothing that the task could be fitted to")
            notes = task.fit(self._findings(task)) + self._said_of_fit(task)
        else:
            notes = task.inherited()
        task.save(self._directory / "task")
        unfinished.keep_learned(self._directory, notes)
        return notes

    def _said_of_fit(self, task: Task) -> list[str]:
        return [mixture_sources.FITTED] if task.learns() and self._train and self._train.reading.source.mixed else []

    def _by_source(self, encoded: list[chunks.Encoded]) -> list[mixture_sources.SourceRows]:
        """Return what each source of a mixture came to; nothing where the training data is none.

        Raises:
            UserError: of one, nothing is left to train on.
        """
        reading = self._train.reading if self._train else None
        if reading is None or not reading.source.mixed:
            return []
        of = [each for each in encoded if each.file.startswith("train") or self._held_out is None]
        numbered = [(shares.range_of(each.file), each) for each in of]
        found = mixture_sources.by_source(reading.source, reading.ranges, numbered)
        if trains(self._spec):
            mixture_sources.check(found)
        return found

    def _findings(self, task: Task) -> Any:
        """Return what a task finds in the training examples."""
        if self._train is None or not task.learns():
            return None
        how = (self._spec.task, self._spec.data.bad_rows == "skip", self._train)
        found = self._rounds.observe(*how, self._train.survey.size)
        return found if getattr(found, "suffices", True) else self._rounds.observe(*how, 0)

    def _encode(self) -> Iterator[chunks.Encoded]:
        splits: frozenset[Split] = frozenset(("train", "eval") if trains(self._spec) else ("eval",))
        of = [found for found in (self._train, self._held_out) if found]
        return self._kept(self._rounds.encode(self._spec.task, splits, of))

    def _kept(self, made: Iterator[chunks.Encoded]) -> Iterator[chunks.Encoded]:
        """Count the bad rows of each file as it comes."""
        for encoded in made:
            for row in encoded.left_out:
                self._bad.add(row)
            yield encoded

    def _files(self, encoded: list[chunks.Encoded], counted: list[str]) -> dict[str, Any]:
        """Return the files with rows; what was asked for must have left some that count."""
        of = {split: [e for e in encoded if e.file.startswith(split)] for split in ("train", "eval")}
        asked = {"train": self._train, "eval": self._held_out or (None if trains(self._spec) else self._train)}
        for split, parts in of.items():
            found = asked[split]
            if not parts or any(part.targets for part in parts):
                continue
            if found is not None:
                name = found.reading.source.name
                raise UserError(_nothing_left(name, parts, self._spec.task.options, self._bad, counted))
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
