"""The learning rate as a pure function of the step, so that a resume needs no scheduler state."""

from __future__ import annotations

import math

from jobs.spec import TrainingSpec


def learning_rate(training: TrainingSpec, step: int, steps: int) -> float:
    """Return the learning rate of optimiser step `step` (from 0) of `steps`.

    Linear warm-up to the peak, then: constant; cosine (Loshchilov & Hutter 2016, arXiv:1608.03983); linear; or
    warm-up-stable-decay (Hu et al. 2024, arXiv:2404.06395): flat, then linear over `decay_steps`.
    """
    peak, low, warmup = training.learning_rate, training.min_learning_rate, training.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    if training.schedule == "constant":
        return peak
    if training.schedule == "warmup-stable-decay":
        given = training.decay_steps or max(1, steps // 5)
        decay = min(int(given) if given >= 1 else max(1, round(given * steps)), steps - warmup)
        return _between(peak, low, 1 - max(0, step - (steps - decay)) / decay)
    left = 1 - (step - warmup) / max(1, steps - warmup)
    return _between(peak, low, left if training.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * (1 - left))))


def _between(high: float, low: float, share: float) -> float:
    return low + (high - low) * share
