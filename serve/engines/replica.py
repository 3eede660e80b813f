"""What runs in a model's replica, around its engine: prompts become tokens here, and predictions come from here.

Nothing of Ray and nothing of HTTP: `serve.deploy` puts these classes into Ray Serve deployments, tests call them as
they are. A request that cannot be served is answered with `Refused`, never with an exception.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, Protocol

from serve.engines import inputs as sent
from serve.engines.pacing import interval_s, paced
from serve.engines.protocol import (
    BatchingEngine,
    Delta,
    Engine,
    EngineError,
    GenerationRequest,
    RequestError,
    SamplingParams,
    TokenLogprobs,
)
from serve.engines.text import Decoder
from serve.tensors import described
from serve.wire import Chunk, GenerateCall, Identity, InferCall, Inferred, Load, Opened, Prompt, Refused, ScoredToken

logger = logging.getLogger(__name__)
GENERATION_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""What a model's generation_config.json may set for requests that do not."""
ROWS_AT_ONCE = 256
"""Rows of one request that are handed to an engine together: a small body can hold millions of empty texts."""


class Replica(Protocol):
    """What an engine's `load` returns: what Ray Serve asks of a model's replica.

    It has `generate` beside this, like GenerativeReplica, or `infer`, like PredictiveReplica, as its tasks ask.
    """

    async def start(self) -> None:
        """Make the replica ready; returns when it is."""

    async def stop(self) -> None:
        """Fail what still runs, and release threads and memory."""

    def healthy(self) -> bool:
        """Return False when the replica should be replaced."""

    def load(self) -> Load:
        """Return how busy it is; called twice a second."""

    def describe(self) -> dict[str, Any]:
        """Return `inputs` and `outputs` as in the Open Inference Protocol, and what else is worth telling, as JSON."""


class GenerativeReplica:
    """Serves one generative engine."""

    def __init__(self, engine: Engine, identity: Identity, defaults: Mapping[str, Any]) -> None:
        self._engine = engine
        self._identity = identity
        self._defaults = dict(defaults)
        self._decoder = Decoder(engine.tokenizer)

    async def start(self) -> None:
        # The first call settles the tokenizer's padding and truncation, which later calls from threads then share.
        self._engine.tokenizer("")
        await self._engine.start()

    async def stop(self) -> None:
        await self._engine.stop()

    async def generate(self, call: GenerateCall) -> AsyncGenerator[Opened | Chunk | Refused, None]:
        """Stream one text: Opened, then chunks, the last with a finish reason. Closing it frees the slot."""
        try:
            request = await self._request(call)
            await self._engine.check(request)
            yield Opened(self._identity, len(request.prompt_token_ids))
            prefix = self._text(call.prompt) if call.echo else ""
            async with aclosing(paced(self._engine.generate(request), self._pause_s)) as deltas:
                async for delta in deltas:
                    yield self._chunk(prefix, delta, request)
                    prefix = ""
        except RequestError as error:
            yield Refused(400, str(error), "invalid_value", error.field)
        except _PromptError as error:
            yield error.refusal
        except EngineError as error:
            yield Refused(500, f"the engine failed while it worked on this request: {error}", "engine_failed")

    def describe(self) -> dict[str, Any]:
        own = {"max_context": self._engine.max_context, "engine": self._engine.report()}
        return {"inputs": [], "outputs": [], **own}

    def load(self) -> Load:
        load = self._engine.load()
        used, total = load.cache_tokens_used, load.cache_tokens_total
        return Load(load.running, load.waiting, load.tokens_per_second, used, total)

    def healthy(self) -> bool:
        return self._engine.healthy()

    def _chunk(self, prefix: str, delta: Delta, request: GenerationRequest) -> Chunk:
        wanted = request.params.logprobs is not None
        scored = [self._scored(entry) for entry in (*delta.prompt_logprobs, *delta.logprobs)] if wanted else []
        return Chunk(prefix + delta.text, delta.completion_tokens, delta.finish_reason, tuple(scored))

    def _scored(self, entry: TokenLogprobs) -> ScoredToken:
        raw = self._decoder.token_bytes
        return ScoredToken(raw(entry.token), entry.logprob, tuple((raw(token), value) for token, value in entry.top))

    def _text(self, prompt: Prompt) -> str:
        """Return a completion's prompt as text."""
        if isinstance(prompt, str):
            return prompt
        ids = [token for token in prompt if isinstance(token, int)]
        return b"".join(map(self._decoder.token_bytes, ids)).decode(errors="replace")

    def _pause_s(self) -> float:
        return interval_s(self._engine.load().running)

    async def _request(self, call: GenerateCall) -> GenerationRequest:
        ids = await asyncio.to_thread(encode, self._engine.tokenizer, call.prompt)
        room = self._engine.max_context - len(ids)
        if room < (call.max_tokens != 0):
            raise _too_long(call.prompt, len(ids), self._engine.max_context)
        max_tokens = room if call.max_tokens is None else call.max_tokens
        # an echoed prompt is scored too, and max_tokens may then be 0
        scoring = {"prompt_logprobs": call.echo and (max_tokens == 0 or call.sampling.get("logprobs") is not None)}
        params = SamplingParams(**{**self._defaults, **call.sampling, **scoring, "max_tokens": max_tokens})
        return GenerationRequest(call.request_id, ids, params)


class PredictiveReplica:
    """Serves a task that answers at once, through an engine that batches what arrives together.

    Without `outputs` it describes what the engine makes of one blank instance, which it is asked for at the start.
    """

    def __init__(
        self,
        engine: BatchingEngine,
        inputs: list[dict[str, Any]],
        identity: Identity,
        outputs: Sequence[dict[str, Any]] = (),
    ) -> None:
        self._engine = engine
        self._inputs = inputs
        self._outputs = list(outputs)
        self._identity = identity

    async def start(self) -> None:
        await self._engine.start()
        if not self._outputs:
            self._outputs = await self._observed()

    async def stop(self) -> None:
        await self._engine.stop()

    async def infer(self, call: InferCall) -> Inferred | Refused:
        """Predict for every row of the inputs."""
        try:
            instances = sent.rows(call.inputs, self._inputs)
            predictions: list[dict[str, Any]] = []
            for start in range(0, len(instances), ROWS_AT_ONCE):
                some = enumerate(instances[start : start + ROWS_AT_ONCE], start)
                predictions += await asyncio.gather(*(self._predict(at, len(instances), each) for at, each in some))
            return Inferred(self._identity, predictions)
        except ValueError as error:  # InputError, TaskError and RequestError are among them
            return Refused(400, str(error), "invalid_value", "inputs")
        except EngineError as error:
            return Refused(500, f"the engine failed while it worked on this request: {error}", "engine_failed")

    def describe(self) -> dict[str, Any]:
        return {"inputs": self._inputs, "outputs": self._outputs}

    async def _predict(self, number: int, count: int, instance: Any) -> dict[str, Any]:
        try:
            return await self._engine.predict(instance)
        except ValueError as error:
            raise ValueError(f"row {number}: {error}" if count > 1 else str(error)) from error

    async def _observed(self) -> list[dict[str, Any]]:
        try:
            return described(await self._engine.predict(sent.blank(self._inputs)))
        except Exception as error:  # the code is the user's own: a model that refuses a blank instance still serves
            logger.info("the outputs are not described: a blank instance was refused (%r)", error)
            return []

    def load(self) -> Load:
        load = self._engine.load()
        return Load(load.running, load.waiting, load.tokens_per_second)

    def healthy(self) -> bool:
        return self._engine.healthy()


def encode(tokenizer: Any, prompt: Prompt) -> tuple[int, ...]:
    """Return the token ids of a prompt in any of its forms. Raises a refusal for one that has no tokens."""
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    elif isinstance(prompt[0], int):
        ids = prompt
        if max(ids) >= len(tokenizer):  # type: ignore[type-var]
            message = f"prompt: token id {max(ids)} is outside the vocabulary of {len(tokenizer)}"  # type: ignore[type-var]
            raise _PromptError(Refused(400, message, "invalid_value", "prompt"))
    else:
        ids = _templated(tokenizer, [dict(message) for message in prompt])  # type: ignore[call-overload]
    if not ids:
        raise _PromptError(Refused(400, "the prompt has no tokens", "invalid_value", "prompt"))
    return tuple(ids)


def generation_defaults(directory: Path) -> dict[str, Any]:
    """Return the sampling settings that the model's generation_config.json asks for."""
    path = directory / "generation_config.json"
    if not path.exists():
        return {}
    config = json.loads(path.read_text(encoding="utf-8"))
    return {name: config[name] for name in GENERATION_DEFAULTS if config.get(name) is not None}


class _PromptError(Exception):
    def __init__(self, refusal: Refused) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


def _templated(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        message = "this model has no chat template; use /v1/completions"
        raise _PromptError(Refused(400, message, "no_chat_template", "messages"))
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        message = f"the model's chat template refuses these messages: {error}"
        raise _PromptError(Refused(400, message, "invalid_value", "messages")) from None
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _too_long(prompt: Prompt, tokens: int, max_context: int) -> _PromptError:
    message = f"this model's context is {max_context} tokens and the prompt has {tokens}: shorten it"
    param = "messages" if not isinstance(prompt, str) and isinstance(prompt[0], dict) else "prompt"
    return _PromptError(Refused(400, message, "context_length_exceeded", param))
