"""HTTP around the routes: HEAD, cross-origin requests, coded bodies, strict JSON, old clients, helpful 404s."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from serve.api import content, routes
from serve.api.body import ApiError, parse_json
from serve.api.callers import ANYONE
from serve.api.gateway import Gateway
from serve.api.refusals import rate_headers, spent
from serve.api.routes import not_found
from serve.keys.limiter import Rate, Verdict
from tests.support import in_process, predictive, tiny_models
from tests.support.in_process import CARD, InProcess
from tests.support.predictive import MOST, Predicting, Scenario

PART = {"name": "image", "shape": [1, 8, 8], "datatype": "UINT8", "data": list(range(64))}
BODY = {"inputs": [PART]}
INFER = "/v2/models/shapes/infer"
GOOD = "https://app.example"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any]]:
    return {"shapes": predictive.models(tmp_path_factory.mktemp("shapes"))["shapes"]}


@pytest.fixture
def serve(loaded: Any) -> Any:
    def with_models(scenario: Scenario, *cors_origins: str) -> None:
        predictive.run(loaded, scenario, cors_origins)

    return with_models


def test_head_wherever_there_is_get(serve: Any) -> None:
    async def scenario(client: httpx.AsyncClient, backend: Predicting) -> None:
        paths = ["/health", "/status", "/v1/models", "/v1/models/shapes", "/v2", "/v2/health/live", "/v2/health/ready",
                 "/v2/models/shapes", "/v2/models/shapes/ready", "/v2/models/shapes/versions/1"]  # fmt: skip
        for path in paths:
            assert (await client.head(path)).status_code == (await client.get(path)).status_code == 200
        assert (await client.head("/v1/models/nope")).status_code == 404
        refused = await client.head(INFER)
        assert (refused.status_code, refused.headers["allow"]) == (405, "POST")

    serve(scenario)


def preflight(client: httpx.AsyncClient, origin: str) -> Any:
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    return client.options("/v1/chat/completions", headers={"origin": origin, **asked})


def test_no_origin_is_let_in_by_default(serve: Any) -> None:
    async def scenario(client: httpx.AsyncClient, backend: Predicting) -> None:
        for answer in (await preflight(client, GOOD), await client.get("/health", headers={"origin": GOOD})):
            assert not [name for name in answer.headers if name.startswith("access-control")]
        assert (await preflight(client, GOOD)).status_code == 403

    serve(scenario)


def test_only_the_origins_of_the_spec_are_let_in(serve: Any) -> None:
    async def scenario(client: httpx.AsyncClient, backend: Predicting) -> None:
        allowed = await preflight(client, GOOD)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == GOOD
        assert allowed.headers["access-control-allow-headers"] == "authorization,content-type"
        for path in ("/health", "/v1/models/nope"):  # errors too: a script that cannot read them shows nothing
            answer = await client.get(path, headers={"origin": GOOD})
            assert answer.headers["access-control-allow-origin"] == GOOD
        for other in ("https://evil.example", "http://app.example", f"{GOOD}.evil", "null"):
            assert (await preflight(client, other)).status_code == 400
            answer = await client.get("/health", headers={"origin": other})
            assert "access-control-allow-origin" not in answer.headers

    serve(scenario, GOOD)


def test_any_origin_where_the_spec_says_so(serve: Any) -> None:
    async def scenario(client: httpx.AsyncClient, backend: Predicting) -> None:
        answer = await client.post(INFER, json=BODY, headers={"origin": "https://any.example"})
        assert answer.headers["access-control-allow-origin"] == "*"
        exposed = answer.headers["access-control-expose-headers"].split(", ")
        verdict = Verdict(None, 0.0, 0, Rate(5, 4, 1.0), Rate(5, 4, 1.0))
        said = (*rate_headers(verdict), *spent(ANYONE).headers, "x-tandem-model-version", "retry-after")
        assert set(said) <= set(exposed)

    serve(scenario, "*")


@pytest.mark.parametrize(
    ("coding", "packed"),
    [
        ("gzip", gzip.compress(json.dumps(BODY).encode(), mtime=0)),
        ("x-gzip", gzip.compress(json.dumps(BODY).encode(), mtime=0)),
        (" GZIP ", gzip.compress(json.dumps(BODY).encode(), mtime=0)),
        (
            "gzip",
            gzip.compress(json.dumps(BODY).encode()[:50], mtime=0)
            + gzip.compress(json.dumps(BODY).encode()[50:], mtime=0),
        ),
        ("deflate", zlib.compress(json.dumps(BODY).encode())),
        ("identity", json.dumps(BODY).encode()),
        ("", json.dumps(BODY).encode()),
    ],
)
def test_coded_bodies_are_read(serve: Any, coding: str, packed: bytes) -> None:
    async def scenario(client: httpx.AsyncClient, backend: Predicting) -> None:
        plain = await client.post(INFER, json=BODY)
        answer = await client.post(INFER, content=packed, headers={"content-encoding": coding})
        assert answer.status_code == 200, answer.text
        assert answer.json() == plain.json()

    serve(scenario)


@pytest.mark.parametrize("coding", ["br", "zstd", "compress", "gzip, gzip", "gzip, br", "nonsense"])
def test_other_codings_are_a_415_that_names_them(serve: Any, coding: str) -> None:
    async def scenario(client: httpx.AsyncClient, backend: Predicting) -> None:
        answer = await client.post("/v1/chat/completions", content=b"{}", headers={"content-encoding": coding})
        assert answer.status_code == 415
        assert f"content-encoding '{coding}' is not read here" in answer.json()["error"]["message"]
        assert answer.headers["accept-encoding"] == "gzip, deflate"

    serve(scenario)


async def parts(raw: bytes, size: int) -> AsyncIterator[bytes]:
    for at in range(0, len(raw), size):
        yield raw[at : at + size]


def read(raw: bytes, coding: str | None, most: int, size: int = 1000) -> bytes:
    return asyncio.run(content.read(parts(raw, size), coding, most))


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_body_is_unpacked_in_whatever_parts_it_comes(size: int) -> None:
    raw = bytes(range(256)) * 20
    two = gzip.compress(raw[:3000]) + gzip.compress(raw[3000:])
    assert read(two, "gzip", len(raw), size) == raw
    assert read(zlib.compress(raw), "deflate", len(raw), size) == raw


@pytest.mark.parametrize("most", [100, 999])
def test_the_bound_holds_for_what_is_unpacked(most: int) -> None:
    packed = gzip.compress(b"a" * 1000)
    assert len(packed) < 100
    assert read(packed, "gzip", 1000) == b"a" * 1000
    with pytest.raises(ApiError) as caught:
        read(packed, "gzip", most)
    assert caught.value.status == 413


def test_a_bomb_is_cut_at_the_bound() -> None:
    packed = gzip.compress(b"\0" * 50_000_000)
    fed = 0

    async def counted() -> AsyncIterator[bytes]:
        nonlocal fed
        async for part in parts(packed, 100):
            fed += len(part)
            yield part

    with pytest.raises(ApiError) as caught:
        asyncio.run(content.read(counted(), "gzip", 1_000_000))
    assert caught.value.status == 413
    assert fed < len(packed) / 10  # what came after the bound was never read
    unpack = content.Unpacker("gzip", 31, 1000)
    assert len(unpack.feed(packed)) == 1001


@pytest.mark.parametrize(
    ("coding", "raw", "said"),
    [
        ("gzip", b"plain text", "no valid gzip"),
        ("gzip", gzip.compress(b"a" * 100, mtime=0)[:-3], "ends too early"),
        ("gzip", b"", "ends too early"),
        ("gzip", gzip.compress(b"a", mtime=0) + b"more", "no valid gzip"),
        ("gzip", gzip.compress(b"a" * 100, mtime=0)[:-8] + b"\0" * 8, "no valid gzip"),
        ("deflate", zlib.compress(b"a") + b"more", "4 bytes follow its end"),
        ("deflate", gzip.compress(b"a", mtime=0), "no valid deflate"),
    ],
)
def test_broken_coded_bodies(coding: str, raw: bytes, said: str) -> None:
    with pytest.raises(ApiError, match=said) as caught:
        read(raw, coding, 1000)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "it is empty"),
        (b"  ", "it is empty"),
        (b"{", "not valid JSON"),
        (b"model=chat&prompt=a", "not valid JSON"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', 'the key "c" is given twice'),
        (b'{"a": NaN}', "NaN is not a JSON value"),
        (b'{"a": -Infinity}', "-Infinity is not a JSON value"),
        (b'{"a": 1e999}', "1e999 is out of range"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not valid JSON"),
        (b'{"a": "\\ud83d"}', "half a surrogate pair"),
        (b'{"a": ' + b"[" * 100_000 + b"}", "nested too deeply"),
        (b'{"a": "\xe9"}', "byte 7 is 0xe9, which is not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "is not UTF-8"),
        (b"[]", "not an array"),
        (b'"text"', "not a string"),
        (b"null", "not null"),
        (b"3", "not a number"),
        (b"{'a': 1}", "not valid JSON"),
        (b'{"a": 1} {}', "not valid JSON"),
    ],
)
def test_bodies_that_are_no_json_object(raw: bytes, said: str) -> None:
    with pytest.raises(ApiError, match=said) as caught:
        parse_json(raw)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")


def test_a_key_given_twice_is_found_among_many() -> None:
    """In linear time: a search for each key would hold the gateway for minutes."""
    with pytest.raises(ApiError, match='the key "199999" is given twice'):
        parse_json(b"{" + b",".join(b'"%d":1' % i for i in (*range(200_000), 199_999)) + b"}")


def test_a_byte_order_mark_changes_nothing() -> None:
    assert parse_json(b'\xef\xbb\xbf{"a": "\xc3\xa9"}') == {"a": "é"}


def test_another_charset_and_a_form_are_refused(serve: Any) -> None:
    async def scenario(client: httpx.AsyncClient, backend: Predicting) -> None:
        text = json.dumps(BODY).encode()
        for named in ("application/json; charset=utf-8", 'application/json;charset="UTF-8"', "text/plain"):
            assert (await client.post(INFER, content=text, headers={"content-type": named})).status_code == 200
        for charset in ("latin-1", "utf-16"):
            headers = {"content-type": f"application/json; charset={charset}"}
            answer = await client.post(INFER, content=text, headers=headers)
            assert answer.status_code == 400
            assert f"the charset '{charset}' is not read here" in answer.json()["error"]
        form = await client.post(INFER, files={"image": b"png"})
        assert (form.status_code, form.json()["error"]) == (400, "the body is a form (multipart/form-data): send JSON")

    serve(scenario)


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/chat/completions", "/v1/chat/completions"),
        ("/completions", "/v1/completions"),
        ("/models", "/v1/models"),
        ("/v1/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/chat/completion", "/v1/chat/completions"),
        ("/v1/health", "/health"),
        ("/v1/v2/health/live", "/v2/health/live"),
    ],
)
def test_a_404_names_what_was_meant(serve: Any, path: str, meant: str) -> None:
    async def scenario(client: httpx.AsyncClient, backend: Predicting) -> None:
        for answer in (await client.post(path, json={}), await client.get(path)):
            assert answer.status_code == 404
            assert f"did you mean {meant}?" in answer.json()["error"]["message"]

    serve(scenario)


def test_a_404_that_resembles_nothing_names_all() -> None:
    assert not_found("/favicon.ico", ["/v1/models", "/health"]) == (
        "there is no /favicon.ico here; known: /v1/models, /health"
    )
    assert not_found("/v1/nothing", ["/v1/models", "/health"]).endswith("known: /v1/models")
    assert not_found("*", ["/health"]).endswith("known: /health")


NAMES = ["org/nope", "org%2Fnope", "a/b/c", "nope@1", "%F0%9F%98%80", "..%2F..%2Fetc%2Fpasswd"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_not_served_is_said_whatever_is_in_it(serve: Any, name: str) -> None:
    async def scenario(client: httpx.AsyncClient, backend: Predicting) -> None:
        answer = await client.get(f"/v1/models/{name}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")

    serve(scenario)


def test_percent_encoded_names_are_found(serve: Any) -> None:
    async def scenario(client: httpx.AsyncClient, backend: Predicting) -> None:
        assert (await client.get("/v1/models/sh%61pes")).json()["id"] == "shapes"
        assert (await client.get("/v2/models/sh%61pes")).json()["name"] == "shapes"

    serve(scenario)


def test_a_slash_at_the_end_changes_nothing(serve: Any) -> None:
    async def scenario(client: httpx.AsyncClient, backend: Predicting) -> None:
        for path in ("/health", "/v1/models", "/v2", "/v2/models/shapes/ready"):
            assert (await client.get(f"{path}/")).json() == (await client.get(path)).json()
        assert (await client.post(f"{INFER}/", json=BODY)).status_code == 200
        assert (await client.get("/")).headers["content-type"].startswith("text/html")

    serve(scenario)


def test_what_is_too_large_is_said_in_the_path_s_shape(serve: Any) -> None:
    async def scenario(client: httpx.AsyncClient, backend: Predicting) -> None:
        large = b" " * (MOST + 1)
        assert (await client.post("/v1/completions", content=large)).json()["error"]["code"] == "body_too_large"
        packed = gzip.compress(large)
        answer = await client.post(INFER, content=packed, headers={"content-encoding": "gzip"})
        assert (answer.status_code, answer.json()) == (413, {"error": f"the body is larger than {MOST} bytes"})

    serve(scenario)


def test_a_length_that_is_too_large_is_refused_before_the_body_comes(serve: Any) -> None:
    class Never(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            raise AssertionError("the body was read")
            yield b""

    async def scenario(client: httpx.AsyncClient, backend: Predicting) -> None:
        for length in (MOST + 1, 10**30):
            asked = client.build_request("POST", INFER, headers={"content-length": str(length)})
            asked.stream = Never()
            assert (await client.send(asked)).status_code == 413

    serve(scenario)


def test_a_failure_can_be_read_from_another_origin(serve: Any) -> None:
    async def scenario(client: httpx.AsyncClient, backend: Predicting) -> None:
        backend.failure = KeyError("inside")
        answer = await client.post(INFER, json=BODY, headers={"origin": GOOD})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (500, GOOD)
        assert "inside" not in answer.text
        backend.failure = None
        assert (await client.post(INFER, json=BODY)).status_code == 200

    serve(scenario, GOOD)


def exchange(port: int, method: str, path: str, body: Any = None, version: str = "1.0") -> tuple[str, bytes]:
    """Speak HTTP by hand; return the head in lower case, and the body up to the end of the connection."""
    raw = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/{version}\r\nhost: test\r\ncontent-length: {len(raw)}\r\nconnection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(head.encode() + raw)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    head_part, _, rest = answer.partition(b"\r\n\r\n")
    return head_part.decode().lower(), rest


def test_http_1_0_clients_get_no_chunks(tmp_path: Path) -> None:
    """Over real sockets, and with each of uvicorn's protocols that is installed."""
    directory = tiny_models.language_model(tmp_path, context=64)

    async def scenario(client: httpx.AsyncClient, backend: InProcess) -> None:
        gateway = Gateway(backend, 20_000, 3)
        gateway.catalog = {CARD.name: CARD}
        for protocol in ("h11", "httptools"):
            config = uvicorn.Config(routes.build(lambda: gateway), port=0, http=protocol, log_level="warning")
            server = uvicorn.Server(config)
            running = asyncio.create_task(server.serve())
            while not server.started:
                await asyncio.sleep(0.01)
            port = server.servers[0].sockets[0].getsockname()[1]
            try:
                await asyncio.to_thread(check_old_client, port)
            finally:
                server.should_exit = True
                await running

    in_process.run(directory, scenario)


def check_old_client(port: int) -> None:
    wanted = {"model": "tiny", "prompt": "a", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    head, whole = exchange(port, "POST", "/v1/completions", wanted)
    assert "transfer-encoding" not in head
    text = json.loads(whole)["choices"][0]["text"]
    head, streamed = exchange(port, "POST", "/v1/completions", {**wanted, "stream": True})
    assert " 200 " in head
    assert "transfer-encoding" not in head
    assert f"content-length: {len(streamed)}" in head
    assert "content-type: text/event-stream" in head
    events = [line.removeprefix("data: ") for line in streamed.decode().splitlines() if line]
    assert events[-1] == "[DONE]"
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1]) == text
    head, body = exchange(port, "HEAD", "/health")
    assert " 200 " in head
    assert body == b""
    head, body = exchange(port, "GET", "/nothing")
    assert " 404 " in head
    assert json.loads(body)["error"]["code"] == "not_found"
    head, _ = exchange(port, "POST", "/v1/completions", {**wanted, "stream": True}, "1.1")
    assert "transfer-encoding: chunked" in head
