"""Streams on the gateway's whole way, HTTP or the channel to a replica, outlive the replicas that they began at."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from dataclasses import replace
from functools import partial

import httpx
import pytest

from serve.api import routes
from serve.api.gateway import Gateway
from serve.channel.server import Server
from serve.deploy.backend import RayBackend
from serve.deploy.model_replica import answered
from serve.routing.resuming import Message, resumed
from serve.wire import GenerateCall, Load, ReplicaState
from tests.support import in_process, tiny_models
from tests.support.lossy import Served, joined, serving

SECRET = b"s" * 32
SEEDED = {"temperature": 0.9, "top_k": 8, "seed": 5, "ignore_eos": True}


class Lossy(in_process.InProcess):
    """A gateway's backend whose streams are resumed."""

    def __init__(self, served: Served) -> None:
        super().__init__(served.replicas[0])
        self._served = served

    def generate(self, model: str, call: GenerateCall, build: str | None = None) -> AsyncGenerator[Message, None]:
        return resumed(self._served.attempt, call)


def test_answers_of_several_texts_are_those_of_a_sound_endpoint() -> None:
    body = {"model": "tiny", "prompt": "the quick", "n": 2, "seed": 5, "max_tokens": 16, "ignore_eos": True}

    async def scenario() -> None:
        async with serving(tiny_models.tokenizer()) as served:
            gateway = Gateway(Lossy(served), max_body_bytes=20_000, max_prompts=3)
            gateway.catalog = {"tiny": in_process.CARD}
            transport = httpx.ASGITransport(routes.build(lambda: gateway))
            async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
                sound = (await client.post("/v1/completions", json=body)).json()
                served.dies_at([4, 9, 14])
                lossy = (await client.post("/v1/completions", json=body)).json()
                assert (lossy["choices"], lossy["usage"]) == (sound["choices"], sound["usage"])
                assert served.tries == 2 + 3
                served.dies_at([5, 12, 7])
                streamed = (await client.post("/v1/completions", json={**body, "stream": True})).text
                assert served.tries == 2 + 3
                assert _texts(streamed) == [choice["text"] for choice in sound["choices"]]

    asyncio.run(scenario())


def _texts(stream: str) -> list[str]:
    texts = ["", ""]
    for line in stream.split("\n\n")[:-2]:
        (choice,) = json.loads(line.removeprefix("data: "))["choices"]
        texts[choice["index"]] += choice["text"]
    return texts


def test_streams_over_the_channel_outlive_a_cut_connection_and_a_replica_that_leaves() -> None:
    calls = [
        GenerateCall(f"{at}", tuple(range(3 + at, 30 + at)), {**SEEDED, "seed": at, "logprobs": at % 2}, 40)
        for at in range(6)
    ]

    async def scenario() -> None:
        async with serving(tiny_models.tokenizer(), max_batch=8) as served:
            sound = [joined(await served.told(call)) for call in calls]
            servers = [
                Server(name, 8, SECRET, partial(answered, each))
                for name, each in zip("ab", served.replicas, strict=True)
            ]
            states = [
                ReplicaState("tiny", each.replica_id, "1", Load(0, 0, 0.0), {}, await each.start("127.0.0.1"), 8)
                for each in servers
            ]
            backend = RayBackend("x", SECRET, patience_s=20)
            went_on: list[str] = []
            backend.went_on = went_on.append

            async def told(call: GenerateCall) -> list[Message]:
                return [message async for message in backend.generate("tiny", call)]

            async def heard() -> None:
                while True:
                    backend._heard(states)
                    await asyncio.sleep(0.02)

            hearing = asyncio.create_task(heard())
            answers = asyncio.gather(*map(told, calls))
            while sum(each.running for each in servers) < len(calls):
                await asyncio.sleep(0.005)
            await asyncio.sleep(0.05)
            for peer in list(servers[0].peers):
                peer._transport.abort()
            await asyncio.sleep(0.05)
            await servers[1].leave(0.02)
            lossy = [joined(messages) for messages in await answers]
            hearing.cancel()
            await backend.stop()
            await servers[0].close()
            assert len(went_on) >= len(calls)
            for text, undisturbed in zip(lossy, sound, strict=True):
                assert text.logprobs == pytest.approx(undisturbed.logprobs, rel=1e-5, abs=1e-5)
                assert replace(text, logprobs=()) == replace(undisturbed, logprobs=())

    asyncio.run(scenario())
