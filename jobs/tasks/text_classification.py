"""Task `text-classification`: one label per text or pair of texts, with a transformers encoder or a small one of ours.

Rows (int32, L = max_length): input_ids (N, L), length (N,), label (N,), targets (N,) all ones; for pairs, where the
tokenizer makes them, token_type_ids (N, L), 1 in the second text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from cluster.strict import Text
from jobs.tasks import Batch, Better, Columns, Task, TaskError, TaskOptions, scores, tokenization
from jobs.tasks.chat_template import special_texts
from jobs.tasks.labels import check_columns, classified, column_of, kind_of, label_of, natural, said_of, unknown_of
from jobs.tasks.messages import is_nothing
from jobs.tasks.tokenization import END_OF_TEXT, TextFindings, TokenizerOptions

if TYPE_CHECKING:
    import torch

LABELS_FILE = "text_classification.json"
MAX_LENGTH = 128


class ClassifierTokenizerOptions(TokenizerOptions):
    """The tokenizer: trained on the data, or loaded. Left out, a model given by `from` keeps its own."""

    train: Literal["bpe", "char", "word"] | None = None  # type: ignore[assignment]
    """word: one token a word that occurs twice or more, in lower case. bpe, char: as for causal-lm."""


class TextClassificationOptions(TaskOptions):
    """How labelled texts become rows."""

    text_column: Text = "text"
    """The column that holds the text."""
    pair_column: Text | None = None
    """The column that holds the second text, where pairs are classified."""
    label_column: Text = "label"
    """The column that holds the label."""
    max_length: int | None = Field(None, ge=2, le=2**22)
    """Tokens of the longest text, or pair; what is longer is cut, and counted in the log. Left out: 128, or what the
    classifier that the job starts from was trained with."""
    tokenizer: ClassifierTokenizerOptions = ClassifierTokenizerOptions()

    @model_validator(mode="after")
    def _columns_differ(self) -> TextClassificationOptions:
        return check_columns(self, "text_column", "pair_column", "label_column")


@dataclass(frozen=True)
class ClassFindings:
    """What labelled texts say, out of one chunk or many."""

    labels: frozenset[str]
    texts: TextFindings | None
    kinds: frozenset[str] = frozenset()
    """What the labels are, in words: text, numbers."""

    def merged(self, later: ClassFindings) -> ClassFindings:
        """Return the findings of both chunks."""
        texts = self.texts.merged(later.texts) if self.texts and later.texts else None
        return ClassFindings(self.labels | later.labels, texts, self.kinds | later.kinds)


class TextClassification(Task):
    """Any encoder of transformers that classifies sequences (bert, roberta, modernbert, …), or `ngram`, ours."""

    name: ClassVar[str] = "text-classification"
    Options: ClassVar[type[TaskOptions]] = TextClassificationOptions
    unit: ClassVar[str] = "texts"
    metrics: ClassVar[Mapping[str, Better]] = {
        "loss": "min",
        "accuracy": "max",
        "macro_f1": "max",
        "calibration_error": "min",
    }
    learned_files: ClassVar[tuple[str, ...]] = (LABELS_FILE, *tokenization.FILES)
    counted: ClassVar[Mapping[str, str]] = {
        "cut": "texts are longer than task.max_length and were cut",
        "special": "texts have special tokens written into them, which become these tokens",
    }
    version: ClassVar[int] = 2

    options: TextClassificationOptions

    def __init__(self, options: TaskOptions | Mapping[str, Any] | None = None) -> None:
        super().__init__(options)
        self.labels: list[str] = []
        self.tokenizer: Any = None
        self.max_length = self.options.max_length or MAX_LENGTH
        self.pairs = self.options.pair_column is not None

    # -- data -------------------------------------------------------------------------------------------------------

    @classmethod
    def check_options(cls, options: TaskOptions, starts_from: str | None) -> None:
        """Refuse to train a tokenizer for weights that were learned with another."""
        tokenization.check_origin(options, starts_from)

    def check(self, example: Mapping[str, Any]) -> None:
        """Raise TaskError for an example without a text, its second text or a label."""
        self._texts(example)
        self._label(example)

    def content(self, example: Mapping[str, Any]) -> Any:
        """Return the text, or both, whatever the label."""
        return self._texts(example)

    def unused(self, example: Mapping[str, Any]) -> list[str]:
        """Return the columns that are neither a text nor the label."""
        read = {self.options.text_column, self.options.pair_column, self.options.label_column}
        return [key for key, value in example.items() if key not in read and not is_nothing(value)]

    def observe(self, examples: Sequence[Mapping[str, Any]]) -> ClassFindings:
        """Note the labels, and draw a share of the sample that a tokenizer is trained on."""
        texts = [text for example in examples for text in self._texts(example)]
        labels = frozenset(self._label(example) for example in examples)
        kinds = frozenset(kind_of(example[self.options.label_column]) for example in examples)
        return ClassFindings(labels, tokenization.observe(self.options.tokenizer, texts), kinds)

    def fit(self, findings: ClassFindings) -> list[str]:
        """Learn the labels, and the tokenizer unless a parent's is kept."""
        said: list[str] = []
        self.labels = sorted(findings.labels, key=natural)
        if len(self.labels) < 2:
            raise TaskError(f"the training texts have {len(self.labels)} label(s) {self.labels}; it takes two")
        if self.tokenizer is None:
            self.tokenizer, said = tokenization.obtain(self.options.tokenizer, findings.texts)
            if self.options.tokenizer.source is None:
                _begin_with_a_mark(self.tokenizer)
        return [*said, *said_of(self.labels, findings.kinds)]

    def inherit(self, parent: Path | str) -> bool:
        """Keep the parent's tokenizer, unless another is named; of a classifier of ours, labels and length too.

        Raises:
            TaskError: it classifies pairs and the options name no second column, or the other way round.
        """
        if self.options.tokenizer.is_given:
            return False
        self.tokenizer = tokenization.load(parent)
        if not (Path(parent) / LABELS_FILE).is_file():
            return False
        learned = _read(Path(parent))
        if learned["pairs"] != self.pairs:
            kind, way = ("pairs of texts", "name") if learned["pairs"] else ("single texts", "leave out")
            raise TaskError(f"the model that the job starts from classifies {kind}: {way} task.pair_column")
        self.labels, self.max_length = learned["labels"], self.options.max_length or learned["max_length"]
        return True

    def save(self, directory: Path) -> None:
        """Write the tokenizer, and text_classification.json: labels, length, whether pairs are classified."""
        self.tokenizer.save_pretrained(directory)
        learned = {"labels": self.labels, "max_length": self.max_length, "pairs": self.pairs}
        (directory / LABELS_FILE).write_text(json.dumps(learned, indent=2), encoding="utf-8")

    @classmethod
    def load(cls, directory: Path, options: TaskOptions | Mapping[str, Any] | None = None) -> TextClassification:
        """Read what `save` wrote: texts are cut as they were in training."""
        task = cls(options)
        task.tokenizer = tokenization.load(directory)
        vars(task).update(_read(Path(directory)))
        return task

    def encode(self, examples: Sequence[Mapping[str, Any]]) -> Columns:
        """Tokenise, cut at max_length (L), look labels up: what `collate` takes, and targets (B,), all 1."""
        index = {label: i for i, label in enumerate(self.labels)}
        labels = [self._label(example) for example in examples]
        if (wrong := unknown_of(labels, self.labels)) is not None:
            raise TaskError(wrong)
        texts = [self._texts(example) for example in examples]
        columns, written = self._tokenise(texts), special_texts(self.tokenizer)
        columns["special"] = np.array([any(map(written.search, each)) for each in texts], dtype=np.int32)
        columns["label"] = np.array([index[label] for label in labels], dtype=np.int32)
        return {**columns, "targets": np.ones(len(labels), dtype=np.int32)}

    def collate(self, rows: Columns) -> Batch:
        """Return input_ids and attention_mask (B, S) int64, S that of the longest, and labels (B,) int64.

        Args:
            rows: input_ids (B, L) and length (B,), perhaps label (B,) and token_type_ids (B, L); all int32.
        """
        import torch

        length = torch.from_numpy(rows["length"].astype(np.int64))
        longest = int(length.max())
        kept: Columns = {key: rows[key][:, :longest] for key in ("input_ids", "token_type_ids") if key in rows}
        batch: Batch = {key: torch.from_numpy(column.astype(np.int64)) for key, column in kept.items()}
        batch["attention_mask"] = (torch.arange(longest) < length[:, None]).long()
        if "label" in rows:
            batch["labels"] = torch.from_numpy(rows["label"].astype(np.int64))
        return batch

    # -- model ------------------------------------------------------------------------------------------------------

    def check_model(self, architecture: str, config: Mapping[str, Any]) -> None:
        """Raise TaskError for an unknown architecture or an entry that its config has not."""
        from jobs.tasks import text_encoder

        text_encoder.check(architecture, config)

    def check_parent(self, directory: Path, config: Mapping[str, Any]) -> None:
        """Raise TaskError for a model that classifies no texts, or has no place for an entry of `config`."""
        from jobs.tasks import text_encoder

        text_encoder.check_parent(directory, config)

    def build(self, architecture: str, config: Mapping[str, Any]) -> torch.nn.Module:
        """Make `ngram` (ours) or an encoder of transformers, in fp32."""
        from jobs.tasks import text_encoder

        return text_encoder.build(architecture, config, self.tokenizer, self.labels, self.max_length)

    def load_model(
        self, directory: Path, dtype: torch.dtype | None = None, config: Mapping[str, Any] | None = None
    ) -> torch.nn.Module:
        """Load a model directory or a hub id, in evaluation mode; an encoder without a head gets a random one."""
        from jobs.tasks import text_encoder

        settings = {**text_encoder.named(self.labels), **(config or {})}
        of_ours = (Path(directory) / LABELS_FILE).is_file()
        model, self.said = text_encoder.load(directory, dtype, settings, may_lack_head=not of_ours)
        text_encoder.check_fits(model.config, self.tokenizer, self.max_length)
        self.said = [*self.said, *text_encoder.pad_as(model, self.tokenizer)]
        return model

    # -- learning ---------------------------------------------------------------------------------------------------

    def loss(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum the cross-entropy over the texts: () fp32 nats, and their number () int64.

        Args:
            batch: as `collate` makes it: input_ids and attention_mask (B, S), labels (B,), all int64.
        """
        import torch

        labels = batch["labels"]
        total = torch.nn.functional.cross_entropy(self._logits(model, batch), labels, reduction="sum")
        return total, torch.tensor(len(labels), device=labels.device)

    def measure(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """Sum loss and targets (), confusion (C, C) and bins of confidence (3, 15)."""
        import torch

        logits, labels = self._logits(model, batch), batch["labels"]
        return {
            "loss": torch.nn.functional.cross_entropy(logits, labels, reduction="sum"),
            "targets": torch.tensor(len(labels), device=labels.device),
            **scores.sums(logits, labels),
        }

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return loss (nats per text), accuracy, macro F1 and calibration error (jobs/tasks/scores.py)."""
        counts, count = scores.confusion(sums), max(sums["targets"], 1)
        return {
            "loss": sums["loss"] / count,
            "accuracy": float(counts.trace()) / count,
            "macro_f1": scores.macro_f1(counts),
            "calibration_error": scores.calibration_error(scores.array(sums, "bins").reshape(3, -1)),
        }

    def figures(self, sums: Mapping[str, float]) -> dict[str, bytes]:
        """Draw the confusion matrix."""
        if len(self.labels) > scores.DRAWN:
            return {}
        return {"confusion.png": scores.picture(scores.confusion(sums), self.labels)}

    # -- use --------------------------------------------------------------------------------------------------------

    def predict(self, model: torch.nn.Module, instances: Sequence[Any]) -> list[dict[str, Any]]:
        """Classify texts (str or UTF-8 bytes), or pairs of them as `{"text": …, "pair": …}`.

        One of more than `max_length` tokens is classified by those at its beginning, and `truncated` says so.
        """
        import torch

        texts = [tuple(map(_decoded, self._given(instance))) for instance in instances]
        columns = self._tokenise(texts)
        cut = columns.pop("cut")
        with torch.inference_mode():
            rows = self._logits(model, self.collate(columns)).softmax(-1).tolist()
        best = [max(range(len(row)), key=row.__getitem__) for row in rows]
        return [
            {
                "label": self.labels[b],
                "score": row[b],
                "scores": dict(zip(self.labels, row, strict=True)),
                "truncated": bool(of),
            }
            for b, row, of in zip(best, rows, cut, strict=True)
        ]

    def inputs(self) -> list[dict[str, Any]]:
        """Describe the text, and the second one of a pair, with how many tokens are read."""
        names = ["text", "pair"] if self.pairs else ["text"]
        tensor = {"datatype": "BYTES", "shape": [-1], "parameters": {"max_tokens": self.max_length}}
        return [{"name": name, **tensor} for name in names]

    def outputs(self) -> list[dict[str, Any]]:
        """Describe label, score and scores, and whether the text was cut."""
        if self.answers_otherwise(TextClassification):
            return []
        return [*classified(self.labels), {"name": "truncated", "datatype": "BOOL", "shape": [-1]}]

    # -- inside -----------------------------------------------------------------------------------------------------

    def _given(self, instance: Any) -> tuple[Any, ...]:
        if self.pairs != isinstance(instance, Mapping):
            raise TaskError(f"this model classifies {'pairs of texts' if self.pairs else 'single texts'}")
        return (instance["text"], instance["pair"]) if self.pairs else (instance,)

    def _texts(self, example: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(
            _filled(column_of(example, name, "text_column"), f"column {name!r}") for name in self._text_columns()
        )

    def _text_columns(self) -> list[str]:
        return [name for name in (self.options.text_column, self.options.pair_column) if name is not None]

    def _label(self, example: Mapping[str, Any]) -> str:
        return label_of(example, self.options.label_column)

    def _tokenise(self, texts: Sequence[tuple[str, ...]]) -> Columns:
        """Return input_ids (N, L) and length (N,), for pairs token_type_ids (N, L), int32; `cut` (N,) counts."""
        apart = [list(column) for column in zip(*texts, strict=True)]
        whole = self.tokenizer(*apart, verbose=False, return_attention_mask=False)
        lengths = np.array([len(ids) for ids in whole["input_ids"]], dtype=np.int32)
        if (lengths > self.max_length).any():
            whole = self.tokenizer(*apart, truncation=True, max_length=self.max_length, return_attention_mask=False)
        rows = {"input_ids": np.full((len(texts), self.max_length), self.tokenizer.pad_token_id, dtype=np.int32)}
        if self.pairs and "token_type_ids" in whole:
            rows["token_type_ids"] = np.zeros_like(rows["input_ids"])
        for key, column in rows.items():
            for row, values in zip(column, whole[key], strict=True):
                row[: len(values)] = values
        cut = (lengths > self.max_length).astype(np.int32)
        return {**rows, "length": np.minimum(lengths, self.max_length), "cut": cut}

    def _logits(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Return logits (B, labels) in fp32."""
        device = next(model.parameters()).device
        inputs = {key: value.to(device) for key, value in batch.items() if key != "labels"}
        return model(**inputs).logits.float()


def _begin_with_a_mark(tokenizer: Any) -> None:
    """Let a tokenizer of our own put a mark before each text: what encoders pool, and what the first word follows."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{END_OF_TEXT} $A",
        pair=f"{END_OF_TEXT} $A {END_OF_TEXT}:1 $B:1",
        special_tokens=[(END_OF_TEXT, tokenizer.convert_tokens_to_ids(END_OF_TEXT))],
    )


def _read(directory: Path) -> dict[str, Any]:
    try:
        learned = json.loads((directory / LABELS_FILE).read_text(encoding="utf-8"))
        return {key: learned[key] for key in ("labels", "max_length", "pairs")}
    except (OSError, KeyError, ValueError) as error:
        raise TaskError(f"{directory} holds no text classifier of Tandem: {LABELS_FILE}: {error}") from error


def _decoded(text: Any) -> str:
    try:
        return _filled(text.decode("utf-8") if isinstance(text, bytes) else text, "an input")
    except UnicodeDecodeError as error:
        raise TaskError(f"the text is not UTF-8: {error}") from error


def _filled(text: Any, where: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise TaskError(f"{where} holds {text!r:.60}, not a text")
    return text
