"""Who calls: every route but the health path and the playground's files asks for a key where keys are required."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.api.body import ApiError
from serve.front import exchange
from serve.keys.limits import Limits
from serve.page import serving

HEALTHZ = "/-/healthz"
"""What Ray Serve's proxies answer, and KubeRay asks: whether this gateway takes requests."""
OPEN_PATHS = ("/health", HEALTHZ, *serving.PATHS)
"""What needs no key: what a load balancer or kubelet asks, and static files, which hold no data.

Compared with the path that is routed, never with a URL.
"""
SCOPE_KEY = "tandem.caller"


@dataclass(frozen=True)
class Caller:
    """Whom a request is counted for."""

    key: str
    """The key's name; empty where no key is needed."""
    limits: Limits


ANYONE = Caller("", Limits())


class Doorkeeper(Protocol):
    """Knows the keys."""

    async def admit(self, text: str | None, path: str) -> Caller:
        """Return who comes with this secret (None: with none). Raises ApiError (401, 503)."""
        ...


class KeysRequired:
    """Ask for a key before anything else is read. Without a doorkeeper everyone is ANYONE."""

    def __init__(
        self,
        app: ASGIApp,
        doorkeeper: Callable[[], Doorkeeper | None],
        answer: Callable[[str, ApiError], ASGIApp],
    ) -> None:
        """`doorkeeper` returns a Doorkeeper or None; `answer` the response to a path and an ApiError."""
        self._app, self._doorkeeper, self._answer = app, doorkeeper, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        doorkeeper = self._doorkeeper() if scope["type"] == "http" and scope["path"] not in OPEN_PATHS else None
        if doorkeeper is None:
            await self._app({**scope, SCOPE_KEY: ANYONE}, receive, send)
            return
        try:
            caller = await doorkeeper.admit(bearer(Headers(scope=scope)), scope["path"])
        except ApiError as error:
            await self._answer(scope["path"], error)(scope, receive, send)
            return
        exchange.current().key = caller.key
        await self._app({**scope, SCOPE_KEY: caller}, receive, send)


def bearer(headers: Headers) -> str | None:
    """Return the key that a request carries in `Authorization: Bearer …`. Raises ApiError (401) for another form."""
    sent = headers.getlist("authorization")
    if not sent:
        return None
    scheme, _, text = sent[0].partition(" ")
    if len(sent) > 1 or scheme.lower() != "bearer":
        raise unauthorized()
    return text


def of(request: Request) -> Caller:
    """Return who sent a request that KeysRequired let through."""
    caller: Caller = request.scope[SCOPE_KEY]
    return caller


def forbidden(message: str) -> ApiError:
    """Return the 403 of a valid key that may not do this."""
    return ApiError(403, message, code="permission_denied")


def unauthorized() -> ApiError:
    """Return the 401: the same for a missing, wrong, revoked and expired key, so that nothing is learned from it."""
    message = "a valid API key is needed: send it as `Authorization: Bearer KEY`"
    return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
