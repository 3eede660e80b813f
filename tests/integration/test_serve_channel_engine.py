"""A real engine behind the channel answers what it answers in the process: texts, scores, structure, vectors."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.channel.server import Server
from serve.deploy.backend import RayBackend
from serve.deploy.model_replica import answered
from serve.wire import Load, ReplicaState
from tests.support import in_process, tiny_models

SECRET = b"s" * 32
SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"], "additionalProperties": False}
GREEDY = {"model": "tiny", "temperature": 0, "max_tokens": 12}
CHAT = {"messages": [{"role": "user", "content": "hello"}]}
ASKED: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {**GREEDY, "prompt": ["for", "def"], "logprobs": 3, "echo": True}),
    ("/v1/completions", {**GREEDY, "prompt": [5, 6, 7], "stop": ["e"], "stream": True}),
    ("/v1/completions", {**GREEDY, "prompt": "a", "temperature": 1, "seed": 2**62, "logit_bias": {"5": -100}}),
    ("/v1/chat/completions", {**GREEDY, **CHAT, "stream": True, "logprobs": True, "top_logprobs": 2}),
    (
        "/v1/chat/completions",
        {**GREEDY, **CHAT, "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}},
    ),
    ("/v1/completions", {**GREEDY, "prompt": "x" * 5000}),
    ("/v1/embeddings", {"model": "tiny", "input": ["a", "b c"]}),
]


NUMBER = re.compile(r"-?\d+\.\d+(?:e-\d+)?")


async def answers(client: httpx.AsyncClient) -> tuple[list[tuple[int, str]], list[float]]:
    """Return what each question is answered, joined where it streams, without what differs; and all its scores."""
    found, numbers = [], []
    for path, body in ASKED:
        answer = await client.post(path, json=body)
        events = answer.text.removeprefix("data: ").split("\n\ndata: ") if body.get("stream") else [answer.text]
        pieces = [httpx.Response(200, text=event).json() for event in events if not event.startswith("[DONE]")]
        text, scores = _lasting(pieces)
        found.append((answer.status_code, text + NUMBER.sub("", scores)))
        numbers += [float(number) for number in NUMBER.findall(scores)]
    return found, numbers


def _lasting(pieces: list[dict[str, Any]]) -> tuple[str, str]:
    """Return the text and the reasons of an answer's pieces, however they were cut, and the scores."""
    if "choices" not in pieces[0]:
        return "", repr(pieces[0])
    choices = [choice for piece in pieces for choice in piece["choices"]]
    texts = [choice.get("text") or (choice.get("delta") or choice.get("message") or {}).get("content") or ""
             for choice in choices]  # fmt: skip
    scores = [score for choice in choices for score in (choice.get("logprobs") or {}).get("content") or []]
    scores += [choice["logprobs"] for choice in choices if "text" in choice and choice["logprobs"]]
    return "".join(texts) + repr([choice["finish_reason"] for choice in choices]).replace("None, ", ""), repr(scores)


def test_the_answers_are_those_of_the_process(tmp_path: Path) -> None:
    directory = tiny_models.language_model(tmp_path, context=256)
    found: dict[str, Any] = {}

    async def scenario(client: httpx.AsyncClient, backend: in_process.InProcess) -> None:
        found["direct"] = await answers(client)
        server = Server("r1", 4, SECRET, partial(answered, backend.replica))
        address = await server.start("127.0.0.1")
        over_channel = RayBackend("x", SECRET, patience_s=20)
        over_channel._heard([ReplicaState("tiny", "r1", "3", Load(0, 0, 0.0), {}, address, 4)])
        for name in ("generate", "embed"):
            setattr(backend, name, getattr(over_channel, name))
        found["channel"] = await answers(client)
        await over_channel.stop()
        await server.close()

    in_process.run(directory, scenario)
    (direct, scores), (channel, scores_too) = found["direct"], found["channel"]
    assert [status for status, _ in direct] == [200, 200, 200, 200, 200, 400, 200]
    assert channel == direct
    assert len(scores) > 100
    assert scores_too == pytest.approx(scores, abs=1e-3)  # other batches round otherwise
