"""What crosses between the gateway and a model's replicas: plain frozen data, cheap to pickle."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Prompt = str | tuple[int, ...] | tuple[dict[str, str], ...]
"""Text, token ids, or the messages of a conversation (`role` and `content`)."""


@dataclass(frozen=True)
class GenerateCall:
    """One text to generate. `sampling` holds only what the client named: the model's own defaults fill the rest."""

    request_id: str
    prompt: Prompt
    sampling: dict[str, Any] = field(default_factory=dict)
    max_tokens: int | None = None
    """None: as many as the context has room for."""
    echo: bool = False
    """Send the prompt in front of the text, as text and, where log-probabilities are wanted, token by token."""


@dataclass(frozen=True)
class Identity:
    """What produced an answer."""

    version: str
    run_id: str | None


@dataclass(frozen=True)
class Opened:
    """The first message of a stream: the replica has accepted the prompt."""

    identity: Identity
    prompt_tokens: int


class ScoredToken(NamedTuple):
    """A token, as the bytes it stands for, and how likely it was."""

    raw: bytes
    logprob: float | None
    top: tuple[tuple[bytes, float], ...]
    """The most likely tokens at its place, best first."""


@dataclass(frozen=True)
class Chunk:
    """Text that became known, and the count of all tokens chosen so far."""

    text: str
    completion_tokens: int
    finish_reason: Literal["stop", "length"] | None = None
    tokens: tuple[ScoredToken, ...] = ()
    """The tokens behind the text, where the request asked for log-probabilities."""


@dataclass(frozen=True)
class Refused:
    """In place of an answer: the request is at fault (4xx) or the replica is (5xx)."""

    status: int
    message: str
    code: str
    param: str | None = None


@dataclass(frozen=True)
class InferCall:
    """Named tensors in: numpy arrays whose first axis is the batch, or lists of str or bytes, nested as their shape."""

    request_id: str
    inputs: dict[str, Any]


@dataclass(frozen=True)
class Inferred:
    """One prediction per instance."""

    identity: Identity
    predictions: list[dict[str, Any]]


@dataclass(frozen=True)
class Load:
    """How busy a replica's engine is."""

    running: int
    waiting: int
    tokens_per_second: float
    cache_tokens_used: int = 0
    cache_tokens_total: int = 0


@dataclass(frozen=True)
class ReplicaState:
    """What a model's replica tells about itself."""

    model: str
    replica_id: str
    version: str
    load: Load
    description: dict[str, Any]
    """Tensor metadata, context length."""


@dataclass(frozen=True)
class GatewayState:
    """What a gateway's replica tells about itself."""

    pending: dict[str, int]
    """Requests that no replica has accepted yet, by model."""
