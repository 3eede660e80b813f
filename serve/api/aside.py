"""Large bodies are parsed in another thread, so that streams and health checks go on meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

LARGE = 256 * 1024
"""Bytes of a body; a smaller one takes less time than it would wait for the thread."""
Value = TypeVar("Value")
_thread = ThreadPoolExecutor(1, "tandem-bodies")
"""One for all: parsers hold the interpreter's lock, and each further thread would take its share from the loop."""


async def parsed(size: int, parse: Callable[..., Value], *given: Any) -> Value:
    """Return what `parse` makes of what is given; beside the loop where the body has many bytes (`size`)."""
    if size <= LARGE:
        return parse(*given)
    return await asyncio.get_running_loop().run_in_executor(_thread, parse, *given)
