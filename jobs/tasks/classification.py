"""What the tasks that classify share: labels, loss, what is measured, the form of an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from jobs.tasks import Batch, Better, Task, TaskError, TaskOptions
from jobs.tasks.finite import finite
from jobs.tasks.labels import label_of, natural, said_of, unknown_of

if TYPE_CHECKING:
    import torch


class Classifier(Task):
    """One label per example. What derives from it reads examples, and says what a model makes of a batch."""

    metrics: ClassVar[Mapping[str, Better]] = {"loss": "min", "accuracy": "max"}

    def __init__(self, options: TaskOptions | Mapping[str, Any] | None = None) -> None:
        super().__init__(options)
        self.labels: list[str] = []

    # -- labels -----------------------------------------------------------------------------------------------------

    def answer(self, example: Mapping[str, Any]) -> str:
        """Return the label."""
        return self._label(example)

    def _label(self, example: Mapping[str, Any]) -> str:
        return label_of(example, self.options.label_column)

    def _learn_labels(self, labels: Set[str], kinds: Set[str]) -> list[str]:
        """Number the labels of the training examples; return what is to be said of them.

        Raises:
            TaskError: there are fewer than two.
        """
        self.labels = sorted(labels, key=natural)
        if len(self.labels) < 2:
            raise TaskError(
                f"the training {self.unit} have {len(self.labels)} label(s) {self.labels}; a classifier needs two"
            )
        return said_of(self.labels, kinds)

    def _numbers(self, examples: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Return the numbers of the examples' labels, int32 (N,).

        Raises:
            TaskError: one is not among those that were learned.
        """
        index = {label: i for i, label in enumerate(self.labels)}
        labels = [self._label(example) for example in examples]
        if (wrong := unknown_of(labels, self.labels)) is not None:
            raise TaskError(wrong)
        return np.array([index[label] for label in labels], dtype=np.int32)

    # -- learning ---------------------------------------------------------------------------------------------------

    def loss(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum the cross-entropy over the examples: () fp32 nats, and their number () int64.

        Args:
            batch: as `collate` makes it, with labels (B,) int64.
        """
        import torch

        labels = batch["labels"]
        total = torch.nn.functional.cross_entropy(self._logits(model, batch), labels, reduction="sum")
        return total, torch.full((), len(labels), device=labels.device)

    def measure(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """Sum loss and targets, two scalars (), and what `_guesses` says."""
        import torch

        logits, labels = self._logits(model, batch), batch["labels"]
        return {
            "loss": torch.nn.functional.cross_entropy(logits, labels, reduction="sum"),
            "targets": torch.full((), len(labels), device=labels.device),
            **self._guesses(logits, labels),
        }

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return loss (nats per example) and accuracy."""
        count = max(sums["targets"], 1)
        return {"loss": sums["loss"] / count, "accuracy": sums["correct"] / count}

    def _guesses(self, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Sum what is measured of logits (B, C) fp32 against labels (B,) int64: correct first guesses, ()."""
        return {"correct": (logits.argmax(-1) == labels).sum()}

    def _logits(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Return logits (B, C) in fp32, C the number of labels."""
        raise NotImplementedError

    # -- use --------------------------------------------------------------------------------------------------------

    def _answers(self, logits: torch.Tensor) -> list[dict[str, Any]]:
        """Return of logits (B, C) fp32 the best label, its score and the scores of all, for each of B.

        Raises:
            TaskError: a logit is not finite.
        """
        answers = []
        for row in finite(logits).softmax(-1).tolist():
            best = max(range(len(row)), key=row.__getitem__)
            scores = dict(zip(self.labels, row, strict=True))
            answers.append({"label": self.labels[best], "score": row[best], "scores": scores})
        return answers
