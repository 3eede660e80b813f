"""Compare rows that decode beside others with the model alone: what is served must not depend on the company."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch

from cluster.errors import UserError
from serve.engines.seq2seq.decoder import Decoder
from serve.engines.seq2seq.rows import joined

logger = logging.getLogger(__name__)
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
"""What the Euclidean norm of a difference of logits may be, as a share of that of the logits."""
STEPS = 3
"""Tokens of the answers that are compared."""


class UnsupportedModel(UserError, ValueError):
    """The model cannot run in this engine; the message says why."""


def goes_together(decoder: Decoder, vocabulary: int) -> bool:
    """Return whether rows of several sequences may decode together; where not, each runs by itself: the log says so.

    Raises:
        UnsupportedModel: not even a sequence by itself says with a cache what the model says without.
    """
    tolerance = TOLERANCES.get(decoder.model.dtype, 0.1)
    tokens = [token for token in range(vocabulary) if token != decoder.padding]
    sources = [[tokens[(7 * at + 3 * n) % len(tokens)] for at in range(2 + 3 * n)] for n in range(3)]
    answers = [[tokens[(5 * at + n + 1) % len(tokens)] for at in range(STEPS)] for n in range(3)]
    expected = [_whole(decoder, source, answer) for source, answer in zip(sources, answers, strict=True)]
    alone = _alone(decoder, sources[2], answers[2])
    if _difference(alone, expected[2]) > tolerance:
        raise UnsupportedModel(
            f"{type(decoder.model).__name__} says with a cache what it does not say without: the engine seq2seq cannot "
            "serve it"
        )
    worst = _worst_together(decoder, sources, answers, expected)
    if worst > tolerance:
        logger.warning(
            "rows of %s cannot be at different places: each request runs by itself, so that more of them at once are "
            "not faster",
            type(decoder.model).__name__,
        )
    return worst <= tolerance


@torch.inference_mode()
def _whole(decoder: Decoder, source: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    """Return the logits [V] after an answer, by the model itself without a cache."""
    ids = torch.tensor([source], device=decoder.model.device)
    read = torch.tensor([[decoder.start, *answer]], device=decoder.model.device)
    mask = torch.ones_like(ids)
    logits: torch.Tensor = decoder.model(input_ids=ids, attention_mask=mask, decoder_input_ids=read).logits[0, -1]
    return logits.float()


def _alone(decoder: Decoder, source: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    rows, logits = decoder.begin([source])
    for token in answer:
        rows, logits = decoder.step(rows, [token])
    return logits[0].float()


def _staggered(
    decoder: Decoder, sources: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> list[torch.Tensor]:
    """Return the same for all, where each begins a step after the one before it, which it joins."""
    rows, _ = decoder.begin(sources[:1])
    finished: list[torch.Tensor] = []
    for step in range(STEPS + len(sources) - 1):
        there = [n for n in range(len(sources)) if n <= step < n + STEPS]
        rows, logits = decoder.step(rows, [answers[n][step - n] for n in there])
        finished += [logits[row].float() for row, n in enumerate(there) if step - n == STEPS - 1]
        rows = rows.taken([row for row, n in enumerate(there) if step - n < STEPS - 1])
        if step + 1 < len(sources):
            rows = joined([rows, decoder.begin([sources[step + 1]])[0]])
    return finished


def _worst_together(
    decoder: Decoder,
    sources: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    expected: Sequence[torch.Tensor],
) -> float:
    """Return the largest difference from the logits [V] expected; infinity where the model refuses rows together."""
    try:
        together = _staggered(decoder, sources, answers)
    except (ValueError, RuntimeError, IndexError, TypeError) as error:
        logger.info("%s takes no rows at different places: %r", type(decoder.model).__name__, error)
        return math.inf
    return max(_difference(found, wanted) for found, wanted in zip(together, expected, strict=True))


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
