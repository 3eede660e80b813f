"""Streams of generated text, from replicas to one answer: opened together, collected whole or sent as events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Protocol, TypeVar

from serve.api.body import ApiError
from serve.api.openai_answers import Answer, Text, usage
from serve.api.openai_api import Generation
from serve.metrics import watch
from serve.wire import CallPiece, Chunk, Opened, Refused, ScoredToken

Stream = AsyncGenerator[Opened | Chunk | Refused, None]
Count = Callable[[int], None]
Result = TypeVar("Result")


class OtherVersion(ApiError):
    """The replica that worked on a text is lost, and those that are left are of another version or other settings."""


class Form(Protocol):
    """How an answer goes to the client. `count` is told of all generated tokens so far, and may raise ApiError."""

    async def whole(self, streams: Sequence[Stream], prompt_tokens: int, count: Count) -> dict[str, Any]:
        """Return the body of an answer that is not streamed."""
        ...

    def events(self, streams: Sequence[Stream], prompt_tokens: int, count: Count) -> AsyncIterator[bytes]:
        """Send the answer as server-sent events."""
        ...


class Choices:
    """The form of chat completions and completions."""

    def __init__(self, generation: Generation, fingerprint: str) -> None:
        self._generation, self._answer = generation, Answer(generation, fingerprint)

    async def whole(self, streams: Sequence[Stream], prompt_tokens: int, count: Count) -> dict[str, Any]:
        return await collect(self._answer, streams, prompt_tokens, count)

    def events(self, streams: Sequence[Stream], prompt_tokens: int, count: Count) -> AsyncIterator[bytes]:
        return events(self._answer, self._generation, streams, prompt_tokens, count)


def accepted(message: Any) -> Any:
    """Return the message, or raise the ApiError that a refusal stands for."""
    if isinstance(message, Refused):
        retry = {"retry-after": "1"} if message.status == 503 else {}
        raise ApiError(message.status, message.message, code=message.code, param=message.param, headers=retry)
    return message


async def open_all(streams: Sequence[Stream]) -> list[Opened]:
    """Wait until every stream is accepted. One refusal closes them all and is raised as ApiError."""
    try:
        return await _together([_open(stream) for stream in streams])
    except BaseException:
        await close_all(streams)
        raise


async def chunks(stream: Stream, count: Count) -> AsyncIterator[Chunk]:
    """Yield the chunks of one stream, each counted first. Raises ApiError for a refusal, and where `count` does."""
    async for message in stream:
        chunk: Chunk = accepted(message)
        count(chunk.completion_tokens)
        yield chunk


async def collect(
    answer: Answer, streams: Sequence[Stream], prompt_tokens: int, count: Count = lambda _: None
) -> dict[str, Any]:
    """Return the whole answer; `count` is told of all generated tokens so far, and may raise ApiError."""
    tokens = [0] * len(streams)
    try:
        results = await _together([_whole_text(stream, at, tokens, count) for at, stream in enumerate(streams)])
    finally:
        await close_all(streams)
    counted = usage(prompt_tokens, sum(tokens for _, tokens in results))
    return answer.whole([text for text, _ in results], counted)


async def _whole_text(stream: Stream, at: int, counted: list[int], count: Count) -> tuple[Text, int]:
    """Return a stream's text, and how many tokens were chosen for it; `counted` has those of all streams."""
    pieces: list[str] = []
    scored: list[ScoredToken] = []
    calls: list[CallPiece] = []
    reason, tokens = None, 0
    async for message in stream:
        chunk: Chunk = accepted(message)
        pieces.append(chunk.text)
        scored += chunk.tokens
        calls += chunk.calls
        reason, tokens = chunk.finish_reason, chunk.completion_tokens
        counted[at] = tokens
        count(sum(counted))
    return Text("".join(pieces), reason, scored, calls), tokens


async def events(
    answer: Answer, generation: Generation, streams: Sequence[Stream], prompt_tokens: int, count: Count = lambda _: None
) -> AsyncIterator[bytes]:
    """Send the streams as server-sent events. An error in the middle is a chunk with `error`, and the last one.

    `count` is told of all generated tokens so far before they are sent, and may raise ApiError.
    """
    completion_tokens = [0] * len(streams)
    try:
        for index in range(len(streams)):
            if opening := answer.opening(index):
                counted = {"usage": usage(prompt_tokens, 0)} if generation.continuous_usage else {}
                yield _event(opening | counted)
        async with aclosing(_merged(streams)) as merged:
            async for index, chunk in merged:
                completion_tokens[index] = chunk.completion_tokens
                count(sum(completion_tokens))
                if chunk.text or chunk.finish_reason or chunk.tokens or chunk.calls:
                    told = usage(prompt_tokens, sum(completion_tokens)) if generation.continuous_usage else None
                    text = Text(chunk.text, chunk.finish_reason, chunk.tokens, chunk.calls)
                    yield _event(answer.chunk(index, text, told))
        if generation.include_usage:
            yield _event(answer.closing(usage(prompt_tokens, sum(completion_tokens))))
        yield b"data: [DONE]\n\n"
    except ApiError as error:
        watch.current().error(error.code)
        yield _event(error.body())
    finally:
        await close_all(streams)


async def _merged(streams: Sequence[Stream]) -> AsyncGenerator[tuple[int, Chunk], None]:
    """Interleave the chunks of several streams as they come, with the index of each."""
    if len(streams) == 1:
        async for message in streams[0]:
            yield 0, accepted(message)
        return
    arrived: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
    readers = [asyncio.create_task(_read(stream, index, arrived)) for index, stream in enumerate(streams)]
    try:
        reading = len(readers)
        while reading:
            index, message = await arrived.get()
            if isinstance(message, BaseException):
                raise message
            reading -= message is None
            if message is not None:
                yield index, accepted(message)
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)


async def _read(stream: Stream, index: int, arrived: asyncio.Queue[tuple[int, Any]]) -> None:
    """Put every message of a stream, then None or the exception that ended it."""
    try:
        async for message in stream:
            arrived.put_nowait((index, message))
        arrived.put_nowait((index, None))
    except Exception as error:
        arrived.put_nowait((index, error))


def _event(value: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def _open(stream: Stream) -> Opened:
    opened: Opened = accepted(await anext(stream))
    return opened


async def _together(work: Sequence[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Run coroutines side by side; when one fails, end the others before raising (gather would let them run on)."""
    tasks = [asyncio.ensure_future(part) for part in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def close_all(streams: Sequence[Stream]) -> None:
    """Close streams that no task is reading any more, which frees their slots."""
    await asyncio.gather(*(stream.aclose() for stream in streams), return_exceptions=True)
