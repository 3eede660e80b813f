"""The bodies that a gateway holds until they are parsed: no limit of a key is asked before, so their sum is bounded."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from starlette.requests import Request

from serve.api import content
from serve.api.aside import LARGE
from serve.api.body import ApiError, check_content_type

MOST_HELD = 256 * 1024 * 1024
KEPT_FOR_SMALL = 0.25
"""Part of the room that large bodies leave to others, so that a few that never end do not keep everyone out."""


class Held:
    """One body's part of the room."""

    def __init__(self, room: Room) -> None:
        self._room, self.size = room, 0

    def grow(self, size: int) -> None:
        """Take room for a body that has `size` bytes by now. Raises ApiError (503) where there is none."""
        more = max(0, size - self.size)
        if self._room.held + more > self._room.most * (1 - KEPT_FOR_SMALL if size > LARGE else 1):
            message = "this gateway has as many bodies to read as it can hold; try again"
            raise ApiError(503, message, code="too_many_bodies", headers={"retry-after": "1"})
        self._room.held += more
        self.size += more


class Room:
    """The room for all bodies of one gateway."""

    def __init__(self, most: int) -> None:
        self.most, self.held = most, 0

    @contextmanager
    def part(self) -> Iterator[Held]:
        """Give a body its part, and take it back."""
        part = Held(self)
        try:
            yield part
        finally:
            self.held -= part.size


class Bodies:
    """Reads the bodies of requests."""

    def __init__(self, most: int, held: int = MOST_HELD) -> None:
        """`most`: bytes of one body; `held`: of all, at the same time, but two of the largest have room in any case."""
        self._most = most
        self.room = Room(max(held, int(2 * most / (1 - KEPT_FOR_SMALL)) + 1))

    @asynccontextmanager
    async def of(
        self, request: Request, check: Callable[[str | None], None] = check_content_type
    ) -> AsyncIterator[bytes]:
        """Give the body of a request, which is held until it is parsed. Raises ApiError (400, 413, 415, 503).

        Args:
            check: raises ApiError for a content type that the route does not read.
        """
        check(request.headers.get("content-type"))
        content.check_length(request.headers.get("content-length"), self._most)
        coding = ", ".join(request.headers.getlist("content-encoding"))
        with self.room.part() as part:
            yield await content.read(request.stream(), coding, self._most, part.grow)
