"""The runner of models that carry a state along a text, against the model itself."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from jobs.tasks.lstm import LstmConfig, LstmForCausalLM
from serve.engines.protocol import GenerationRequest, SamplingParams
from serve.engines.torch.batch import build
from serve.engines.torch.blocks import BLOCK
from serve.engines.torch.check import UnsupportedArchitecture
from serve.engines.torch.recurrent import Recurrent, RecurrentRunner, Segment, segments, waves
from serve.engines.torch.scheduler import Chunk, Sequence, Step
from serve.engines.torch.torch_engine import TorchEngine, TorchEngineOptions
from tests.support import in_process, tiny_models
from tests.support.in_process import InProcess

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def model() -> LstmForCausalLM:
    torch.manual_seed(0)
    config = LstmConfig(vocab_size=300, hidden_size=24, num_hidden_layers=2, initializer_range=1.0)
    return LstmForCausalLM(config).eval()


def text(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def sequence(tokens: tuple[int, ...], *blocks: int) -> Sequence:
    made = Sequence(GenerationRequest("r", tokens), max_tokens=1)
    made.blocks.extend(blocks)
    return made


@torch.inference_mode()
def alone(model: Any, prompt: tuple[int, ...], tokens: int) -> list[int]:
    """Continue greedily by reading the whole text again for each token."""
    ids = list(prompt)
    for _ in range(tokens):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@asynccontextmanager
async def running(model: Any, **options: Any) -> AsyncIterator[TorchEngine]:
    engine = TorchEngine(model, tiny_models.tokenizer(vocabulary=300), TorchEngineOptions(threads=1, **options))
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


async def generated(engine: TorchEngine, prompt: tuple[int, ...], params: SamplingParams = GREEDY) -> list[int]:
    request = GenerationRequest(f"{prompt[:3]}", prompt, params)
    return [token async for delta in engine.generate(request) for token in delta.token_ids]


def test_new_tokens_are_cut_where_blocks_end() -> None:
    going_on = sequence(text(3 * BLOCK), 5, 6, 7)
    decoding = sequence(text(10), 4)
    step = Step([Chunk(decoding, 9, 10, True)], [Chunk(going_on, BLOCK - 2, 2 * BLOCK + 3, False)])
    assert segments(build(step)) == [
        Segment(0, 1, 4, 4),
        Segment(1, 2, 5, 5),
        Segment(3, BLOCK, 5, 6),
        Segment(3 + BLOCK, 3, 6, 7),
    ]


def test_a_segment_waits_for_the_one_that_writes_what_it_reads() -> None:
    filling = [Segment(0, BLOCK, None, 1), Segment(BLOCK, BLOCK, 1, 2)]
    sharing, apart = Segment(2 * BLOCK, 5, 2, 3), Segment(2 * BLOCK + 5, 1, 9, 9)
    assert waves([*filling, sharing, apart]) == [[filling[0], apart], [filling[1]], [sharing]]


@torch.inference_mode()
def test_texts_that_share_blocks_within_a_step_get_the_models_own_logits(model: LstmForCausalLM) -> None:
    runner = RecurrentRunner(model, "bf16", compiled=False)
    assert isinstance(model, Recurrent)
    assert runner.prepare(8, 1 << 20) == 8
    beginning = text(BLOCK)
    first, second = (beginning + text(7, seed) for seed in (1, 2))
    filling, sharing = sequence(first, 3, 1), sequence(second, 3, 2)
    step = Step([], [Chunk(filling, 0, len(first), True), Chunk(sharing, BLOCK, len(second), True)])
    logits = runner.run(build(step)).logits
    for row, tokens in zip(logits, (first, second), strict=True):
        torch.testing.assert_close(row, model(torch.tensor([tokens])).logits[0, -1])


def test_a_crowd_gets_what_each_gets_alone(model: LstmForCausalLM) -> None:
    prompts = [text(length, seed) for seed, length in enumerate((1, 5, 40, 70, 33, 64))]
    prompts += [prompts[3][:BLOCK] + text(9, 9), prompts[3]]

    async def run() -> tuple[list[list[int]], Any, Any]:
        # room for some of them only: others give way and begin again
        state_bytes = 4 * torch.Size(model.state_shape).numel()
        async with running(model, max_batch=6, max_context=128, cache_memory_bytes=9 * state_bytes) as engine:
            found = await asyncio.gather(*(generated(engine, prompt) for prompt in prompts))
            return list(found), engine.load(), engine.report()

    found, load, report = asyncio.run(run())
    assert found == [alone(model, prompt, GREEDY.max_tokens) for prompt in prompts]
    assert report["runner"] == "recurrent"
    assert load.reused_tokens >= BLOCK
    assert load.cache_tokens_used == 0
    assert load.cache_tokens_total == 8 * BLOCK


def test_seeds_stop_strings_and_vectors(model: LstmForCausalLM) -> None:
    async def run() -> None:
        async with running(model, max_context=128) as engine:
            drawn = SamplingParams(temperature=1.0, seed=5, max_tokens=8, ignore_eos=True)
            assert await generated(engine, text(6), drawn) == await generated(engine, text(6), drawn)
            whole = [d async for d in engine.generate(GenerationRequest("w", text(6), drawn))]
            written = "".join(delta.text for delta in whole)
            stop = SamplingParams(temperature=1.0, seed=5, max_tokens=8, ignore_eos=True, stop=(written[2:4],))
            cut = [d async for d in engine.generate(GenerationRequest("s", text(6), stop))]
            assert "".join(delta.text for delta in cut) == written[: written.index(written[2:4])]
            assert cut[-1].finish_reason == "stop"
            states, _ = model.recur(torch.tensor([text(6)]), torch.tensor([6]), torch.zeros(1, *model.state_shape))
            mean = states[0].mean(0)
            vector = torch.from_numpy(await engine.embed("e", text(6)))
            torch.testing.assert_close(vector, (mean / mean.norm()).detach())

    asyncio.run(run())


@pytest.mark.parametrize(
    ("options", "said"),
    [({"runner": "native"}, "no kernels"), ({"compile": True}, "is not compiled: leave `compile` out")],
)
def test_what_it_cannot_do_is_refused(model: LstmForCausalLM, options: dict[str, Any], said: str) -> None:
    async def run() -> None:
        async with running(model, max_context=64, **options):
            pass

    with pytest.raises(UnsupportedArchitecture, match=said):
        asyncio.run(run())


def test_quantised_weights_are_refused(model: LstmForCausalLM) -> None:
    with pytest.raises(UnsupportedArchitecture, match="no layers that are kept in int8: set precision"):
        RecurrentRunner(model, "int8", compiled=False).prepare(8, 1 << 20)


def test_an_exported_model_answers_the_openai_routes(tmp_path: Path) -> None:
    tokenizer = tiny_models.tokenizer()
    torch.manual_seed(3)
    config = LstmConfig(vocab_size=len(tokenizer), hidden_size=24, initializer_range=1.0, eos_token_id=tiny_models.EOS)
    directory = tiny_models.export(tmp_path / "lstm", tokenizer, LstmForCausalLM(config).eval())

    async def scenario(client: httpx.AsyncClient, backend: InProcess) -> None:
        asked = {"model": "tiny", "prompt": "the quick brown fox", "max_tokens": 9, "seed": 4}
        whole = await client.post("/v1/completions", json=asked)
        (choice,) = whole.json()["choices"]
        assert whole.json()["usage"]["completion_tokens"] == 9 or choice["finish_reason"] == "stop"
        streamed = await client.post("/v1/completions", json={**asked, "stream": True})
        events = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
        assert "".join(event["choices"][0]["text"] for event in events if event["choices"]) == choice["text"]
        talk = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, "logprobs": True}
        answer = await client.post("/v1/chat/completions", json=talk)
        assert answer.status_code == 200, answer.text
        assert all(token["logprob"] <= 0 for token in answer.json()["choices"][0]["logprobs"]["content"])

    in_process.run(directory, scenario)
