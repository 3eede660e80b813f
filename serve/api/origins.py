"""Which web pages may ask an endpoint that asks for no key: its own, and those of the origins that the spec names.

A browser lets any page send requests to any address, loopback included; that the page cannot read the answer does not
keep its prompt from running. By DNS rebinding it could read it, too: its own name then leads to this endpoint. So an
`Origin` must be known, and a `Host` must be an address, which nobody can rebind, or a name of this endpoint.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Sequence
from typing import Protocol

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.api.body import ApiError


class Guarded(Protocol):
    """What is known of an endpoint."""

    doorkeeper: object | None
    cors_origins: Sequence[str]
    host: str | None


class KnownPages:
    """Refuse requests of foreign pages where nobody asks for a key: who has none cannot be asked for one by them."""

    def __init__(
        self, app: ASGIApp, guarded: Callable[[], Guarded], answer: Callable[[str, ApiError], ASGIApp]
    ) -> None:
        """`answer` returns the response to a path and an ApiError."""
        self._app, self._guarded, self._answer = app, guarded, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app, guarded = self._app, self._guarded() if scope["type"] == "http" else None
        if guarded is not None and guarded.doorkeeper is None:
            headers = Headers(scope=scope)
            origins, hosts = headers.getlist("origin"), headers.getlist("host")
            if error := refused(hosts, origins, guarded.host, guarded.cors_origins):
                app = self._answer(scope["path"], error)
        await app(scope, receive, send)


def refused(hosts: Sequence[str], origins: Sequence[str], own: str | None, allowed: Sequence[str]) -> ApiError | None:
    """Return the 403 for a request of a foreign page; None for any other.

    Args:
        hosts: the headers Host.
        origins: the headers Origin: of browsers alone, and not of all their requests.
        own: the name or address that the endpoint listens on; None where it is all of the node's, whose names are
            not known here.
        allowed: origins that the spec names.
    """
    for host in hosts:
        if own is not None and not _is_own(_name(host), own.lower()):
            message = f"the Host {host!r:.100} is not this endpoint's: call it as {own}, localhost or by an address"
            return ApiError(403, message, code="foreign_host")
    for origin in origins:
        named = "*" in allowed or origin in allowed
        if not named and not any(origin.lower().partition("://")[2] == host.lower() for host in hosts):
            message = f"pages of {origin!r:.100} may not call this endpoint; `cors` of its spec names those that may"
            return ApiError(403, message, code="foreign_origin")
    return None


def _name(host: str) -> str:
    """Return a Host without its port, and an address of IPv6 without its brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def _is_own(name: str, own: str) -> bool:
    if name in (own, "localhost") or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
