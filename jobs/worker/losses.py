"""Which steps of training are refused, by their loss or their gradient. Pure."""

from __future__ import annotations

import math
import statistics
from collections import deque


class NonFiniteLoss(RuntimeError):
    """The loss is NaN or infinite; the step was not applied."""


class NonFiniteGradient(NonFiniteLoss):
    """The gradient is NaN or infinite, though the loss is not; the step counts as not made."""


class LossSpike(RuntimeError):
    """The loss is far above the last ones; the step was not applied."""


class RecentLosses:
    """Tell a spike from the losses before it."""

    LENGTH, ENOUGH = 64, 16

    def __init__(self, factor: float | None) -> None:
        """A loss of more than `factor` times the recent median is a spike; None: nothing is."""
        self._factor = factor
        self._losses: deque[float] = deque(maxlen=self.LENGTH)

    def check(self, loss: float, step: int) -> None:
        """Refuse the loss of a step before it is applied.

        Raises:
            NonFiniteLoss: it is NaN or infinite.
            LossSpike: it is far above the recent ones.
        """
        if not math.isfinite(loss):
            raise NonFiniteLoss(f"the loss of step {step} is {loss}; the step was not applied")
        if self.is_spike(loss):
            raise LossSpike(f"the loss of step {step} is {loss:.4g}, after {self.median():.4g}; it was not applied")

    def is_spike(self, loss: float) -> bool:
        """Say whether `loss` is one; if not, remember it."""
        if self._factor is not None and len(self._losses) >= self.ENOUGH and loss > self._factor * self.median():
            return True
        self._losses.append(loss)
        return False

    def median(self) -> float:
        """Return the median of the recent losses."""
        return statistics.median(self._losses)


def check_gradient(norm: float, loss: float, step: int) -> None:
    """Refuse a step whose gradient is no number: with ZeRO it was not applied, else it has spoilt the weights.

    Raises:
        NonFiniteGradient: the gradient's norm is NaN or infinite.
    """
    if not math.isfinite(norm):
        raise NonFiniteGradient(
            f"the gradient of step {step} is NaN or infinite, with a loss of {loss:.4g}; the step does not count"
        )
