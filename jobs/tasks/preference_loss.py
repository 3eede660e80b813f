"""Losses that compare two answers, and what is measured of them.

    dpo    −log σ(β·(Δc − Δr))                        Rafailov et al. 2023, arXiv:2305.18290, equation 7
    ipo    (Δc/|c| − Δr/|r| − 1/(2β))²                Azar et al. 2023, arXiv:2310.12036, equation 17, with the mean
                                                      over an answer's tokens in place of their sum, as TRL has it
    orpo   −p_c − β·log σ(log odds c − log odds r)    Hong et al. 2024, arXiv:2403.07691, equations 4 to 7

Δ is the log-probability of an answer less that by the reference; p the mean log-probability of an answer's tokens, and
log odds = p − log(1 − exp p).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from jobs.tasks import IGNORED, Better

if TYPE_CHECKING:
    import torch

Objective = Literal["dpo", "ipo", "orpo"]
REFERRING = ("dpo", "ipo")
"""Those that compare with a reference."""
METRICS: Mapping[str, Better] = {
    "loss": "min",
    "preference_accuracy": "max",
    "margin": "max",
    "chosen_perplexity": "min",
    "chosen_change": "max",
    "rejected_change": "min",
}
EDGES = tuple(0.5 * at for at in range(-20, 21))
"""Between the bins of the histogram of margins; the first and the last bin hold what lies beyond."""
COLLAPSE = -0.5
"""Nats per token: below, a chosen answer's token has at most 0.61 of the probability that the reference gives it."""
CERTAIN = -1e-6
"""A mean log-probability is taken to be no higher: at 0 the odds are infinite."""


@dataclass(frozen=True)
class Answers:
    """The two answers of B pairs, chosen and rejected in this order."""

    policy: torch.Tensor
    """(B, 2) fp32: log-probability in nats by the model."""
    lengths: torch.Tensor
    """(B, 2) int64: tokens of the answer."""
    reference: torch.Tensor | None = None
    """(B, 2) fp32: log-probability by the reference."""

    @property
    def change(self) -> torch.Tensor:
        """Return the log-probability less that by the reference, (B, 2)."""
        assert self.reference is not None, "the rows have a column `reference`"
        return self.policy - self.reference


def log_probabilities(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return of each row the summed log-probability of its labels, (R,) fp32 nats, and how many they are, (R,) int64.

    Args:
        logits: (R, T, V), of any floating type.
        labels: (R, T) int64; IGNORED is none.
    """
    from jobs.tasks.cross_entropy import cross_entropy_sums

    return -cross_entropy_sums(logits, labels), (labels != IGNORED).sum(1)


def compared(objective: Objective, beta: float, answers: Answers) -> tuple[torch.Tensor, torch.Tensor]:
    """Return of each pair its loss and by how much the chosen answer is ahead, its margin: (B,) fp32 each.

    The margin of dpo is β·(Δc − Δr); that of ipo the difference of the means; that of orpo the log odds ratio.
    """
    from torch.nn.functional import logsigmoid

    if objective == "dpo":
        margins = beta * _ahead(answers.change)
        return -logsigmoid(margins), margins
    if objective == "ipo":
        margins = _ahead(answers.change / answers.lengths)
        return (margins - 1 / (2 * beta)) ** 2, margins
    means = (answers.policy / answers.lengths).clamp(max=CERTAIN)
    margins = _ahead(means - (-means.expm1()).log())
    return -means[:, 0] - beta * logsigmoid(margins), margins


def sums(losses: torch.Tensor, margins: torch.Tensor, answers: Answers) -> dict[str, torch.Tensor]:
    """Return what adds up over batches and ranks, scalars () and the histogram of margins (42,): see `summary`.

    Args:
        losses: (B,) fp32; margins: (B,) fp32.
    """
    import torch

    tokens = answers.lengths.sum(0)
    bins = torch.bucketize(margins.detach(), margins.new_tensor(EDGES))
    found = {
        "loss": losses.sum(),
        "targets": answers.lengths.new_full((), len(losses)),
        "preferred": (margins > 0).sum(),
        "margins": margins.sum(),
        "histogram": torch.bincount(bins, minlength=len(EDGES) + 1),
        "chosen_nll": -answers.policy[:, 0].sum(),
        "chosen_tokens": tokens[0],
        "rejected_tokens": tokens[1],
    }
    if answers.reference is None:
        return found
    changed = answers.change.sum(0)
    return {**found, "chosen_changed": changed[0], "rejected_changed": changed[1]}


def summary(added: Mapping[str, float]) -> dict[str, float]:
    """Return `METRICS` of added-up `sums`: changes are nats per token against the reference, where there is one."""
    pairs, tokens = max(added["targets"], 1), max(added["chosen_tokens"], 1)
    found = {
        "loss": added["loss"] / pairs,
        "preference_accuracy": added["preferred"] / pairs,
        "margin": added["margins"] / pairs,
        "chosen_perplexity": math.exp(min(added["chosen_nll"] / tokens, 700.0)),
    }
    if "chosen_changed" not in added:
        return found
    changes = {f"{name}_change": added[f"{name}_changed"] / max(added[f"{name}_tokens"], 1) for name in SIDES}
    return {**found, **changes}


SIDES = ("chosen", "rejected")


def collapse(metrics: Mapping[str, float]) -> list[str]:
    """Say where a model has become unlikely to give the chosen answers: nothing where it has not."""
    change = metrics.get("chosen_change", 0.0)
    if change >= COLLAPSE:
        return []
    return [
        f"the chosen answers have become unlikely: a token of theirs has {math.exp(change):.2g} times the probability "
        f"that the reference gives it ({change:.2f} nats), so what the model writes now is neither of the two answers. "
        "Take a higher task.beta, fewer steps or a lower learning rate, or task.chosen_weight: 1"
    ]


def _ahead(both: torch.Tensor) -> torch.Tensor:
    """Return by how much the first of two columns (B, 2) is larger, (B,)."""
    return both[:, 0] - both[:, 1]
