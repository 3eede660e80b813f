"""What crosses between the gateway and a model's replicas: plain frozen data, cheap to pickle."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Prompt = str | tuple[int, ...] | tuple[dict[str, Any], ...]
"""Text, token ids, or the messages of a conversation, as a chat template takes them."""
FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class Tools:
    """The functions that a model may call in its answer."""

    functions: tuple[dict[str, Any], ...]
    """Each with `name`, `description` and `parameters` (the schema of an object)."""
    strict: tuple[str, ...] = ()
    """Functions whose arguments must follow their schema also where the model itself decides to call."""
    required: bool = False
    """Whether the answer must be a call."""
    named: str | None = None
    """The one function that must be called."""
    parallel: bool = True
    """Whether one answer may have several calls."""


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
    tools: Tools | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """What the chat template is told beside the messages."""
    place: str = "prompt"
    """Where the request has the prompt: `messages`, `prompt[2]`."""
    generated: tuple[int, ...] = ()
    """Tokens that another replica has chosen for this answer, and whose text the client has: it goes on after them."""
    session: str | None = None
    """What requests of one conversation have in common (`x-session-id`, `prompt_cache_key`): one replica for all."""
    trace: str | None = None
    """The W3C `traceparent` of the request."""
    trace_state: str | None = None
    """The `tracestate` beside it."""


@dataclass(frozen=True)
class Identity:
    """What produced an answer."""

    version: str
    run_id: str | None
    build: str = ""
    """Digest of all that an answer depends on (serve/deploy/plan.py); clients are told the version only."""


@dataclass(frozen=True)
class Opened:
    """The first message of a stream: the replica has accepted the prompt."""

    identity: Identity
    prompt_tokens: int


class ScoredToken(NamedTuple):
    """A token, as the bytes that it gave to the text, and how likely it was."""

    raw: bytes
    """Empty for a token that does not show (the end of the text); the returned part of one that a stop string cut."""
    logprob: float | None
    top: tuple[tuple[bytes, float], ...]
    """The most likely tokens at its place, best first."""
    offset: int = 0
    """Characters of the choice's text before it; where the character begins, for a token that is a part of one."""


class CallPiece(NamedTuple):
    """What became known of a function's call."""

    number: int
    """Which of the answer's calls."""
    name: str | None
    """The function, in the call's first piece."""
    arguments: str
    """More of the arguments' JSON."""


@dataclass(frozen=True)
class Chunk:
    """Text that became known, and the count of all tokens chosen so far."""

    text: str
    completion_tokens: int
    finish_reason: FinishReason | None = None
    tokens: tuple[ScoredToken, ...] = ()
    """The tokens behind the text, where the request asked for log-probabilities."""
    calls: tuple[CallPiece, ...] = ()
    ids: tuple[int, ...] = ()
    """The tokens chosen since the last chunk, whether they show or not: by them another replica can go on."""


@dataclass(frozen=True)
class Refused:
    """In place of an answer: the request is at fault (4xx) or the replica is (5xx)."""

    status: int
    message: str
    code: str
    param: str | None = None
    lost: bool = False
    """Whether it is the engine that failed under a text: another replica may go on with it."""


@dataclass(frozen=True)
class InferCall:
    """Named tensors in: numpy arrays whose first axis is the batch, or lists of str or bytes, nested as their shape."""

    request_id: str
    inputs: dict[str, Any]
    trace: str | None = None
    trace_state: str | None = None


@dataclass(frozen=True)
class Inferred:
    """One prediction per instance."""

    identity: Identity
    predictions: list[dict[str, Any]]


@dataclass(frozen=True)
class EmbedCall:
    """Texts, or lists of token ids, each to become a vector."""

    request_id: str
    inputs: tuple[str | tuple[int, ...], ...]
    dimensions: int | None = None
    """How many numbers the client expects of a vector; None: as many as the model has."""
    trace: str | None = None
    trace_state: str | None = None


@dataclass(frozen=True)
class Vectors:
    """One vector for each input."""

    identity: Identity
    values: Any
    """numpy, float32 [inputs, dimensions], each of Euclidean length 1."""
    prompt_tokens: int


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
    address: str = ""
    """Where it takes calls, `host:port`."""
    slots: int = 1
    """Sequences that it works on at the same time."""
    leaving: bool = False
    """Whether it finishes what it has and takes no more."""
    build: str = ""
    """That of its answers' `Identity`: an answer that has begun goes on at no replica of another one."""
    start_s: float = 0.0
    """Seconds that it took to be ready, from when its process was there."""


@dataclass(frozen=True)
class Fetching:
    """What a model's replica tells while its node fetches the model from a store; it loads it afterwards."""

    model: str
    place: str
    """Where from, for people."""
    node: str
    """The node's address."""


@dataclass(frozen=True)
class Work:
    """What one gateway knows of the work for one model, in tokens (predictions count one a row)."""

    arrived: float
    """Of all requests since the gateway began: their prompts, and what they are expected to generate."""
    done: float
    """Worked off since the gateway began."""
    waiting: float
    """Of the requests that no replica works on."""
    running: float
    """That the requests being worked on still need."""


@dataclass(frozen=True)
class GatewayState:
    """What a gateway's replica tells about itself."""

    pending: dict[str, int]
    """Requests that no replica has accepted yet, by model."""
    work: dict[str, Work] = field(default_factory=dict)
    """By model."""
    address: str = ""
    """Where it listens for clients, `host:port`."""
    open_requests: int = 0
    """Requests of clients that it answers now."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """What /metrics adds up over all gateways."""
    scales: bool = False
    """Whether the number of replicas of anything may change."""
