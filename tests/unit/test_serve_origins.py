"""Which web pages may call an endpoint without keys."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

import httpx
import pytest

from serve.api import routes
from serve.api.callers import ANYONE, Caller
from serve.api.gateway import Gateway
from serve.api.origins import refused


@pytest.mark.parametrize(
    ("hosts", "origins", "own", "allowed", "expected"),
    [
        (["localhost:8000"], [], "127.0.0.1", (), None),
        (["LOCALHOST"], [], "127.0.0.1", (), None),
        (["app.localhost:1"], [], "127.0.0.1", (), None),
        (["127.0.0.1:9999"], [], "127.0.0.1", (), None),
        (["[::1]:8000"], [], "127.0.0.1", (), None),
        (["10.1.2.3:8000"], [], "127.0.0.1", (), None),  # a probe, or a forwarded port: no name leads there
        (["gpu.lan:8000"], [], "gpu.lan", (), None),
        (["GPU.lan"], [], "gpu.LAN", (), None),
        ([], [], "127.0.0.1", (), None),
        (["evil.example"], [], "127.0.0.1", (), "foreign_host"),
        (["evil.example:8000"], ["http://evil.example:8000"], "127.0.0.1", (), "foreign_host"),
        (["localhost.evil.example"], [], "127.0.0.1", (), "foreign_host"),
        (["127.0.0.1.evil.example"], [], "127.0.0.1", (), "foreign_host"),
        (["localhost", "evil.example"], [], "127.0.0.1", (), "foreign_host"),
        ([""], [], "127.0.0.1", (), "foreign_host"),
        (["any.example"], [], None, (), None),
        (["any.example"], ["https://any.example"], None, (), None),
        (["any.example"], ["https://evil.example"], None, (), "foreign_origin"),
        (["localhost:8000"], ["http://localhost:8000"], "127.0.0.1", (), None),
        (["[::1]:8000"], ["http://[::1]:8000"], "::1", (), None),
        (["localhost:8000"], ["http://localhost:3000"], "127.0.0.1", (), "foreign_origin"),
        (["localhost:8000"], ["https://evil.example"], "127.0.0.1", (), "foreign_origin"),
        (["localhost:8000"], ["null"], "127.0.0.1", (), "foreign_origin"),
        (["localhost:8000"], [""], "127.0.0.1", (), "foreign_origin"),
        ([], ["https://evil.example"], "127.0.0.1", (), "foreign_origin"),
        (["localhost:8000"], ["https://app.example"], "127.0.0.1", ("https://app.example",), None),
        (["localhost:8000"], ["https://app.example.evil"], "127.0.0.1", ("https://app.example",), "foreign_origin"),
        (["localhost:8000"], ["https://app.example", "https://b"], "::1", ("https://app.example",), "foreign_origin"),
        (["localhost:8000"], ["https://any.example"], "127.0.0.1", ("*",), None),
        (["evil.example"], ["https://any.example"], "127.0.0.1", ("*",), "foreign_host"),
    ],
)
def test_who_is_foreign(
    hosts: list[str], origins: list[str], own: str | None, allowed: Sequence[str], expected: str | None
) -> None:
    error = refused(hosts, origins, own, allowed)
    assert (error.code if error else None) == expected
    assert error is None or error.status == 403


class Nothing:
    """A backend without models."""

    async def states(self) -> Any:
        return [], Counter()


class Open:
    """A doorkeeper who knows everyone."""

    async def admit(self, text: str | None, path: str) -> Caller:
        return ANYONE


@pytest.mark.parametrize("keys", [False, True])
def test_a_page_s_post_runs_nothing_where_no_key_is_asked(keys: bool) -> None:
    async def scenario() -> None:
        gateway = Gateway(Nothing(), 1000, 1, doorkeeper=Open() if keys else None)  # type: ignore[arg-type]
        gateway.host = "127.0.0.1"
        transport = httpx.ASGITransport(routes.build(lambda: gateway))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000") as client:
            for foreign in ({"origin": "https://evil.example"}, {"host": "evil.example:8000"}):
                sent = {"content-type": "text/plain", **foreign}
                answer = await client.post("/v1/chat/completions", content=b"{}", headers=sent)
                assert answer.status_code == (400 if keys else 403), answer.text
                assert not [name for name in answer.headers if name.startswith("access-control")]
                assert (await client.get("/health", headers=foreign)).status_code == (200 if keys else 403)
            for own in ({"origin": "http://localhost:8000"}, {}):
                assert (await client.post("/v1/chat/completions", content=b"{}", headers=own)).status_code == 400
                assert (await client.get("/", headers=own)).status_code == 200

    asyncio.run(scenario())
