"""Failures in the log: the reason and where it was, and nothing that it quotes of a request."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import pydantic
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from serve import quotes
from serve.api.middleware import AnswerCut, Failures
from serve.wire import EmbedCall, GenerateCall, InferCall, Tools

SECRET = 'my number is "4417 1234",\nmy näme Zoë'
SCHEMA = {"type": "object", "properties": {SECRET: {"const": SECRET}}}
CALLS = [
    GenerateCall("r", SECRET),
    GenerateCall("r", ({"role": "user", "content": SECRET},)),
    GenerateCall("r", "x", {"response_format": SCHEMA}),
    GenerateCall("r", "x", tools=Tools(({"name": "f", "parameters": SCHEMA},))),
    GenerateCall("r", "x", template_kwargs={"date": [SECRET]}),
    GenerateCall("r", (1, 2), session=f"alice:{SECRET}"),
    EmbedCall("r", (SECRET, (1, 2))),
    InferCall("r", {"a": [[SECRET]], "b": np.zeros(3)}),
    InferCall("r", {"a": [SECRET.encode()]}),
]


def spoken(secret: str) -> list[str]:
    return [secret, repr(secret), ascii(secret), json.dumps(secret), f"{secret!r:.24}", repr(secret.encode())]


@pytest.mark.parametrize("call", CALLS)
def test_what_the_request_has_too_is_masked_however_it_is_written(call: Any) -> None:
    for said in spoken(SECRET):
        told = quotes.unquoted(f"cannot convert {said} to a float on device 3", call)
        assert told.startswith("cannot convert ")
        assert told.endswith(" to a float on device 3")
        assert not any(part in told for part in ("4417", "number", "1234", "näme", "n\\xe4me"))


def test_what_it_has_not_stays() -> None:
    said = "CUDA out of memory: tried to allocate 2.5 GiB"
    assert quotes.unquoted(said, GenerateCall("r", "what is memory, CUDA?", {"temperature": 0.5})) == said


def test_of_a_long_request_no_message_is_kept_and_of_a_long_message_its_beginning() -> None:
    long = InferCall("r", {"a": ["ab" * quotes.MOST_SENT]})
    assert quotes.unquoted("a reason", long) == quotes.LEFT_OUT
    assert len(quotes.unquoted("a reason " * 1000, GenerateCall("r", "x"))) == quotes.MOST_SAID


def failed(call: Any) -> str:
    try:
        try:
            {}[SECRET]
        except KeyError as error:
            raise RuntimeError(f"no answer to {SECRET}") from error
    except RuntimeError as error:
        return quotes.failure(error, call)
    raise AssertionError


def test_a_failure_says_where_it_was_and_what_led_to_it() -> None:
    told = failed(GenerateCall("r", SECRET))
    first, last = told.split("\nwhich led to:\n")
    assert "in failed\n" in first
    assert first.endswith(f"KeyError: '{quotes.MASK}'")
    assert last.endswith(f"RuntimeError: no answer to {quotes.MASK}")


def test_where_nobody_knows_what_was_sent_messages_about_values_are_left_out() -> None:
    class Body(pydantic.BaseModel):
        count: int

    told = failed(None)
    assert f"KeyError {quotes.LEFT_OUT}" in told
    with pytest.raises(ValueError, match="4417") as wrong:
        Body.model_validate({"count": SECRET})
    assert "4417" not in quotes.failure(wrong.value, None)
    assert quotes.may_quote(wrong.value)
    assert not quotes.may_quote(OSError("no route"))


def test_exceptions_that_lead_to_each_other_end() -> None:
    one, two = ValueError("one"), ValueError("two")
    one.__context__, two.__context__ = two, one
    assert quotes.failure(one, GenerateCall("r", "x")).count("ValueError") == 2


def test_the_gateway_logs_its_own_failures_without_what_was_sent(caplog: pytest.LogCaptureFixture) -> None:
    async def whole(request: Request) -> Response:
        raise LookupError(SECRET)

    async def stream(request: Request) -> Response:
        async def pieces() -> AsyncIterator[bytes]:
            yield b"a"
            raise LookupError(SECRET)

        return StreamingResponse(pieces())

    told = Middleware(Failures, answer=lambda path, failure: JSONResponse({"under": failure}, 500))
    app = Starlette(routes=[Route("/whole", whole), Route("/stream", stream)], middleware=[told])

    async def scenario() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            assert (await client.get("/whole")).json()["under"] in caplog.text
            with pytest.raises(AnswerCut) as cut:
                await client.get("/stream")
            assert str(cut.value) in caplog.text
            assert (cut.value.__cause__, cut.value.__suppress_context__) == (None, True)

    with caplog.at_level(logging.ERROR, "serve"):
        asyncio.run(scenario())
    assert caplog.text.count("in whole\n") == caplog.text.count("in pieces\n") == 1
    assert "4417" not in caplog.text
