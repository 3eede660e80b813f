"""Task `text-classification`: one label per text or pair of texts, with a transformers encoder or a small one of ours.

Rows (int32, L = max_length): input_ids (N, L), length (N,), label (N,), targets (N,) all ones; for pairs, where the
tokenizer makes them, token_type_ids (N, L), 1 in the second text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from cluster.strict import Text
from jobs.tasks import Batch, Better, Columns, TaskError, TaskOptions, scores, text_rows, tokenization
from jobs.tasks.chat_template import special_texts
from jobs.tasks.classification import Classifier
from jobs.tasks.labels import check_columns, classified, column_of, kind_of
from jobs.tasks.messages import is_nothing
from jobs.tasks.text_rows import ClassFindings
from jobs.tasks.tokenization import TokenizerOptions

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


class TextClassification(Classifier):
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
        "unknown": "texts hold nothing that the tokenizer knows, and are all alike to the model",
        "special": "texts have special tokens written into them, which become these tokens",
    }
    version: ClassVar[int] = 2

    options: TextClassificationOptions

    def __init__(self, options: TaskOptions | Mapping[str, Any] | None = None) -> None:
        super().__init__(options)
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
        drawn = tokenization.observe(self.options.tokenizer, texts, self.expected_bytes)
        return ClassFindings(labels, drawn, kinds)

    def fit(self, findings: ClassFindings) -> list[str]:
        """Learn the labels, and the tokenizer unless a parent's is kept."""
        said: list[str] = []
        of_labels = self._learn_labels(findings.labels, findings.kinds)
        if self.tokenizer is None:
            self.tokenizer, said = tokenization.obtain(self.options.tokenizer, findings.texts)
            if self.options.tokenizer.source is None:
                text_rows.begin_with_a_mark(self.tokenizer)
        return [*said, *of_labels]

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
        numbers = self._numbers(examples)
        texts = [self._texts(example) for example in examples]
        columns, written = text_rows.tokenise(self.tokenizer, texts, self.max_length), special_texts(self.tokenizer)
        columns["special"] = np.array([any(map(written.search, each)) for each in texts], dtype=np.int32)
        columns["unknown"] = text_rows.unknown(self.tokenizer, columns)
        return {**columns, "label": numbers, "targets": np.ones(len(numbers), dtype=np.int32)}

    def collate(self, rows: Columns) -> Batch:
        """Return input_ids and attention_mask (B, S) int64, S that of the longest, and labels (B,) int64.

        Args:
            rows: input_ids (B, L) and length (B,), perhaps label (B,) and token_type_ids (B, L); all int32.
        """
        return text_rows.batch_of(rows)

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

    def _guesses(self, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Sum confusion (C, C) and bins of confidence (3, 15)."""
        return scores.sums(logits, labels)

    # -- use --------------------------------------------------------------------------------------------------------

    def instance(self, example: Mapping[str, Any]) -> str | dict[str, str]:
        """Return an example's text, or both of a pair."""
        texts = self._texts(example)
        return {"text": texts[0], "pair": texts[1]} if self.pairs else texts[0]

    def predict(self, model: torch.nn.Module, instances: Sequence[Any]) -> list[dict[str, Any]]:
        """Classify texts (str or UTF-8 bytes), or pairs of them as `{"text": …, "pair": …}`.

        One of more than `max_length` tokens is classified by those at its beginning, and `truncated` says so.
        """
        import torch

        texts = [tuple(map(text_rows.decoded, self._given(instance))) for instance in instances]
        columns = text_rows.tokenise(self.tokenizer, texts, self.max_length)
        cut = columns.pop("cut")
        with torch.inference_mode():
            answers = self._answers(self._logits(model, self.collate(columns)))
        return [{**answer, "truncated": bool(of)} for answer, of in zip(answers, cut, strict=True)]

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

    @classmethod
    def embeds(cls, config: Mapping[str, Any]) -> bool:
        """Return whether the model has a state for each token: `ngram` has none, and two stacks have them apart."""
        return config.get("model_type", "ngram") != "ngram" and not config.get("is_encoder_decoder")

    def embed(self, model: torch.nn.Module, texts: Sequence[Sequence[int]]) -> np.ndarray:
        """Return the mean of the last hidden states of each text's tokens: (N, H) float32, of Euclidean length 1.

        Raises:
            TaskError: the model does not tell a state for each token.
        """
        from jobs.tasks import text_encoder

        length = np.array(list(map(len, texts)), dtype=np.int32)
        ids = np.full((len(texts), int(length.max())), self.tokenizer.pad_token_id, dtype=np.int32)
        for row, text in zip(ids, texts, strict=True):
            row[: len(text)] = text
        vectors: np.ndarray = text_encoder.vectors(model, self.collate({"input_ids": ids, "length": length})).numpy()
        return vectors

    # -- inside -----------------------------------------------------------------------------------------------------

    def _given(self, instance: Any) -> tuple[Any, ...]:
        if self.pairs != isinstance(instance, Mapping):
            raise TaskError(f"this model classifies {'pairs of texts' if self.pairs else 'single texts'}")
        return (instance["text"], instance["pair"]) if self.pairs else (instance,)

    def _texts(self, example: Mapping[str, Any]) -> tuple[str, ...]:
        columns = [name for name in (self.options.text_column, self.options.pair_column) if name is not None]
        held = ((name, column_of(example, name, "text_column")) for name in columns)
        return tuple(text_rows.filled(text, f"column {name!r}") for name, text in held)

    def _logits(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Return logits (B, labels) in fp32."""
        device = next(model.parameters()).device
        inputs = {key: value.to(device) for key, value in batch.items() if key != "labels"}
        return model(**inputs).logits.float()


def _read(directory: Path) -> dict[str, Any]:
    try:
        learned = json.loads((directory / LABELS_FILE).read_text(encoding="utf-8"))
        return {key: learned[key] for key in ("labels", "max_length", "pairs")}
    except (OSError, KeyError, ValueError) as error:
        raise TaskError(f"{directory} holds no text classifier of Tandem: {LABELS_FILE}: {error}") from error
