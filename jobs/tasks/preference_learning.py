"""What objectives that learn preferences do with rows of pairs: their loss, their sums, and what they compare with."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jobs.tasks import Batch, Columns, TaskError, balance, preference_loss, preference_rows
from jobs.tasks.preference_loss import REFERRING, Answers, Objective

if TYPE_CHECKING:
    import torch

BETA = 0.1
"""Where task.beta is left out: the value of most published DPO runs."""


@dataclass(frozen=True)
class PreferenceLearning:
    """One objective, with its strength."""

    objective: Objective
    beta: float
    chosen_weight: float
    unit: str = "pairs"

    @property
    def refers(self) -> bool:
        """Return whether it compares with a reference."""
        return self.objective in REFERRING

    def remarks(self, config: Any) -> list[str]:
        """Return what is to be said of how a model is trained; raise TaskError for a loss that is not added here."""
        if config is not None and balance.is_wanted(config):
            raise TaskError(
                f"model.config: output_router_logits asks for a balancing loss, which objective {self.objective} does "
                "not add: set it to false"
            )
        return [
            "each answer is a row of its own behind its prompt, padded to the longest of its batch: a step runs "
            "2 × training.global_batch_size texts"
        ]

    def loss(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss summed over the pairs, () fp32, and their number, () int64.

        Args:
            batch: input_ids and labels (B, 2, T) int64; reference (B, 2) fp32 where the objective refers to one.
        """
        answers = self._answers(model, batch)
        losses, _ = self._compared(answers)
        return losses.sum(), answers.lengths.new_full((), len(losses))  # new_tensor would wait for a GPU

    def measure(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """Return scalars () that add up, as `preference_loss.sums`.

        Args:
            batch: as `loss` takes it.
        """
        answers = self._answers(model, batch)
        return preference_loss.sums(*self._compared(answers), answers)

    def reference(self, model: torch.nn.Module, rows: Columns) -> Columns:
        """Return `reference` (B, 2) float32 of B rows: the log-probability of both answers by a model, in nats.

        Args:
            model: in evaluation mode.
            rows: input_ids and labels (B, 2, W) int32.
        """
        device = next(model.parameters()).device
        batch = {name: value.to(device) for name, value in preference_rows.collate(rows).items()}
        return {"reference": self._answers(model, batch).policy.detach().cpu().numpy()}

    def _compared(self, answers: Answers) -> tuple[torch.Tensor, torch.Tensor]:
        """Return losses and margins (B,)."""
        losses, margins = preference_loss.compared(self.objective, self.beta, answers)
        if self.chosen_weight:
            losses = losses - self.chosen_weight * answers.policy[:, 0] / answers.lengths[:, 0]
        return losses, margins

    def _answers(self, model: torch.nn.Module, batch: Batch) -> Answers:
        labels = batch["labels"].flatten(0, 1)
        logits = model(input_ids=batch["input_ids"].flatten(0, 1), use_cache=False).logits
        found, lengths = preference_loss.log_probabilities(logits, labels)
        return Answers(found.unflatten(0, (-1, 2)), lengths.unflatten(0, (-1, 2)), batch.get("reference"))


def of(options: Any) -> PreferenceLearning | None:
    """Return what a task's options ask for; None where they ask for no preferences."""
    if options.objective == "likelihood":
        return None
    beta = BETA if options.beta is None else options.beta
    return PreferenceLearning(options.objective, beta, options.chosen_weight)


def metrics(objective: str) -> Set[str]:
    """Return the names of what is measured."""
    changes = {"chosen_change", "rejected_change"}
    return preference_loss.METRICS.keys() - (set() if objective in REFERRING else changes)


def check_origin(objective: str, starts_from: str | None) -> None:
    """Refuse to compare with the model that a job starts from where there is none.

    Raises:
        TaskError: fresh weights say nothing of answers.
    """
    if objective in REFERRING and starts_from is None:
        raise TaskError(
            f"task.objective {objective} compares with the model that the job starts from, and this one starts from "
            "random weights: give model.from, a model that was fine-tuned on such answers, or choose orpo"
        )
