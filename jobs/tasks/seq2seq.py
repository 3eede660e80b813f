"""Task `seq2seq`: one text for another (translation, summaries), with any encoder-decoder of transformers.

Rows (int32, Ls = max_source_length, Lt = max_target_length): source (N, Ls), source_length (N,), target (N, Lt),
targets (N,), the number of its tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from jobs.tasks import (
    IGNORED,
    Batch,
    Better,
    Columns,
    Task,
    TaskError,
    TaskOptions,
    TaskSetupError,
    pair_tokens,
    tokenization,
)
from jobs.tasks.labels import chosen, column_of
from jobs.tasks.messages import is_nothing, text_of
from jobs.tasks.pair_options import Seq2SeqOptions
from jobs.tasks.text_rows import filled
from jobs.tasks.tokenization import TextFindings

if TYPE_CHECKING:
    import torch

PAIRS_FILE = "seq2seq.json"
MAX_LENGTH = 128


class Seq2Seq(Task):
    """Any transformers encoder-decoder for texts: t5, marian, bart, pegasus, …"""

    name: ClassVar[str] = "seq2seq"
    Options: ClassVar[type[TaskOptions]] = Seq2SeqOptions
    generates: ClassVar[bool] = True
    unit: ClassVar[str] = "tokens"
    metrics: ClassVar[Mapping[str, Better]] = {
        "loss": "min",
        "perplexity": "min",
        "accuracy": "max",
        "bleu": "max",
        "chrf": "max",
    }
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
        self._start: int | None = None
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
        return tokenization.observe(self.options.tokenizer, [text for each in examples for text in self._pair(each)])

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
    def load(cls, directory: Path, options: TaskOptions | Mapping[str, Any] | None = None) -> Seq2Seq:
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

    # -- model ------------------------------------------------------------------------------------------------------

    def check_model(self, architecture: str, config: Mapping[str, Any]) -> None:
        """Raise TaskError for an unknown architecture, an entry that its config has not, or what makes no model."""
        from jobs.tasks import seq2seq_models

        seq2seq_models.check(architecture, config)

    def check_parent(self, directory: Path, config: Mapping[str, Any]) -> None:
        """Raise TaskError for a model that is no encoder-decoder, or has no place for an entry of `config`."""
        from jobs.tasks import seq2seq_models

        seq2seq_models.check_parent(directory, config)

    def build(self, architecture: str, config: Mapping[str, Any]) -> torch.nn.Module:
        """Make an encoder-decoder with fresh weights, in fp32."""
        from jobs.tasks import seq2seq_models

        longest = max(self.max_source_length, self.max_target_length)
        return self._ready(seq2seq_models.build(architecture, config, self.tokenizer, longest))

    def load_model(
        self, directory: Path, dtype: torch.dtype | None = None, config: Mapping[str, Any] | None = None
    ) -> torch.nn.Module:
        """Load a model directory (also one quantised by torchao) or a hub id, in evaluation mode."""
        from jobs.tasks import generation, seq2seq_models

        model, self.said = seq2seq_models.load(directory, dtype, config or {})
        longest = max(self.max_source_length, self.max_target_length) if self._for_data else None
        seq2seq_models.check_fits(model.config, self.tokenizer, longest)
        if self.options.tokenizer.is_given:
            before = tokenization.of_model(directory)
            self.said = [*self.said, *generation.renumbered(model, before, self.tokenizer)]
        return self._ready(model)

    def prepare_model(self, model: torch.nn.Module, columns: Set[str]) -> list[str]:
        """Note the token that its decoder begins with; say what BLEU and chrF are of, and what the loss has in it."""
        from jobs.tasks import seq2seq_models

        self._start = seq2seq_models.start_token(model, self.tokenizer)
        share, smoothing = self.options.decode_share, self.options.label_smoothing
        said = [f"bleu and chrf are of the first {share:.0%} of each batch of held-out rows (task.decode_share)"]
        smoothed = [f"the training loss has label smoothing of {smoothing:g} in it, that of held-out rows has none"]
        return [*said * (share < 1), *smoothed * (smoothing > 0 and model.training)]

    # -- learning ---------------------------------------------------------------------------------------------------

    def loss(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum the cross-entropy over the targets, smoothed in training: () fp32 nats, and their number () int64.

        Args:
            batch: as `collate` makes it: input_ids and attention_mask (B, S), labels (B, T), int64.
        """
        parts = pair_tokens.of_like_length(batch, self.options.length_groups)
        total = sum(self._loss(model, part) * weight for part, weight in parts)
        return cast("torch.Tensor", total), (batch["labels"] != IGNORED).sum()

    def measure(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """Sum loss, targets and correct first guesses, (); and what BLEU (10,) and chrF (18,) are made of.

        The references are what the tokenizer makes of the labels.
        """
        from jobs.tasks import translation_scores
        from jobs.tasks.cross_entropy import cross_entropy_sum

        labels = batch["labels"]
        logits, counted = self._forward(model, batch).logits, labels != IGNORED
        decoded = math.ceil(self.options.decode_share * len(labels))
        references = [row[row != IGNORED].tolist() for row in labels[:decoded].cpu()]
        guesses = self._translated(model, batch["input_ids"][:decoded], batch["attention_mask"][:decoded])
        return {
            "loss": cross_entropy_sum(logits, labels),
            "targets": counted.sum(),
            "correct": (logits[counted].argmax(-1) == labels[counted]).sum(),
            **translation_scores.counts(self._texts(guesses), self._texts(references)),
        }

    def summarise(self, sums: Mapping[str, Any]) -> dict[str, float]:
        """Return loss (nats per token), perplexity, accuracy (of tokens), BLEU and chrF (0 to 100)."""
        from jobs.tasks import translation_scores

        count = max(sums["targets"], 1)
        loss = sums["loss"] / count
        shares = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "accuracy": sums["correct"] / count}
        return {**shares, **translation_scores.of(sums)}

    # -- use --------------------------------------------------------------------------------------------------------

    def instance(self, example: Mapping[str, Any]) -> str:
        """Return the source of an example.

        Raises:
            TaskSetupError: options ask for what the engine, which reads the model's own, would not honour.
        """
        if self._changed:
            raise TaskSetupError(
                f"task.{self._changed[0]} is another than the model was trained with, and predictions are made as it "
                "was trained: leave it out"
            )
        return self._source(example)

    def predict(self, model: torch.nn.Module, instances: Sequence[Any]) -> list[dict[str, Any]]:
        """Refuse: an engine generates for this task."""
        raise TaskError("seq2seq generates; serve it with the engine `seq2seq`, not with `predict`")

    def inputs(self) -> list[dict[str, Any]]:
        """Describe the source, with how many tokens are read."""
        parameters = {"max_tokens": self.max_source_length}
        return [{"name": "text", "datatype": "BYTES", "shape": [-1], "parameters": parameters}]

    def outputs(self) -> list[dict[str, Any]]:
        """Describe the translation."""
        return [{"name": "text", "datatype": "BYTES", "shape": [-1]}]

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

    def _ready(self, model: Any) -> Any:
        from jobs.tasks import seq2seq_models

        model.generation_config = seq2seq_models.generation(model, self.tokenizer, self.max_target_length)
        self._start = seq2seq_models.start_token(model, self.tokenizer)
        return model

    def _loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        import torch

        from jobs.tasks.cross_entropy import cross_entropy_sum

        labels, smoothing = batch["labels"], self.options.label_smoothing * model.training
        logits = self._forward(model, batch).logits
        if not smoothing:
            return cross_entropy_sum(logits, labels)
        learned = labels != IGNORED
        options = {"reduction": "sum", "label_smoothing": smoothing}
        return torch.nn.functional.cross_entropy(logits[learned].float(), labels[learned], **options)

    def _forward(self, model: torch.nn.Module, batch: Batch) -> Any:
        """Return the model's output; its logits (B, T, V) are in the model's own type."""
        from jobs.tasks.seq2seq_models import shifted

        assert self._start is not None, "the model was built, loaded or prepared by this task"
        read = {key: batch[key] for key in ("input_ids", "attention_mask")}
        decoded = shifted(batch["labels"], self._start, self.tokenizer.pad_token_id, IGNORED)
        return model(**read, decoder_input_ids=decoded, use_cache=False)

    def _translated(self, model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> list[list[int]]:
        from jobs.tasks import greedy, seq2seq_models

        whole = getattr(model, "module", model)
        assert self._start is not None
        ends = seq2seq_models.end_tokens(whole, self.tokenizer)
        return greedy.decode(whole, input_ids, attention_mask, self._start, ends, self.max_target_length)

    def _texts(self, ids: Sequence[Sequence[int]]) -> list[str]:
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        texts: list[str] = self.tokenizer.batch_decode(list(ids), **options)
        return texts


def _read(directory: Path) -> dict[str, Any]:
    try:
        learned = json.loads((directory / PAIRS_FILE).read_text(encoding="utf-8"))
        return {key: learned[key] for key in ("prefix", "max_source_length", "max_target_length")}
    except (OSError, KeyError, ValueError) as error:
        raise TaskError(f"{directory} holds no seq2seq model of Tandem: {PAIRS_FILE}: {error}") from error
