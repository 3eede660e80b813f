"""Task `seq2seq`: one text for another (translation, summaries), with any encoder-decoder of transformers.

Rows (int32, Ls = max_source_length, Lt = max_target_length): source (N, Ls), source_length (N,), target (N, Lt),
targets (N,), the number of its tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from jobs.tasks import IGNORED, Batch, Better, TaskError, TaskOptions, TaskSetupError, pair_tokens, tokenization
from jobs.tasks.pair_rows import PairRows

if TYPE_CHECKING:
    import torch


class Seq2Seq(PairRows):
    """Any transformers encoder-decoder for texts: t5, marian, bart, pegasus, …"""

    name: ClassVar[str] = "seq2seq"
    generates: ClassVar[bool] = True
    unit: ClassVar[str] = "tokens"
    metrics: ClassVar[Mapping[str, Better]] = {
        "loss": "min",
        "perplexity": "min",
        "accuracy": "max",
        "bleu": "max",
        "chrf": "max",
    }

    def __init__(self, options: TaskOptions | Mapping[str, Any] | None = None) -> None:
        super().__init__(options)
        self._start: int | None = None

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
        return [*said * (share < 1), *smoothed * (smoothing > 0 and model.training), *seq2seq_models.not_greedy(model)]

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
