"""The gateway's routes over a real engine in this process: only Ray Serve is left out."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.api.body import ApiError
from serve.wire import Chunk, GenerateCall
from tests.support import tiny_models
from tests.support.in_process import InProcess, Scenario, run
from tests.support.sinks import touched
from tests.support.waiting import until


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.language_model(tmp_path_factory.mktemp("tiny"), context=256)


@pytest.fixture
def serve(directory: Path) -> Callable[[Scenario], None]:
    """Run a scenario against a fresh gateway and engine."""
    return lambda scenario: run(directory, scenario)


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, **fields}


def events(response: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def test_streamed_and_whole_answers_are_the_same(serve: Any) -> None:
    async def scenario(client: httpx.AsyncClient, backend: InProcess) -> None:
        whole = await client.post("/v1/chat/completions", json=body(temperature=0))
        streamed = await client.post(
            "/v1/chat/completions", json=body(temperature=0, stream=True, stream_options={"include_usage": True})
        )
        *chunks, usage, done = events(streamed)
        text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        assert text == whole.json()["choices"][0]["message"]["content"] != ""
        assert usage["usage"] == whole.json()["usage"]
        assert usage["usage"]["completion_tokens"] == 8
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        assert done == "[DONE]"
        assert streamed.headers["content-type"].startswith("text/event-stream")
        assert (whole.headers["x-tandem-model-version"], whole.headers["x-tandem-run-id"]) == ("3", "run-1")

    serve(scenario)


def test_a_seed_repeats_the_text(serve: Any) -> None:
    async def scenario(client: httpx.AsyncClient, backend: InProcess) -> None:
        texts = []
        for seed in (1, 1, 2):
            answer = await client.post("/v1/completions", json={"model": "tiny", "prompt": "for", "seed": seed})
            texts.append(answer.json()["choices"][0]["text"])
        assert texts[0] == texts[1] != texts[2]

    serve(scenario)


def test_several_prompts_in_one_request(serve: Any) -> None:
    async def scenario(client: httpx.AsyncClient, backend: InProcess) -> None:
        fields = {"model": "tiny", "prompt": ["def", [5, 6], "for"], "temperature": 0, "max_tokens": 5}
        refused = await client.post("/v1/completions", json=fields)
        assert refused.status_code == 400  # a mix of texts and token ids
        prompts = ["def", "the", "for"]
        together = await client.post("/v1/completions", json={**fields, "prompt": prompts})
        streamed = await client.post("/v1/completions", json={**fields, "prompt": prompts, "stream": True})
        alone = [await client.post("/v1/completions", json={**fields, "prompt": prompt}) for prompt in prompts]
        wanted = [answer.json()["choices"][0]["text"] for answer in alone]
        assert [choice["text"] for choice in together.json()["choices"]] == wanted
        assert together.json()["usage"]["completion_tokens"] == 15
        joined = ["", "", ""]
        for event in events(streamed)[:-1]:
            joined[event["choices"][0]["index"]] += event["choices"][0]["text"]
        assert joined == wanted

    serve(scenario)


def test_one_bad_prompt_refuses_all_and_frees_the_rest(serve: Any) -> None:
    async def scenario(client: httpx.AsyncClient, backend: InProcess) -> None:
        fields = {"model": "tiny", "prompt": [[5, 6], [100_000]], "stream": True}
        answer = await client.post("/v1/completions", json=fields)
        assert answer.status_code == 400
        assert "outside the vocabulary" in answer.json()["error"]["message"]
        await _until_idle(backend)

    serve(scenario)


def test_a_prompt_beyond_the_context(serve: Any) -> None:
    async def scenario(client: httpx.AsyncClient, backend: InProcess) -> None:
        messages = [{"role": "user", "content": "hello " * 300}]
        for stream in (False, True):
            answer = await client.post("/v1/chat/completions", json=body(messages=messages, stream=stream))
            assert answer.status_code == 400
            assert answer.json()["error"]["code"] == "context_length_exceeded"

    serve(scenario)


def test_a_limit_beyond_the_context_ends_at_the_context(serve: Any) -> None:
    async def scenario(client: httpx.AsyncClient, backend: InProcess) -> None:
        answer = (await client.post("/v1/chat/completions", json=body(max_tokens=9999, ignore_eos=True))).json()
        assert answer["usage"]["total_tokens"] == 256
        assert answer["choices"][0]["finish_reason"] == "length"

    serve(scenario)


def test_a_failure_in_mid_stream_is_an_error_chunk(serve: Any) -> None:
    async def scenario(client: httpx.AsyncClient, backend: InProcess) -> None:
        backend.failure = ApiError(503, "the replica was lost", code="replica_lost")
        long = {"max_tokens": 64, "ignore_eos": True}  # a text that ends by itself may end before the failure
        last = events(await client.post("/v1/chat/completions", json=body(stream=True, **long)))[-1]
        assert last["error"]["code"] == "replica_lost"
        whole = await client.post("/v1/chat/completions", json=body(**long))
        assert (whole.status_code, whole.json()["error"]["code"]) == (503, "replica_lost")
        await _until_idle(backend)

    serve(scenario)


def test_errors_have_openai_s_shape(serve: Any) -> None:
    async def scenario(client: httpx.AsyncClient, backend: InProcess) -> None:
        requests = [
            (404, "model_not_found", client.post("/v1/chat/completions", json=body(model="other"))),
            (404, "model_not_found", client.get("/v1/models/other")),
            (404, "not_found", client.get("/v1/nothing")),
            (405, "method_not_allowed", client.get("/v1/completions")),
            (400, "invalid_json", client.post("/v1/completions", content=b'{"model": NaN}')),
            (400, "unsupported_task", client.post("/v1/chat/completions", json=body(model="digits"))),
            (413, "body_too_large", client.post("/v1/completions", content=b" " * 20_001)),
        ]
        for status, code, request in requests:
            answer = await request
            assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

    serve(scenario)


def test_models_and_health(serve: Any) -> None:
    async def scenario(client: httpx.AsyncClient, backend: InProcess) -> None:
        listed = (await client.get("/v1/models")).json()["data"]
        assert [card["id"] for card in listed] == ["tiny", "digits"]
        assert listed[0]["run_id"] == "run-1"
        assert listed[0]["evaluation"] == {"loss": 1.5}
        assert (await client.get("/v1/models/tiny")).json() == listed[0]
        described = (await client.get("/v2/models/tiny")).json()
        assert described["max_context"] == 256
        assert (described["engine"]["runner"], described["engine"]["cache_tokens"]) == ("torch", 4 * 256)
        assert (await client.get("/health")).status_code == 200
        backend.ready = False
        for path in ("/health", "/v2/health/ready", "/v2/models/tiny/ready"):
            assert (await client.get(path)).status_code == 503
        assert (await client.get("/v2/health/live")).status_code == 200

    serve(scenario)


def test_inference(serve: Any) -> None:
    async def scenario(client: httpx.AsyncClient, backend: InProcess) -> None:
        part = {"name": "image", "shape": [2, 2], "datatype": "UINT8", "data": [1, 2, 3, 4]}
        answer = await client.post("/v2/models/digits/infer", json={"id": "a", "inputs": [part]})
        assert answer.json()["outputs"][0]["data"] == ["3", "7"]
        assert answer.headers["x-tandem-model-version"] == "1"

    serve(scenario)


def test_requests_run_together(serve: Any) -> None:
    async def scenario(client: httpx.AsyncClient, backend: InProcess) -> None:
        calls = [client.post("/v1/chat/completions", json=body(max_tokens=200, ignore_eos=True)) for _ in range(6)]
        running = asyncio.ensure_future(asyncio.gather(*calls))
        seen = 0
        while not running.done():
            seen = max(seen, backend.replica.load().running)
            await asyncio.sleep(0.005)
        assert all(answer.status_code == 200 for answer in await running)
        assert seen == 4  # max_batch
        status = (await client.get("/status")).json()["tiny"]
        assert (status["running"], status["queued"]) == (0, 0)

    serve(scenario)


def test_an_abandoned_stream_frees_its_slot(serve: Any) -> None:
    async def scenario(client: httpx.AsyncClient, backend: InProcess) -> None:
        stream = backend.generate("tiny", GenerateCall("1", "hello", {"ignore_eos": True}, 240))
        async for message in stream:
            if isinstance(message, Chunk):
                break
        assert backend.replica.load().running == 1
        await stream.aclose()
        await _until_idle(backend)

    serve(scenario)


@pytest.mark.parametrize("form", ["{}", "file://{}", "http://127.0.0.1:1{}"])
def test_no_path_is_opened_that_a_client_names(serve: Any, tmp_path: Path, form: str) -> None:
    sink = tmp_path / "sink.json"
    os.mkfifo(sink)  # opening it would block
    named = form.format(sink)

    async def scenario(client: httpx.AsyncClient, backend: InProcess) -> None:
        image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": named}}]}
        schema = {"type": "object", "properties": {"a": {"$ref": named}}, "required": ["a"]}
        wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
        for fields, status in (
            ({"model": named}, 404),
            ({"model": f"tiny:{named}"}, 404),
            ({"messages": [image]}, 400),
            ({"response_format": wanted}, 400),
            ({"chat_template": named}, 400),
            ({"lora": named}, 400),
            ({"messages": [{"role": "user", "content": f"{{% include '{named}' %}}"}]}, 200),  # a text like any other
        ):
            answer = await client.post("/v1/chat/completions", json=body(**fields))
            assert answer.status_code == status, answer.text

    with touched("sink") as opened:
        serve(scenario)
    assert opened == []


async def _until_idle(backend: InProcess) -> None:
    await until(lambda: backend.replica.load().running + backend.replica.load().waiting == 0)
