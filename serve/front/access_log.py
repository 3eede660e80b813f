"""The access log: a line of JSON for each request, written once a second by another thread."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from pathlib import Path

from serve.front.exchange import Exchange

logger = logging.getLogger(__name__)
_encode = json.JSONEncoder(separators=(",", ":")).encode
FLUSH_S = 1.0
MOST_BYTES = 100 * 1024 * 1024
KEPT = 5
"""Full files that are kept beside the one that is written."""
MOST_WAITING = 100_000
"""Lines that wait for a disk that does not take them; further ones are counted, and the log says how many."""


class AccessLog:
    """The log of one gateway."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ended: list[Exchange] = []
        self._lost = 0
        self._task: asyncio.Task[None] | None = None

    def add(self, ended: Exchange) -> None:
        """Take note of a request that has ended."""
        ended.ended = time.monotonic()
        if len(self._ended) < MOST_WAITING:
            self._ended.append(ended)
        else:
            self._lost += 1

    def start(self) -> None:
        """Begin to write."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Write what is left."""
        if self._task is not None:
            self._task.cancel()
        await self._flush()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_S)
            await self._flush()

    async def _flush(self) -> None:
        ended, self._ended = self._ended, []
        lost, self._lost = self._lost, 0
        if not ended and not lost:
            return
        try:
            await asyncio.to_thread(self._write, ended, lost)
        except OSError as error:
            self._lost += lost + len(ended)
            logger.error("%s: %d lines could not be written: %s", self.path, len(ended), error.strerror)

    def _write(self, ended: list[Exchange], lost: int) -> None:
        records = [*(each.record() for each in ended), *([{"lost": lost}] if lost else [])]
        content = "".join(f"{_encode(record)}\n" for record in records).encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write(content)
            full = file.tell() >= MOST_BYTES
        if full:
            for number in range(KEPT, 0, -1):
                older = self._numbered(number)
                if older.exists():
                    older.replace(self._numbered(number + 1)) if number < KEPT else older.unlink()
            self.path.replace(self._numbered(1))

    def _numbered(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}")
