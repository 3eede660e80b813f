"""The vLLM engine against transformers. Runs where vLLM is installed: not beside Tandem's pins, see docs/engine.md."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from serve.engines.protocol import Delta, Engine, GenerationRequest, RequestError, SamplingParams
from serve.engines.replica import GenerativeReplica
from serve.engines.vllm import VllmEngine
from serve.routing.lost import ReplicaLost
from serve.routing.resuming import resumed
from serve.wire import Chunk, GenerateCall, Identity, Opened, Tools
from tests.support import tiny_models, tool_templates

pytest.importorskip("vllm", reason="vLLM is not installed in this environment")


@asynccontextmanager
async def running(directory: Path) -> AsyncIterator[Engine]:
    engine = VllmEngine.from_directory(
        directory, precision="fp32", max_context=512, max_batch=8, cache_memory_bytes=2**30
    )
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


async def collect(engine: Engine, name: str, prompt: tuple[int, ...], params: SamplingParams) -> list[Delta]:
    return [delta async for delta in engine.generate(GenerationRequest(name, prompt, params))]


def ids(deltas: list[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


def test_the_protocol_over_vllm(tmp_path: Path) -> None:
    """One test, because one start takes many seconds."""
    import torch
    from transformers import AutoModelForCausalLM

    # vLLM's CPU kernels want heads of at least 32 numbers
    fast = tiny_models.tokenizer()
    fast.add_special_tokens({"additional_special_tokens": ["<tool_call>", "</tool_call>"]})
    fast.chat_template = tool_templates.HERMES
    directory = tiny_models.language_model(tmp_path / "tiny", context=512, hidden=128, fast=fast)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    texts = [tuple(range(5 + at, 15 + 3 * at)) for at in range(6)]

    def reference(prompt: tuple[int, ...]) -> list[int]:
        out = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
        return list(out[0, len(prompt) :].tolist())

    async def scenario() -> None:
        async with running(directory) as engine:
            greedy = SamplingParams(temperature=0.0, max_tokens=12)
            crowd = await asyncio.gather(*(collect(engine, str(i), prompt, greedy) for i, prompt in enumerate(texts)))
            assert [ids(deltas) for deltas in crowd] == [reference(prompt) for prompt in texts]
            assert crowd[0][-1].completion_tokens == len(ids(crowd[0]))
            await scores(engine)
            await structure(engine)
            await calls(engine)
            await bounds(engine)
            await resumption(engine)
            stream = engine.generate(GenerationRequest("left", (5, 6), SamplingParams(max_tokens=200, ignore_eos=True)))
            await anext(stream)
            assert engine.load().running == 1
            await stream.aclose()
            assert engine.load().running == 0
            assert engine.healthy()
            with pytest.raises(RequestError, match=r"^prompt: "):
                await collect(engine, "long", (1,) * 512, greedy)

    async def scores(engine: Engine) -> None:
        wanted = SamplingParams(max_tokens=0, logprobs=2, prompt_logprobs=True)
        (delta,) = await collect(engine, "scored", texts[2], wanted)
        with torch.inference_mode():
            expected = model(torch.tensor([texts[2]])).logits[0].log_softmax(-1)
        assert (delta.finish_reason, delta.token_ids) == ("length", ())
        assert delta.prompt_logprobs[0].logprob is None
        for row, entry in zip(expected, delta.prompt_logprobs[1:], strict=False):
            assert entry.logprob == pytest.approx(row[entry.token].item(), abs=1e-3)
            assert [value for _, value in entry.top] == pytest.approx(row.topk(2).values.tolist(), abs=1e-3)

    async def structure(engine: Engine) -> None:
        wanted = SamplingParams(max_tokens=60, seed=1, json_schema='{"enum": [17, "x"]}')
        deltas: Any = await collect(engine, "json", texts[0], wanted)
        assert json.loads("".join(delta.text for delta in deltas)) in (17, "x")

    async def calls(engine: Engine) -> None:
        """Markers that are special tokens, a grammar of calls, and the parser behind it."""
        schema = {
            "type": "object",
            "properties": {"n": {"enum": [7]}},
            "required": ["n"],
            "additionalProperties": False,
        }
        functions = ({"name": "pick", "description": "", "parameters": schema},)
        for parallel in (False, True):
            replica = GenerativeReplica(engine, Identity("1", None), {})
            tools = Tools(functions, required=True, parallel=parallel)
            call = GenerateCall("call", ({"role": "user", "content": "7"},), {"seed": 1}, 160, tools=tools)
            opened, *chunks = [message async for message in replica.generate(call)]
            assert isinstance(opened, Opened), opened
            pieces = [piece for chunk in chunks for piece in chunk.calls]
            assert "".join(chunk.text for chunk in chunks) == ""
            assert {piece.name for piece in pieces} - {None} == {"pick"}
            first = "".join(piece.arguments for piece in pieces if piece.number == 0)
            assert json.loads(first) == {"n": 7}
            if not parallel:
                assert chunks[-1].finish_reason == "tool_calls"

    async def resumption(engine: Engine) -> None:
        """A greedy text that is lost goes on as it would have; what is held back for stop strings survives the cut."""
        replica = GenerativeReplica(engine, Identity("1", None), {})
        losses: list[int] = []

        async def attempt(call: GenerateCall, excluded: Any, version: Any) -> AsyncGenerator[Any, None]:
            async for message in replica.generate(call):
                if losses and isinstance(message, Chunk) and message.completion_tokens >= losses[0]:
                    raise ReplicaLost(f"lost at {losses.pop(0)}")
                yield message

        async def told(sampling: dict[str, Any], *lost_at: int) -> tuple[str, list[int], int, str | None]:
            losses[:] = lost_at
            call = GenerateCall("resumed", (5, 6, 7, 8), {"ignore_eos": True, "temperature": 0, **sampling}, 16)
            opened, *chunks = [message async for message in resumed(attempt, call)]
            assert isinstance(opened, Opened), opened
            assert all(isinstance(chunk, Chunk) for chunk in chunks), chunks
            assert losses == []
            ids = [token for chunk in chunks for token in chunk.ids]
            text = "".join(chunk.text for chunk in chunks)
            return text, ids, chunks[-1].completion_tokens, chunks[-1].finish_reason

        free = await told({})
        stop = free[0][-7:-4]
        stopped = await told({"stop": (stop, free[0][3:5] + "~")})
        assert (stopped[0], stopped[3]) == (free[0][: free[0].find(stop)], "stop")
        for sampling, whole in (({}, free), ({"stop": (stop, free[0][3:5] + "~")}, stopped)):
            assert len(whole[1]) == whole[2]
            for lost_at in ([1], [2], [whole[2] // 2], [whole[2]], [3, whole[2] - 1]):
                assert await told(sampling, *lost_at) == whole, lost_at
        drawn = {"temperature": 0.7, "seed": 3, "repetition_penalty": 1.2, "min_tokens": 9}
        assert (await told(drawn, 5))[2:] == (16, "length")
        call = GenerateCall("over", (5, 6, 7, 8), {"temperature": 0, "ignore_eos": True}, 16, generated=tuple(free[1]))
        over = [message async for message in replica.generate(call)]
        assert (over[-1].ids, over[-1].completion_tokens, over[-1].finish_reason) == ((), 16, "length")
        for refused in ({"logprobs": 1}, {"json_schema": "{}"}, {"presence_penalty": 1.0}):
            (refusal,) = [message async for message in replica.generate(replace(call, sampling=refused))]
            assert (refusal.status, refusal.code) == (503, "replica_lost")

    async def bounds(engine: Engine) -> None:
        """What the protocol allows at the edge of what vLLM does."""
        for edge in (
            {"top_p": 0.0},
            {"top_k": -1},
            {"temperature": 0.01},
            {"seed": -(2**63)},
            {"min_p": 1.0},
            {"repetition_penalty": 100.0},
            {"logit_bias": {5: 100.0}},
            {"min_tokens": 4},
            {"stop_token_ids": (7,)},
            {"stop": ("x", "é")},
        ):
            deltas = await collect(engine, f"edge {edge}", texts[0], SamplingParams(max_tokens=4, **edge))
            assert deltas[-1].finish_reason in ("stop", "length"), edge
        outside = (("logit_bias", {900: 1.0}), ("stop_token_ids", (900,)), ("temperature", 0.001))
        for field, wrong in outside:
            with pytest.raises(RequestError, match=f"^{field}: "):
                await collect(engine, field, texts[0], SamplingParams(max_tokens=4, **{field: wrong}))
        cat = SamplingParams(max_tokens=4, json_schema='{"type": "cat"}')
        for refusing in (engine.check(GenerationRequest("cat", texts[0], cat)), collect(engine, "cat", texts[0], cat)):
            with pytest.raises(RequestError, match=r"^response_format: .*Invalid type: cat"):
                await refusing

    asyncio.run(scenario())
