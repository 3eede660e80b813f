"""What runs in a model's replica, around its engine: prompts become tokens here, and predictions come from here.

Nothing of Ray and nothing of HTTP: `serve.deploy` puts these classes into Ray Serve deployments, tests call them as
they are. A request that cannot be served is answered with `Refused`, never with an exception.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Protocol

from serve import quotes
from serve.engines import inputs as sent
from serve.engines import stats
from serve.engines.answer_text import AnswerText
from serve.engines.chat_template import LeftOut, NoChatTemplate
from serve.engines.embedding import vectors
from serve.engines.pacing import interval_s, paced
from serve.engines.prompts import TooLong, encode, is_chat
from serve.engines.protocol import (
    BatchingEngine,
    Delta,
    EmbeddingEngine,
    Engine,
    EngineError,
    GenerationRequest,
    RequestError,
    ResumingEngine,
    SamplingParams,
)
from serve.engines.table import ToolFormat
from serve.engines.text import Decoder
from serve.engines.tools.use import ToolUse
from serve.tensors import described
from serve.wire import Chunk, EmbedCall, GenerateCall, Identity, InferCall, Inferred, Load, Opened, Refused, Vectors

logger = logging.getLogger(__name__)
CODES: dict[type[RequestError], str] = {
    NoChatTemplate: "no_chat_template",
    LeftOut: "unsupported_parameter",
    TooLong: "context_length_exceeded",
}
"""What a refusal is called, where it is called otherwise than `invalid_value`."""
CANNOT_RESUME = "the replica that worked on this request was lost, and this model's engine cannot go on with its text"
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

    def __init__(
        self, engine: Engine, identity: Identity, defaults: Mapping[str, Any], tool_format: ToolFormat = "auto"
    ) -> None:
        """`tool_format` says how the model writes calls of functions; `auto` asks its chat template."""
        self._engine = engine
        self._identity = identity
        self._defaults = dict(defaults)
        self._decoder = Decoder(engine.tokenizer)
        self._tools = ToolUse(engine.tokenizer, tool_format)

    async def start(self) -> None:
        # The first call settles the tokenizer's padding and truncation, which later calls from threads then share.
        self._engine.tokenizer("")
        await self._engine.start()

    async def stop(self) -> None:
        await self._engine.stop()

    async def generate(self, call: GenerateCall) -> AsyncGenerator[Opened | Chunk | Refused, None]:
        """Stream one text: Opened, then chunks, the last with a finish reason. Closing it frees the slot."""
        try:
            request, answer = await asyncio.to_thread(self._prepared, call)
            if call.generated and not self._resumes(request):
                yield Refused(503, CANNOT_RESUME, "replica_lost")
                return
            await self._engine.check(request)
            yield Opened(self._identity, len(request.prompt_token_ids))
            async with aclosing(self._engine.generate(request)) as deltas:
                if request.generated:
                    await _repeat(deltas, answer)
                if answer.ended:
                    yield Chunk("", len(request.generated), "tool_calls")
                    return
                async with aclosing(paced(deltas, self._pause_s)) as joined:
                    async for delta in joined:
                        yield answer.chunk(delta)
                        if answer.ended:
                            return
        except RequestError as error:
            yield Refused(400, str(error), CODES.get(type(error), "invalid_value"), error.field)
        except EngineError as error:
            yield replace(failed(call, error), lost=True)

    def _resumes(self, request: GenerationRequest) -> bool:
        return isinstance(self._engine, ResumingEngine) and self._engine.resumes(request)

    async def embed(self, call: EmbedCall) -> Vectors | Refused:
        """Return a vector for each input, all of them or none."""
        return await _embedded(self._engine, call, self._identity)

    def describe(self) -> dict[str, Any]:
        own = {"max_context": self._engine.max_context, "engine": self._engine.report()}
        return {"inputs": [], "outputs": [], **own}

    def load(self) -> Load:
        load = self._engine.load()
        used, total = load.cache_tokens_used, load.cache_tokens_total
        return Load(load.running, load.waiting, load.tokens_per_second, used, total)

    def healthy(self) -> bool:
        return self._engine.healthy()

    def _pause_s(self) -> float:
        return interval_s(self._engine.load().running)

    def _prepared(self, call: GenerateCall) -> tuple[GenerationRequest, AnswerText]:
        """Return what the engine is asked, and what its answer will be put into. Raises RequestError."""
        ids = encode(self._engine.tokenizer, call, self._engine.max_context, self._tools.format(call))
        max_tokens = self._engine.max_context - len(ids) if call.max_tokens is None else call.max_tokens
        # an echoed prompt is scored too, and max_tokens may then be 0
        scoring = {"prompt_logprobs": call.echo and (max_tokens == 0 or call.sampling.get("logprobs") is not None)}
        wanted = self._tools.sampling(call) if call.tools else {}
        params = SamplingParams(**{**self._defaults, **call.sampling, **scoring, **wanted, "max_tokens": max_tokens})
        if params.num_beams > 1:
            raise RequestError("num_beams", "the engine that serves this model makes no beam search: leave it out")
        noted = stats.current()
        request = GenerationRequest(call.request_id, ids, params, not is_chat(call), call.generated, noted)
        return request, AnswerText(call, request, self._decoder, self._engine.tokenizer, self._tools.parser(call))


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
            return failed(call, error)

    async def embed(self, call: EmbedCall) -> Vectors | Refused:
        """Return a vector for each input, all of them or none."""
        return await _embedded(self._engine, call, self._identity)

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


async def _embedded(engine: Any, call: EmbedCall, identity: Identity) -> Vectors | Refused:
    if not isinstance(engine, EmbeddingEngine):
        return Refused(400, "this model, as it is served here, makes no embeddings", "unsupported_task", "model")
    try:
        return await vectors(engine, call, identity)
    except RequestError as error:
        return Refused(400, str(error), CODES.get(type(error), "invalid_value"), error.field)
    except EngineError as error:
        return failed(call, error)


async def _repeat(deltas: AsyncGenerator[Delta, None], answer: AnswerText) -> None:
    """Put what another replica has generated into the answer; what it shows of that is with the client already.

    What it holds back is not: so half a character, a stop string or a call that lies across the cut comes out whole.
    """
    await asyncio.to_thread(answer.chunk, await anext(deltas))


def failed(call: GenerateCall | InferCall | EmbedCall, error: EngineError) -> Refused:
    """Return what a client is told of an engine's failure; what failed inside is for the log."""
    logger.error("request %s: %s", call.request_id, quotes.unquoted(str(error), call))
    said = f"the engine failed while it worked on this request; its log has the reason, under {call.request_id}"
    return Refused(500, said, "engine_failed")
