"""Where the messages of one stream wait for whoever reads it.

Chunks that a reader has not taken yet are joined: a gateway that is busy, or a client that reads slowly, gets fewer and
larger ones, and what waits stays as small as its text.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from serve.wire import Chunk

MOST_APART = 64
"""Chunks that may wait unjoined."""


class Ended(Exception):
    """The stream is complete."""


class Mailbox:
    """The messages of one stream, in order, and then how it ended."""

    def __init__(self, on_end: Callable[[], None] = lambda: None) -> None:
        """`on_end` is called once, when nothing more will come, whether what came was read or not."""
        self._on_end = on_end
        self._messages: deque[Any] = deque()
        self._end: Exception | None = None
        self._arrived: asyncio.Future[None] | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self._end is not None

    def put(self, message: Any) -> None:
        """Add a message."""
        if len(self._messages) >= MOST_APART:
            self._messages = deque(_joined_runs(self._messages))
        self._messages.append(message)
        self._wake()

    def end(self, how: Exception | None = None) -> None:
        """Say that nothing more comes, and what the reader is to be told after all messages; the first word counts."""
        if self._end is None:
            self._end = how or Ended()
            self._on_end()
            self._wake()

    async def take(self) -> Any:
        """Return the next message: all chunks that wait, as one.

        Raises:
            Ended: the stream is complete.
            Exception: what `end` was given.
        """
        while not self._messages:
            if self._end is not None:
                raise self._end
            self._arrived = asyncio.get_running_loop().create_future()
            await self._arrived
        first = self._messages.popleft()
        if type(first) is not Chunk or not self._messages:
            return first
        run = [first]
        while self._messages and type(self._messages[0]) is Chunk:
            run.append(self._messages.popleft())
        return joined(run)

    def _wake(self) -> None:
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)


def joined(chunks: Sequence[Chunk]) -> Chunk:
    """Return consecutive chunks of one stream as one. Pure."""
    last = chunks[-1]
    return Chunk(
        text="".join(each.text for each in chunks),
        completion_tokens=last.completion_tokens,
        finish_reason=last.finish_reason,
        tokens=tuple(token for each in chunks for token in each.tokens),
        calls=tuple(piece for each in chunks for piece in each.calls),
        ids=tuple(token for each in chunks for token in each.ids),
    )


def _joined_runs(messages: Sequence[Any]) -> list[Any]:
    """Return the messages with every run of chunks as one."""
    runs: list[list[Any]] = []
    for message in messages:
        if runs and type(message) is Chunk and type(runs[-1][-1]) is Chunk:
            runs[-1].append(message)
        else:
            runs.append([message])
    return [run[0] if len(run) == 1 else joined(run) for run in runs]
