"""How pairs of a source and a target become rows: what seq2seq learns of its data, and keeps with the model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from jobs.tasks import Batch, Columns, Task, TaskError, TaskOptions, TaskSetupError, pair_tokens, tokenization
from jobs.tasks.labels import chosen, column_of
from jobs.tasks.messages import is_nothing, text_of
from jobs.tasks.pair_options import Seq2SeqOptions
from jobs.tasks.text_rows import filled
from jobs.tasks.text_sample import TextFindings

PAIRS_FILE = "seq2seq.json"
MAX_LENGTH = 128
Loaded = TypeVar("Loaded", bound="PairRows")


class PairRows(Task):
    """The part of the task that knows pairs of texts, and no model."""

    Options: ClassVar[type[TaskOptions]] = Seq2SeqOptions
    learned_files: ClassVar[tuple[str, ...]] = (PAIRS_FILE, *tokenization.FILES)
    counted: ClassVar[Mapping[str, str]] = pair_tokens.COUNTED

    options: Seq2SeqOptions

    def __init__(self, options: TaskOptions | Mapping[str, Any] | None = None) -> None:
        super().__init__(options)
        self.tokenizer: Any = None
        self._for_data = options is not None
        self._parent: Path | str | None = None
        self._learned: dict[str, Any] = {
            "prefix": self.options.prefix or "",
            "max_source_length": self.options.max_source_length or MAX_LENGTH,
            "max_target_length": self.options.max_target_length or MAX_LENGTH,
        }
        self._changed: list[str] = []
        """What the options say otherwise than the model that the job starts from."""

    @property
    def prefix(self) -> str:
        """What stands before each source."""
        return str(self._learned["prefix"])

    @property
    def max_source_length(self) -> int:
        """Tokens of the longest source."""
        return int(self._learned["max_source_length"])

    @property
    def max_target_length(self) -> int:
        """Tokens of the longest target, its end among them."""
        return int(self._learned["max_target_length"])

    # -- data -------------------------------------------------------------------------------------------------------

    @classmethod
    def check_options(cls, options: TaskOptions, starts_from: str | None) -> None:
        """Refuse to train a tokenizer for weights that were learned with another."""
        tokenization.check_origin(options, starts_from)

    def check(self, example: Mapping[str, Any]) -> None:
        """Raise TaskError for an example without a source or a target."""
        self._pair(example)

    def content(self, example: Mapping[str, Any]) -> str:
        """Return the source: a held-out one is in no other pair either, whatever its translation."""
        return self._source(example)

    def answer(self, example: Mapping[str, Any]) -> str:
        """Return the target."""
        return self._pair(example)[1]

    def unused(self, example: Mapping[str, Any]) -> list[str]:
        """Return the columns that are neither source nor target."""
        read = {self.options.source_column, self.options.target_column}
        return [key for key, value in example.items() if key not in read and not is_nothing(value)]

    def observe(self, examples: Sequence[Mapping[str, Any]]) -> TextFindings | None:
        """Draw a share of the sample that a tokenizer is trained on, of both sides."""
        texts = [text for each in examples for text in self._pair(each)]
        return tokenization.observe(self.options.tokenizer, texts, self.expected_bytes)

    def learns(self) -> bool:
        """Return whether a tokenizer is trained."""
        return not self.options.tokenizer.source

    def fit(self, findings: TextFindings | None) -> list[str]:
        """Train the tokenizer on the sample, or load the one named in `tokenizer.from`."""
        self.tokenizer, said = pair_tokens.obtain(self.options.tokenizer, findings)
        return [*said, *(tokenization.difference(self.tokenizer, self._parent) if self._parent is not None else [])]

    def inherit(self, parent: Path | str) -> bool:
        """Keep the parent's tokenizer, unless another is named; of a model of this task, prefix and lengths too."""
        self._parent = parent
        if (Path(parent) / PAIRS_FILE).is_file():
            before = _read(Path(parent))
            given = {key: getattr(self.options, key) for key in before}
            self._learned = {key: chosen(given[key], before[key]) for key in before}
            self._changed = [key for key in before if self._learned[key] != before[key]]
        if self.options.tokenizer.is_given:
            return False
        self.tokenizer = pair_tokens.checked(tokenization.load(parent))
        return True

    def inherited(self) -> list[str]:
        """Say what stands before each source, and where texts are cut."""
        lengths = f"texts are cut at {self.max_source_length} and {self.max_target_length} tokens"
        return [f"before each source stands {self.prefix!r}; {lengths}" if self.prefix else lengths]

    def save(self, directory: Path) -> None:
        """Write the tokenizer, and seq2seq.json: the prefix and the lengths at which texts are cut."""
        self.tokenizer.save_pretrained(directory)
        (directory / PAIRS_FILE).write_text(json.dumps(self._learned, indent=2), encoding="utf-8")

    @classmethod
    def load(cls: type[Loaded], directory: Path, options: TaskOptions | Mapping[str, Any] | None = None) -> Loaded:
        """Read what `save` wrote."""
        task = cls(options)
        task.tokenizer = tokenization.load(directory)
        task._learned = _read(Path(directory))
        return task

    def encode(self, examples: Sequence[Mapping[str, Any]]) -> Columns:
        """Tokenise N pairs and cut them.

        Returns:
            source (N, Ls), source_length (N,), target (N, Lt), targets (N,), and what was counted (N,); all int32.
        """
        self._check_prefix()
        pairs = [self._pair(example) for example in examples]
        sources, targets = [self.prefix + source for source, _ in pairs], [target for _, target in pairs]
        return pair_tokens.encode(self.tokenizer, sources, targets, self.max_source_length, self.max_target_length)

    def collate(self, rows: Columns) -> Batch:
        """Return input_ids and attention_mask (B, S), labels (B, T), int64, as wide as the longest of each side.

        Args:
            rows: source (B, Ls), source_length (B,), target (B, Lt) and targets (B,), int32.
        """
        return pair_tokens.batch_of(rows)

    # -- inside -----------------------------------------------------------------------------------------------------

    def _source(self, example: Mapping[str, Any]) -> str:
        name = self.options.source_column
        return text_of(filled(column_of(example, name, "source_column"), f"column {name!r}"), name)

    def _pair(self, example: Mapping[str, Any]) -> tuple[str, str]:
        name = self.options.target_column
        target = filled(column_of(example, name, "target_column"), f"column {name!r}")
        return self._source(example), text_of(target, name)

    def _check_prefix(self) -> None:
        """Refuse a prefix that leaves no room.

        Raises:
            TaskSetupError: all sources would be cut to the same.
        """
        ids = pair_tokens.source_ids(self.tokenizer, [self.prefix], self.max_source_length + 1)[0][0]
        if self.prefix and len(ids) >= self.max_source_length:
            raise TaskSetupError(
                f"task.prefix {self.prefix!r:.60} takes all {self.max_source_length} tokens of a source: raise "
                "task.max_source_length"
            )


def _read(directory: Path) -> dict[str, Any]:
    try:
        learned = json.loads((directory / PAIRS_FILE).read_text(encoding="utf-8"))
        return {key: learned[key] for key in ("prefix", "max_source_length", "max_target_length")}
    except (OSError, KeyError, ValueError) as error:
        raise TaskError(f"{directory} holds no seq2seq model of Tandem: {PAIRS_FILE}: {error}") from error
