"""FLOPs, time, tokens and cost of a training. Pure; estimates."""

from __future__ import annotations

from dataclasses import dataclass

from jobs.plan.facts import Facts

TOKENS_PER_PARAMETER = 20
"""About what is compute-optimal for a dense decoder (Hoffmann et al. 2022, arXiv:2203.15556)."""
MFU = 0.4
"""Model FLOPs utilisation that is assumed: PaLM reports 0.46, Llama 3 405B 0.38 to 0.43 (arXiv:2407.21783, table 4)."""


def flops_per_token(facts: Facts, sequence_length: int, again: bool = False) -> float | None:
    """Return the FLOPs of a token, forward and backward; None where the model is no causal transformer.

    6 for each parameter that multiplies (Kaplan et al. 2020, arXiv:2001.08361), 4 for one that is frozen, and
    12 · layers · width of the queries · sequence length for attention (Chowdhery et al. 2022, arXiv:2204.02311,
    appendix B), which counts the half that a causal mask leaves out.

    Args:
        again: activations are computed again, which costs another forward pass.
    """
    if facts.decoder is None:
        return None
    frozen = max(0, facts.frozen - facts.embedding)
    multiplied = facts.parameters - facts.embedding
    attention = 12 * facts.decoder.layers * facts.decoder.queries * sequence_length
    passes = 6 * multiplied - 2 * frozen + attention
    return float(passes + (2 * multiplied + attention / 3 if again else 0))


@dataclass(frozen=True)
class Work:
    """A training's length and speed."""

    tokens_per_step: int
    """Places in the rows of a global batch; padded ones are among them."""
    steps: int | None
    step_s: float | None
    """None where the device's rate is not known."""

    @property
    def tokens(self) -> int | None:
        """Of the whole training; None where its length is not known."""
        return None if self.steps is None else self.steps * self.tokens_per_step

    @property
    def duration_s(self) -> float | None:
        """Of all steps."""
        return None if self.steps is None or self.step_s is None else self.steps * self.step_s

    def cost(self, price_per_hour: float, devices: int) -> float | None:
        """Return the price of all devices for as long, in whatever `price_per_hour` of one is in."""
        return None if self.duration_s is None else self.duration_s / 3600 * devices * price_per_hour


def step_s(flops_per_token: float, tokens_of_a_rank: int, peak: float, mfu: float) -> float:
    """Return the seconds of an optimiser step: those of the rank that has the most rows."""
    return flops_per_token * tokens_of_a_rank / (peak * mfu)


def optimal_tokens(facts: Facts) -> int:
    """Return how many tokens are compute-optimal for a model of that size, learned from its first weights."""
    return TOKENS_PER_PARAMETER * facts.parameters
