"""The vLLM engine against transformers. Runs where vLLM is installed: not beside Tandem's pins, see docs/engine.md."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from serve.engines.protocol import Delta, Engine, GenerationRequest, RequestError, SamplingParams
from serve.engines.vllm import VllmEngine
from tests.support import tiny_models

pytest.importorskip("vllm", reason="vLLM is not installed in this environment")


@asynccontextmanager
async def running(directory: Path) -> AsyncIterator[Engine]:
    engine = VllmEngine.from_directory(
        directory, precision="fp32", max_context=256, max_batch=8, cache_memory_bytes=2**30
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
    directory = tiny_models.language_model(tmp_path / "tiny", context=256, hidden=128)
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
            stream = engine.generate(GenerationRequest("left", (5, 6), SamplingParams(max_tokens=200, ignore_eos=True)))
            await anext(stream)
            assert engine.load().running == 1
            await stream.aclose()
            assert engine.load().running == 0
            assert engine.healthy()
            with pytest.raises(RequestError, match=r"^prompt: "):
                await collect(engine, "long", (1,) * 256, greedy)

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

    asyncio.run(scenario())
