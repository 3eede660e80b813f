"""The files of the playground as they are served: which there are, under which policy, and nothing from elsewhere."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable

import httpx
import pytest

from serve.api import routes
from serve.api.gateway import Gateway
from serve.page import serving
from tests.support.predictive import Predicting

SOURCES = {path: serving.files()[path].content.decode() for path in serving.PATHS}
SCRIPTS = {path: text for path, text in SOURCES.items() if path.endswith(".js")}


def run(scenario: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
    async def inside() -> None:
        gateway = Gateway(Predicting({}), 1000, 3)
        transport = httpx.ASGITransport(routes.build(lambda: gateway))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            await scenario(client)

    asyncio.run(inside())


def test_every_file_is_served_with_its_type_and_the_policy() -> None:
    async def scenario(client: httpx.AsyncClient) -> None:
        for path in serving.PATHS:
            answer = await client.get(path)
            assert answer.status_code == 200
            assert answer.text == SOURCES[path]
            policy = answer.headers["content-security-policy"]
            assert "default-src 'self'" in policy
            assert "unsafe" not in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
        types = {path: (await client.get(path)).headers["content-type"] for path in ("/", "/page/app.js")}
        assert types == {"/": "text/html; charset=utf-8", "/page/app.js": "text/javascript; charset=utf-8"}

    run(scenario)


def test_the_list_is_what_the_folder_holds() -> None:
    assert sorted([*serving.FILES, serving.INDEX]) == sorted(path.name for path in serving.FOLDER.iterdir())


@pytest.mark.parametrize(
    "path", ["/page/index.html", "/page/../serving.py", "/page/..%2fserving.py", "/page/x.js", "/page"]
)
def test_what_is_not_in_the_list_is_not_there(path: str) -> None:
    async def scenario(client: httpx.AsyncClient) -> None:
        answer = await client.get(path)
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "not_found"

    run(scenario)


def test_files_are_no_part_of_the_api() -> None:
    async def scenario(client: httpx.AsyncClient) -> None:
        told = (await client.get("/openapi.json")).json()["paths"]
        assert "/health" in told
        assert [path for path in told if path == "/" or path.startswith("/page")] == []

    run(scenario)


def test_a_browser_that_has_a_file_gets_none() -> None:
    async def scenario(client: httpx.AsyncClient) -> None:
        first = await client.get("/")
        etag = first.headers["etag"]
        for known in (etag, f'"other", W/{etag}', "*"):
            again = await client.get("/", headers={"if-none-match": known})
            assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
        assert (await client.get("/", headers={"if-none-match": '"other"'})).status_code == 200
        assert first.headers["cache-control"] == "no-cache"
        assert (await client.head("/")).headers["etag"] == etag
        assert (await client.post("/")).status_code == 405

    run(scenario)


def test_modules_import_and_the_page_loads_only_what_is_served() -> None:
    imported = {name for text in SCRIPTS.values() for name in re.findall(r'from "\./([\w.]+)"', text)}
    loaded = set(re.findall(r'(?:src|href)="page/([\w.]+)"', SOURCES["/"]))
    assert imported | loaded == set(serving.FILES)


def test_nothing_comes_from_elsewhere_and_no_text_is_taken_for_html() -> None:
    for path, text in SOURCES.items():
        assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text) == [], path
    for path, text in SCRIPTS.items():
        assert (
            re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text) == []
        ), path
    assert re.findall(r"<style|<script(?![^>]* src=)|\son\w+=|\sstyle=", SOURCES["/"]) == []
