"""What a handle of one of our actors looks like, over the actor itself in this process; it may die."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any


class Handle:
    """Passes calls on, each answered at the loop's next turn, as long as the actor lives."""

    def __init__(self, actor: Any) -> None:
        self.actor, self.lives = actor, True

    def __getattr__(self, name: str) -> Method:
        return Method(self, name)


class Method:
    """One method of it."""

    def __init__(self, handle: Handle, name: str) -> None:
        self._handle, self._name = handle, name

    def remote(self, *arguments: Any) -> asyncio.Future[Any]:
        return asyncio.ensure_future(self._answered(arguments))

    async def _answered(self, arguments: tuple[Any, ...]) -> Any:
        from ray.exceptions import ActorDiedError

        await asyncio.sleep(0)
        if not self._handle.lives:
            raise ActorDiedError
        answer = getattr(self._handle.actor, self._name)(*arguments)
        return await answer if inspect.isawaitable(answer) else answer
