"""What a step's hidden states mean for texts that become embeddings: one vector of length 1 for each."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch

from serve.engines.protocol import EngineError, Pooling, RequestError
from serve.engines.torch.scheduler import Sequence, Step

Failure = EngineError | RequestError


class Embedded(NamedTuple):
    """A text was read to its end."""

    vector: np.ndarray
    """float32 [hidden], of Euclidean length 1."""
    finish_reason: Literal["stop"] = "stop"


@dataclass(eq=False)
class Pooled:
    """What a sequence needs to become an embedding: its hidden states so far, as one vector, and who listens."""

    pooling: Pooling
    loop: asyncio.AbstractEventLoop
    events: deque[Embedded | Failure] = field(default_factory=deque)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    closed: bool = False
    """The event was sent or nobody listens any more."""
    vector: torch.Tensor | None = None
    """float32 [hidden]: the sum of the states, or the last one."""

    def add(self, states: torch.Tensor, first: bool) -> None:
        """Take the states [tokens, hidden] of the text's next tokens; `first` of its first ones.

        A text may have given way in the middle and begin again.
        """
        new = states[-1].float() if self.pooling == "last" else states.float().sum(dim=0)
        self.vector = new if first or self.pooling == "last" or self.vector is None else self.vector + new


@torch.inference_mode()
def advance(step: Step, hidden: torch.Tensor) -> list[tuple[Sequence, Embedded | Failure]]:
    """Add what a step computed to the texts that become embeddings, and return what to say of those that ended.

    Args:
        hidden: [E, hidden], of the rows that `batch.build` asked for in this step, in their order.
    """
    if not len(hidden):
        return []
    ended: list[tuple[Sequence, Embedded | Failure]] = []
    at = 0
    for sequence, start, end, completes in step.chunks:
        if not sequence.pooled:
            continue
        pooled: Pooled = sequence.context
        pooled.add(hidden[at : at + end - start], first=start == 0)
        at += end - start
        if completes:
            ended.append((sequence, _result(pooled)))
    return ended


def _result(pooled: Pooled) -> Embedded | Failure:
    """Return the vector at length 1. The mean has the direction of the sum."""
    assert pooled.vector is not None
    length = float(pooled.vector.norm())
    if length == 0:  # padding tokens alone, in most models
        return RequestError("input", "a text's hidden states are all 0, so that its vector has no direction")
    if not 0 < length < float("inf"):
        return EngineError(f"the model produced hidden states that make up a vector of length {length}")
    return Embedded((pooled.vector / length).cpu().numpy())
