"""What ranks the items that may come next: losses, metrics, scores. What derives from it reads data and answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from jobs.tasks import Batch, Better, TaskOptions, ranking
from jobs.tasks.own_networks import OwnNetworks

if TYPE_CHECKING:
    import torch

FIRST = 10
"""The k of HR@k and NDCG@k."""


class NextItem(OwnNetworks):
    """Scores all items as what follows a history of items, numbered from 1."""

    metrics: ClassVar[Mapping[str, Better]] = {
        "loss": "min",
        **{f"{kind}_{FIRST}{all_}": "max" for all_ in ("", "_all") for kind in ("hr", "ndcg")},
    }
    """Those of popularity are measured beside them, and are none to choose a model by."""

    def __init__(self, options: TaskOptions | Mapping[str, Any] | None = None) -> None:
        super().__init__(options)
        self.items: list[str] = []
        self.counts: list[int] = []
        """How often each item occurs in the training data."""
        self.softmax: str = "full"
        """What the loss compares with: all items, or those in the same micro-batch."""
        self.max_length = 0
        """The latest so many items of a history are read."""
        self._numbers: tuple[list[str], dict[str, int]] = ([], {})

    def numbers(self) -> dict[str, int]:
        """Return each item's number; made once for a list of items."""
        of, numbers = self._numbers
        if of is not self.items:
            numbers = {item: number for number, item in enumerate(self.items, 1)}
            self._numbers = self.items, numbers
        return numbers

    # -- model ------------------------------------------------------------------------------------------------------

    def known(self) -> dict[str, Any]:
        """Return the number of items and of places."""
        return {"num_items": len(self.items), "max_positions": self.max_length}

    def placeholders(self) -> dict[str, Any]:
        """Return few of both."""
        return {"num_items": 2, "max_positions": 2}

    # -- learning ---------------------------------------------------------------------------------------------------

    def rows_meet(self) -> str:
        """Return that the loss compares items of a micro-batch, where it does."""
        return "task.softmax in-batch compares items of a micro-batch" if self.softmax == "in-batch" else ""

    def loss(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum the cross-entropy of what follows each item: a scalar () fp32, in nats; and the number of terms ()."""
        return self._loss(model, batch, self.softmax)

    def measure(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """Sum loss and targets, scalars; where ends are to be predicted, users and how high these are ranked, too."""
        import torch

        if "wanted" not in batch:
            total, targets = self._loss(model, batch, "full")
            return {"loss": total, "targets": targets}
        scores, wanted = self._last(model, batch["inputs"]), batch["wanted"]
        known = wanted > 0
        total = torch.nn.functional.cross_entropy(scores[known], wanted[known] - 1, reduction="sum")
        sums = {"loss": total, "targets": known.sum(), "users": torch.full((), len(wanted), device=wanted.device)}
        sampled, whole = self._ranks(scores, batch)
        popular = {"": batch["popular"], "_all": batch["popular_all"]}
        empty = (batch["inputs"] > 0).sum(1) == 0  # no known item is in the history: what is answered is popularity
        places = {"": torch.where(empty, popular[""], sampled), "_all": torch.where(empty, popular["_all"], whole)}
        for prefix, of in (("", places), ("popularity_", popular)):
            for all_, rank in of.items():
                rank = torch.where(known, rank, ranking.MISSED)
                sums[f"{prefix}hr_{FIRST}{all_}"], sums[f"{prefix}ndcg_{FIRST}{all_}"] = ranking.hits(rank, FIRST)
        return sums

    def summarise(self, sums: Mapping[str, Any]) -> dict[str, float]:
        """Return loss (nats per interaction, over all items), HR and NDCG, ours and those of popularity."""
        found = {"loss": sums["loss"] / max(sums["targets"], 1)}
        if sums.get("users"):  # else the rows were those to learn from
            ranked = [name for name in self.metrics if name != "loss"]
            found |= {
                f"{by}{name}": sums[f"{by}{name}"] / sums["users"] for by in ("", "popularity_") for name in ranked
            }
        return found

    # -- inside -----------------------------------------------------------------------------------------------------

    def _loss(self, model: torch.nn.Module, batch: Batch, softmax: str) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        where = batch["labels"] > 0
        labels = batch["labels"][where]
        if softmax == "full":
            return self._entropy(model, batch["inputs"], where, self._all(labels.device), labels - 1)
        classes, of = torch.unique(labels, return_inverse=True)
        correction = torch.from_numpy(ranking.log_inclusion(self.counts, len(labels))).to(labels.device)
        return self._entropy(model, batch["inputs"], where, classes, of, correction[classes - 1])

    def _entropy(
        self,
        model: torch.nn.Module,
        inputs: torch.Tensor,
        where: torch.Tensor,
        candidates: torch.Tensor,
        of: torch.Tensor,
        correction: torch.Tensor | float = 0.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum the cross-entropy of candidates (C,) at the M places of `where`, of which `of` (M,) come next."""
        import torch

        logits = model(inputs=inputs, where=where, candidates=candidates).float() - correction
        total = torch.nn.functional.cross_entropy(logits, of, reduction="sum")
        return total, torch.full((), len(of), device=of.device)

    def _all(self, device: torch.device) -> torch.Tensor:
        import torch

        return torch.arange(1, len(self.items) + 1, device=device)

    def _last(self, model: torch.nn.Module, inputs: torch.Tensor) -> torch.Tensor:
        """Return the scores of all items behind the end of each history, (B, I) fp32."""
        import torch

        last = ((inputs > 0).sum(1) - 1).clamp(min=0)
        where = torch.zeros_like(inputs, dtype=torch.bool)
        where[torch.arange(len(inputs), device=inputs.device), last] = True
        scores: torch.Tensor = model(inputs=inputs, where=where, candidates=self._all(inputs.device)).float()
        return scores

    def _ranks(self, scores: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the wanted items' ranks (B,) among the drawn ones, and among all that the user has not met."""
        import torch

        at = (batch["wanted"] - 1).clamp(min=0)[:, None]
        own = scores.gather(1, at)[:, 0]
        drawn = batch["negatives"]
        sampled = ranking.ranks(scores.gather(1, (drawn - 1).clamp(min=0)), own, drawn > 0)
        among = torch.ones(len(scores), scores.shape[1] + 1, dtype=torch.bool, device=scores.device)
        among.scatter_(1, batch["met"], False)
        among = among[:, 1:].scatter(1, at, False)
        return sampled, ranking.ranks(scores, own, among)
