"""The protocols of engines, generative and predictive, and the plain data that crosses them.

Nothing here imports torch: a gateway process parses requests without paying for it.
`serve/engines/table.py` lists the engines there are.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

from cluster.errors import UserError
from serve.engines.stats import RequestStats

if TYPE_CHECKING:
    import numpy as np

FinishReason = Literal["stop", "length"]
Pooling = Literal["mean", "last"]
"""How the hidden states of a text's tokens become one vector."""
MOST_ALTERNATIVES = 20
"""Most alternatives that a request may ask for at each token, as OpenAI has it."""
MOST_BEAMS = 64
"""Most hypotheses of a beam search."""


class EngineError(RuntimeError):
    """The engine failed while it worked on a request; the request itself may be sound and can be tried elsewhere."""


class RequestError(UserError, ValueError):
    """A request the engine cannot honour; `field` names what to change, so a gateway can answer 400."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field, self._message = field, message

    def __reduce__(self) -> tuple[type[RequestError], tuple[str, str]]:
        return type(self), (self.field, self._message)


@dataclass(frozen=True)
class SamplingParams:
    """How one request chooses its tokens. Defaults are OpenAI's: plain sampling at temperature 1.

    `__post_init__` raises RequestError (a ValueError) that names the offending field.
    """

    max_tokens: int = 256
    """Most tokens to generate; the context limit may end the text earlier. 0 only scores the prompt."""
    temperature: float = 1.0
    """0 is greedy: the most likely token, whatever the other fields say about randomness."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches top_p; 1 keeps all, 0 the most likely one."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 (or -1, as vLLM writes it) keeps all."""
    min_p: float = 0.0
    """Drop tokens less likely than min_p times the most likely one."""
    presence_penalty: float = 0.0
    """Taken from the logit of every token generated at least once."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit once for each time it was generated."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of every token in prompt or output (CTRL, Keskar et al. 2019)."""
    seed: int | None = None
    """Same seed, same text in fp32, whatever else runs; None draws a fresh seed."""
    stop: tuple[str, ...] = field(default=())
    """Strings that end the text; the text is cut before the first of them."""
    ignore_eos: bool = False
    """Generate past the end-of-sequence token, to exactly max_tokens (benchmarks)."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Token id → what is added to its logit before everything else; -100 all but bans it, 100 all but forces it."""
    logprobs: int | None = None
    """Report each chosen token's log-probability and that many of the most likely tokens'; None reports nothing.
    They are the model's own: before bias, penalties, temperature and a schema's mask."""
    prompt_logprobs: bool = False
    """Report the same for every token of the prompt."""
    json_schema: str | None = None
    """A JSON schema, as JSON: the text will be a value that it describes, unless max_tokens cuts it."""
    grammar: str | None = None
    """A grammar in llguidance's Lark, in place of a schema: of calls of functions, which have tokens in them."""
    visible_tokens: tuple[int, ...] = ()
    """Special tokens that show in the text, by their names."""
    min_tokens: int = 0
    """So many tokens are chosen before an end token may be; stop strings are looked for after them."""
    stop_token_ids: tuple[int, ...] = ()
    """More tokens that end the text, ignore_eos or not; like an end token, they do not show."""
    num_beams: int = 1
    """Hypotheses of a beam search for the likeliest text; 1: tokens are chosen one by one. Few engines have more."""

    def __post_init__(self) -> None:
        _check_int("max_tokens", self.max_tokens, 0 if self.prompt_logprobs else 1, None)
        _check_range("temperature", self.temperature, 0.0, 100.0)
        _check_range("top_p", self.top_p, 0.0, 1.0)
        _check_int("top_k", self.top_k, -1, None)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_range("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        if self.seed is not None:
            _check_int("seed", self.seed, -(2**63), 2**63 - 1)
        if self.logprobs is not None:
            _check_int("logprobs", self.logprobs, 0, MOST_ALTERNATIVES)
        _check_int("num_beams", self.num_beams, 1, MOST_BEAMS)
        _check_int("min_tokens", self.min_tokens, 0, self.max_tokens)
        if self.min_tokens and (self.json_schema or self.grammar):
            raise RequestError("min_tokens", "does not go with response_format or calls that a grammar enforces")
        for token in self.stop_token_ids:
            _check_int("stop_token_ids", token, 0, None)
        for token, bias in self.logit_bias.items():
            _check_int("logit_bias", token, 0, None)
            _check_range("logit_bias", bias, -100.0, 100.0, f" for token {token}")
        _check_stop(self.stop)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt as token ids, and how to continue it."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    continues_prompt: bool = False
    """Whether the text goes on from the prompt's last word. A SentencePiece decoder drops the space of a text's first
    token: rightly in an answer, wrongly here."""
    generated: tuple[int, ...] = ()
    """Tokens that another engine of the same model has chosen after the prompt; the text goes on after them. Only a
    ResumingEngine is given any."""
    stats: RequestStats | None = field(default=None, compare=False)
    """What an engine notes of its work on it, where somebody wants to know."""


class TokenLogprobs(NamedTuple):
    """How likely a token was. The first token of a prompt follows nothing, so it has no log-probability."""

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]
    """The most likely tokens with their log-probabilities, best first."""


@dataclass(frozen=True)
class Delta:
    """What became known since the last delta. The last one of a stream carries `finish_reason`.

    `text` never ends in half a character; it may be empty while `token_ids` is not, and the other way round.
    `completion_tokens` counts all tokens chosen so far, an end-of-sequence token included.
    Where the request asked for them, `logprobs` has an entry for each of `token_ids`, and `prompt_logprobs` (in the
    first delta) one for each token of the prompt.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True)
class EngineLoad:
    """How busy an engine is; what autoscaling and routing look at."""

    running: int
    waiting: int
    cache_tokens_used: int
    """Room held by running sequences. Prefixes kept for later do not count: they give way at once."""
    cache_tokens_total: int
    tokens_per_second: float
    """Generated tokens per second over the last few seconds, all streams together."""
    preemptions: int = 0
    """How often a sequence gave its room back and was computed again."""
    reused_tokens: int = 0
    """Prompt tokens that did not have to be computed because the cache held them."""


@runtime_checkable
class Engine(Protocol):
    """A generative engine of one model. All methods are called on one event loop; none of them blocks it."""

    tokenizer: Any
    """The model's transformers tokenizer (chat template included)."""
    max_context: int
    """Most tokens of prompt and completion together."""

    async def start(self) -> None:
        """Make the engine ready to generate; returns when it is."""
        ...

    async def stop(self) -> None:
        """Fail what still runs with EngineError and release the engine's thread and memory."""
        ...

    async def check(self, request: GenerationRequest) -> None:
        """Raise RequestError if the request can never be served. It may take time: a schema is compiled."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        """Stream a completion. Closing the iterator (aclose, or cancelling the task) frees its slot at the next step.

        Raises RequestError at the first step of the iterator if the request can never be served, and later if its
        schema turns out to be too complex; EngineError if the engine fails under it.
        """
        ...

    def load(self) -> EngineLoad: ...

    def report(self) -> dict[str, Any]:
        """Return what runs here, as JSON values: for people and logs, no part of the code looks into it."""
        ...

    def healthy(self) -> bool:
        """False when the engine can no longer serve and its replica should be replaced."""
        ...


@runtime_checkable
class ResumingEngine(Protocol):
    """What an engine has beside that can go on with a text that another one has begun."""

    def resumes(self, request: GenerationRequest) -> bool:
        """Say whether it can go on after the request's `generated` as the undisturbed run would.

        Then the first delta of `generate` repeats what was generated, as one: its tokens, their log-probabilities,
        and the text that was certain after them. Counts, limits and penalties go on from there.
        """
        ...


@runtime_checkable
class EmbeddingEngine(Protocol):
    """What an engine has beside that turns texts into vectors. Called on the engine's event loop; nothing blocks it."""

    tokenizer: Any
    """The model's transformers tokenizer."""
    max_context: int
    """Most tokens of a text."""
    embedding_size: int
    """Numbers of a vector."""

    async def embed(self, request_id: str, prompt_token_ids: tuple[int, ...]) -> np.ndarray:
        """Return the text's vector, float32 [embedding_size], of Euclidean length 1.

        Raises RequestError if the text can never be embedded, EngineError if the engine fails under it.
        """
        ...


@runtime_checkable
class BatchingEngine(Protocol):
    """A predictive engine of one model. All methods are called on one event loop; none of them blocks it."""

    async def start(self) -> None:
        """Make the engine ready to predict; returns when it is."""
        ...

    async def stop(self) -> None:
        """Fail what waits with EngineError and release the engine's thread and memory."""
        ...

    async def predict(self, instance: Any) -> dict[str, Any]:
        """Answer one instance. Raises ValueError for one that is at fault, EngineError when the engine is."""
        ...

    def load(self) -> EngineLoad: ...

    def healthy(self) -> bool:
        """Return False when the engine can no longer serve and its replica should be replaced."""
        ...


def _check_range(name: str, value: float, low: float, high: float, where: str = "") -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= value <= high:
        raise RequestError(name, f"must be a number in [{low:g}, {high:g}], got {value!r:.60}{where}")


def _check_int(name: str, value: int, low: int, high: int | None) -> None:
    integer = isinstance(value, int) and not isinstance(value, bool)
    if not integer or value < low or (high is not None and value > high):
        wanted = f"at least {low}" if high is None else f"in [{low}, {high}]"
        raise RequestError(name, f"must be an integer {wanted}, got {value!r:.60}")


def _check_stop(stop: tuple[str, ...]) -> None:
    if not isinstance(stop, tuple) or not all(isinstance(text, str) and text for text in stop):
        raise RequestError("stop", f"must be a tuple of non-empty strings, got {stop!r}")
