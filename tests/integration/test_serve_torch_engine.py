"""The embedded engine against `transformers.generate`, alone and in a crowd, and how it ends, fails and frees."""

import asyncio
import random
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torchao.quantization import Int8WeightOnlyConfig
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    PreTrainedTokenizerFast,
    TorchAoConfig,
)

from cluster.precision import this_cpu
from serve.engines.protocol import Delta, Engine, EngineError, GenerationRequest, RequestError, SamplingParams
from serve.engines.torch.native.runner import refusal
from serve.engines.torch.runner import UnsupportedArchitecture
from serve.engines.torch.torch_engine import TorchEngine, TorchEngineOptions
from tests.support import tiny_models
from tests.support.waiting import until

pytestmark = pytest.mark.instructions
CONTEXT = 128
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_models.tokenizer(vocabulary=300)


WINDOW = {"sliding_window": 20}
MIXED = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gpt2": {},
    "mistral": WINDOW,
    "gemma2": {**WINDOW, "attn_logit_softcapping": 5.0},
    "gemma3_text": MIXED,
}
BLOCK_BYTES = 2 * 2 * 2 * 32 * 16 * 4
"""Of a tiny decoder in fp32: 2 layers, keys and values of 2 heads of 16 numbers, 32 tokens."""


def build(architecture: str, seed: int = 0, spread: float = 0.2, **changes: Any) -> Any:
    """A tiny random model whose logits differ enough that greedy choices are not ties."""
    special = {"eos_token_id": tiny_models.EOS, "pad_token_id": tiny_models.PAD, "bos_token_id": None}
    return tiny_models.decoder(architecture, seed, spread, **{**ARCHITECTURES[architecture], **special, **changes})


@asynccontextmanager
async def running(model: Any, tokenizer: Any, **options: Any) -> AsyncIterator[TorchEngine]:
    engine = TorchEngine(model, tokenizer, TorchEngineOptions(threads=1, **{"runner": "torch", **options}))
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


async def collect(engine: Engine, prompt: tuple[int, ...], params: SamplingParams = GREEDY) -> list[Delta]:
    return [delta async for delta in engine.generate(GenerationRequest("r", prompt, params))]


def ids(deltas: list[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


def text(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def prompts(count: int, seed: int = 0, longest: int = 90) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    return [tuple(rng.randrange(1, 300) for _ in range(rng.randint(1, longest))) for _ in range(count)]


def reference(model: Any, prompt: tuple[int, ...], tokens: int) -> list[int]:
    out = model.generate(
        torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, attention_mask=torch.ones(1, len(prompt))
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_equals_generate_alone_and_in_a_crowd(architecture: str, tokenizer: Any) -> None:
    texts = prompts(16)
    limits = [random.Random(i).randint(1, 30) for i in range(16)]
    expected = [reference(build(architecture), prompt, limit) for prompt, limit in zip(texts, limits, strict=True)]

    async def join(engine: TorchEngine, at: int) -> list[int]:
        await asyncio.sleep(random.Random(at).random() * 0.05)
        params = SamplingParams(temperature=0.0, max_tokens=limits[at])
        return ids(await collect(engine, texts[at], params))

    async def scenario() -> None:
        async with running(build(architecture), tokenizer, max_batch=5, prefill_tokens=32) as engine:
            assert [await join(engine, at) for at in range(4)] == expected[:4]
            crowd = await asyncio.gather(*(join(engine, at) for at in range(16)))
            assert list(crowd) == expected
            assert engine.load().cache_tokens_used == 0

    asyncio.run(scenario())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_equals_generate_through_chunks_reuse_and_preemption(architecture: str, tokenizer: Any) -> None:
    """64 texts at once in a cache with room for three of the longest: 8 that grow, 56 with common beginnings."""
    rng = random.Random(7)
    beginnings = [tuple(rng.randrange(1, 300) for _ in range(40)) for _ in range(3)]
    growing = prompts(8, seed=8, longest=25)
    texts = growing + [rng.choice(beginnings) + prompt for prompt in prompts(56, seed=9, longest=20)]
    limits = [70] * 8 + [rng.randint(1, 8) for _ in range(56)]
    endless = build(architecture)
    endless.generation_config.eos_token_id = None
    expected = [reference(endless, prompt, limit) for prompt, limit in zip(texts, limits, strict=True)]
    block_bytes = BLOCK_BYTES * (2 if architecture == "gpt2" else 1)  # as many KV heads as heads

    async def scenario() -> None:
        options = {"max_batch": 64, "prefill_tokens": 40, "cache_memory_bytes": 14 * block_bytes}
        async with running(build(architecture), tokenizer, **options) as engine:
            calls = [
                collect(engine, prompt, SamplingParams(temperature=0.0, max_tokens=limit, ignore_eos=True))
                for prompt, limit in zip(texts, limits, strict=True)
            ]
            assert [ids(deltas) for deltas in await asyncio.gather(*calls)] == expected
            load = engine.load()
            assert (load.cache_tokens_used, load.cache_tokens_total) == (0, 13 * 32)
            assert load.preemptions > 0
            assert load.reused_tokens > 500

    asyncio.run(scenario())


def test_a_prompt_is_cached_in_chunks_beside_running_streams(tokenizer: Any) -> None:
    """A long prompt must not hold a running stream up: the stream gets a token in each step of the prefill."""

    async def scenario() -> None:
        async with running(build("llama"), tokenizer, max_batch=2, prefill_tokens=8) as engine:
            first = engine.generate(GenerationRequest("a", (5, 6), SamplingParams(temperature=0, ignore_eos=True)))
            await anext(first)
            second = asyncio.create_task(collect(engine, prompts(1, longest=90)[0] + (7,) * 30))
            streamed = 0
            while not second.done():
                await anext(first)
                streamed += 1
            await first.aclose()
            assert streamed >= 8
            assert len(await second) == GREEDY.max_tokens

    asyncio.run(scenario())


FIELDS: list[dict[str, Any]] = [
    {},
    {"top_p": 0.9, "frequency_penalty": 0.5},
    {"top_k": 7, "presence_penalty": -1.0},
    {"top_p": 0.7, "top_k": 50, "repetition_penalty": 1.3},
    {"min_p": 0.05, "temperature": 3.0},
    {"logit_bias": {5: 4.0, 6: -100.0}, "logprobs": 3},
    {"json_schema": '{"type": "array", "items": {"type": "integer"}}'},
    {"temperature": 0.0, "stop": ("the",)},
]


def test_a_sampled_text_does_not_depend_on_its_neighbours(tokenizer: Any) -> None:
    """Not when it gives way in the middle either: the cache has room for two texts."""
    params = [
        SamplingParams(**{"max_tokens": 40, "seed": i, "temperature": 1.3, "ignore_eos": True, **fields})
        for i, fields in enumerate(FIELDS)
    ]
    texts = prompts(8, seed=3, longest=60)

    async def scenario() -> None:
        async with running(build("llama"), tokenizer, max_batch=8, cache_memory_bytes=9 * BLOCK_BYTES) as engine:
            alone = [ids(await collect(engine, texts[i], params[i])) for i in range(8)]
            assert engine.load().preemptions == 0
            crowd = await asyncio.gather(*(collect(engine, texts[i], params[i]) for i in range(8)))
            assert [ids(deltas) for deltas in crowd] == alone
            assert engine.load().preemptions > 0
            other = await collect(engine, texts[0], SamplingParams(max_tokens=20, seed=99, ignore_eos=True))
            assert ids(other) != alone[0]

    asyncio.run(scenario())


def test_deltas_join_to_the_decoding_of_all_tokens(tokenizer: Any) -> None:
    """A random model emits bytes at random: half characters, and bytes that are none."""

    async def scenario() -> None:
        async with running(build("llama"), tokenizer) as engine:
            for seed in range(12):
                params = SamplingParams(max_tokens=100, temperature=2.0, seed=seed)
                deltas = await collect(engine, (40, 41), params)
                assert text(deltas) == tokenizer.decode(ids(deltas), skip_special_tokens=True)
                assert [d.finish_reason for d in deltas[:-1]] == [None] * (len(deltas) - 1)
                assert deltas[-1].completion_tokens == len(ids(deltas))
                assert deltas[-1].prompt_tokens == 2

    asyncio.run(scenario())


def test_stop_string_across_tokens_ends_the_text_before_it(tokenizer: Any) -> None:
    async def scenario() -> None:
        async with running(build("llama", seed=1), tokenizer) as engine:
            full = text(await collect(engine, (40, 41), GREEDY))
            stop = next(full[i : i + 4] for i in range(5, len(full)) if "\ufffd" not in full[i : i + 4])
            params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, stop=("never", stop))
            deltas = await collect(engine, (40, 41), params)
            assert text(deltas) == full[: full.index(stop)]
            assert deltas[-1].finish_reason == "stop"
            assert len(ids(deltas)) < 24

    asyncio.run(scenario())


def test_end_of_sequence_and_limits(tokenizer: Any) -> None:
    model = build("llama")
    eos = reference(model, (9, 8, 7), 6)[4]
    model.generation_config.eos_token_id = [eos]

    async def scenario() -> None:
        async with running(model, tokenizer) as engine:
            ended = await collect(engine, (9, 8, 7), SamplingParams(temperature=0.0, max_tokens=50))
            assert ids(ended)[-1] == eos
            assert ended[-1].finish_reason == "stop"
            assert text(ended) == tokenizer.decode(ids(ended)[:-1], skip_special_tokens=True)
            ignored = await collect(engine, (9, 8, 7), SamplingParams(temperature=0.0, max_tokens=50, ignore_eos=True))
            assert len(ids(ignored)) == 50
            assert ignored[-1].finish_reason == "length"
            full = await collect(engine, (5,) * 100, SamplingParams(temperature=0.0, max_tokens=90, ignore_eos=True))
            assert len(ids(full)) == CONTEXT - 100
            assert full[-1].finish_reason == "length"

    asyncio.run(scenario())


def test_bad_requests_name_their_field(tokenizer: Any) -> None:
    async def scenario() -> None:
        async with running(build("llama"), tokenizer) as engine:
            for prompt in [(), (1,) * CONTEXT, (300,), (-1,)]:
                with pytest.raises(RequestError, match=r"^prompt: "):
                    await collect(engine, prompt)
            assert len(await collect(engine, (1,))) == GREEDY.max_tokens

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0), ("temperature", -0.1), ("temperature", float("nan")), ("top_p", -0.1), ("top_p", 1.1),
        ("top_k", -2), ("min_p", 2), ("presence_penalty", 3), ("frequency_penalty", -2.5), ("repetition_penalty", 0),
        ("seed", 2**63), ("seed", 1.5), ("stop", ("",)), ("stop", "text"), ("max_tokens", True),
    ],
)  # fmt: skip
def test_sampling_params_name_a_field_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"^{name}: ") as caught:
        SamplingParams(**{name: value})
    assert caught.value.field == name


def test_closing_a_stream_frees_its_slot_for_who_waits(tokenizer: Any) -> None:
    endless = SamplingParams(max_tokens=120, ignore_eos=True)

    async def scenario() -> None:
        async with running(build("llama"), tokenizer, max_batch=2) as engine:
            streams = [engine.generate(GenerationRequest(str(i), (3, 4), endless)) for i in range(2)]
            for stream in streams:
                await anext(stream)
            third = asyncio.create_task(collect(engine, (3, 5), GREEDY))
            fourth = asyncio.create_task(collect(engine, (3, 6), endless))
            await until(lambda: engine.load().waiting == 2)
            assert engine.load().running == 2
            fourth.cancel()
            await streams[0].aclose()
            assert len(await third) == GREEDY.max_tokens
            await streams[1].aclose()
            await until(lambda: engine.load().running == engine.load().waiting == 0)
            assert engine.load().cache_tokens_used == 0

    asyncio.run(scenario())


def test_waiting_requests_start_in_order(tokenizer: Any) -> None:
    order: list[int] = []

    async def one(engine: TorchEngine, at: int) -> None:
        await collect(engine, (3, 4, at), SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True))
        order.append(at)

    async def scenario() -> None:
        async with running(build("llama"), tokenizer, max_batch=1) as engine:
            await asyncio.gather(*(one(engine, at) for at in range(8)))

    asyncio.run(scenario())
    assert order == list(range(8))


class Breakable(torch.nn.Module):
    """A layer that fails, or spoils its output, when told to."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.mode = "work"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.mode == "raise":
            raise RuntimeError("the layer broke")
        return self.inner(x) * float("nan") if self.mode == "nan" else self.inner(x)


def breakable() -> tuple[Any, Breakable]:
    model = build("llama")
    layer = Breakable(model.model.norm)
    model.model.norm = layer
    return model, layer


def fails(awaitable: Coroutine[Any, Any, Any], message: str) -> Coroutine[Any, Any, None]:
    async def check() -> None:
        with pytest.raises(EngineError, match=message):
            await asyncio.wait_for(awaitable, 20)

    return check()


@pytest.mark.parametrize(("mode", "message"), [("raise", "the layer broke"), ("nan", "not finite")])
def test_a_failed_step_fails_its_requests_and_the_engine_goes_on(mode: str, message: str, tokenizer: Any) -> None:
    model, layer = breakable()

    async def scenario() -> None:
        async with running(model, tokenizer) as engine:
            expected = ids(await collect(engine, (1, 2)))
            layer.mode = mode
            await fails(collect(engine, (1, 2)), message)
            layer.mode = "work"
            assert engine.healthy()
            assert ids(await collect(engine, (1, 2))) == expected

    asyncio.run(scenario())


def test_an_engine_that_keeps_failing_dies_visibly(tokenizer: Any) -> None:
    model, layer = breakable()

    async def scenario() -> None:
        async with running(model, tokenizer, max_batch=1) as engine:
            layer.mode = "raise"
            await asyncio.gather(*(fails(collect(engine, (1, 2)), "the layer broke") for _ in range(5)))
            await until(lambda: not engine.healthy())
            await fails(collect(engine, (1, 2)), "not running")

    asyncio.run(scenario())


def test_stop_fails_what_still_runs_and_waits(tokenizer: Any) -> None:
    async def scenario() -> None:
        async with running(build("llama"), tokenizer, max_batch=1) as engine:
            long = SamplingParams(max_tokens=120, ignore_eos=True)
            streams = [asyncio.create_task(collect(engine, (1, 2), long)) for _ in range(3)]
            await until(lambda: engine.load().running == 1)
            await engine.stop()
            assert not engine.healthy()
            results = await asyncio.gather(*streams, return_exceptions=True)
            assert [type(result) for result in results] == [EngineError] * 3

    asyncio.run(scenario())


def test_memory_and_slots_stay_at_their_bound(tokenizer: Any) -> None:
    async def scenario() -> None:
        async with running(build("llama"), tokenizer, max_batch=3) as engine:
            params = SamplingParams(max_tokens=4, seed=1)
            for _ in range(10):
                await asyncio.gather(*(collect(engine, prompt, params) for prompt in prompts(20, longest=20)))
                assert engine.load().cache_tokens_total == 3 * CONTEXT
                assert engine.load().cache_tokens_used == 0

    asyncio.run(scenario())


def test_ten_thousand_requests_leave_memory_as_it_was(tokenizer: Any) -> None:
    model = build("llama", num_hidden_layers=1, hidden_size=16, head_dim=4, intermediate_size=16)
    rng = random.Random(4)
    process = psutil.Process()

    async def one(engine: TorchEngine, number: int) -> None:
        prompt = tuple(rng.randrange(1, 9) for _ in range(rng.randint(1, 40)))
        stream = engine.generate(GenerationRequest(str(number), prompt, SamplingParams(max_tokens=3, seed=number)))
        async for _ in stream:
            if rng.random() < 0.2:  # the client goes away
                break
        await stream.aclose()

    async def client(engine: TorchEngine, numbers: range) -> None:
        for number in numbers:
            await one(engine, number)

    async def scenario() -> None:
        async with running(model, tokenizer, max_batch=64, cache_memory_bytes=100_000) as engine:
            await asyncio.gather(*(client(engine, range(at, 1000, 64)) for at in range(64)))
            before = process.memory_info().rss
            await asyncio.gather(*(client(engine, range(1000 + at, 10_000, 64)) for at in range(64)))
            await until(lambda: engine.load().running == engine.load().waiting == 0)
            assert engine.load().cache_tokens_used == 0
            assert process.memory_info().rss - before < 16e6

    asyncio.run(scenario())


def test_prompts_are_scored_right_in_a_crowd_that_gives_way(tokenizer: Any) -> None:
    texts = prompts(6, seed=11, longest=70)
    wanted = SamplingParams(max_tokens=40, temperature=0.0, logprobs=2, prompt_logprobs=True, ignore_eos=True)
    model = build("llama")

    async def scenario() -> None:
        options = {"max_batch": 8, "prefill_tokens": 8, "cache_memory_bytes": 8 * BLOCK_BYTES}
        async with running(build("llama"), tokenizer, **options) as engine:
            crowd = await asyncio.gather(*(collect(engine, prompt, wanted) for prompt in texts))
            assert engine.load().preemptions > 0
        for prompt, deltas in zip(texts, crowd, strict=True):
            tokens = [*prompt, *ids(deltas)]
            with torch.inference_mode():
                expected = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
            told = [entry for delta in deltas for entry in (*delta.prompt_logprobs, *delta.logprobs)]
            assert [entry.token for entry in told] == tokens
            assert told[0].logprob is None
            for row, entry in zip(expected, told[1:], strict=False):
                assert entry.logprob == pytest.approx(row[entry.token].item(), abs=1e-4)
                assert [value for _, value in entry.top] == pytest.approx(row.topk(2).values.tolist(), abs=1e-4)

    asyncio.run(scenario())


def test_an_answer_in_a_schema_ends_by_itself(tokenizer: Any) -> None:
    async def scenario() -> None:
        async with running(build("llama"), tokenizer) as engine:
            wanted = SamplingParams(max_tokens=100, seed=1, ignore_eos=True, json_schema='{"enum": [17, "x"]}')
            deltas = await collect(engine, (40, 41), wanted)
            assert text(deltas).strip() in ("17", '"x"')
            assert deltas[-1].finish_reason == "stop"
            bad = SamplingParams(json_schema='{"type": "wizard"}')
            with pytest.raises(RequestError, match=r"^response_format: this schema cannot be followed"):
                await collect(engine, (40, 41), bad)

    asyncio.run(scenario())


def test_a_cache_smaller_than_the_context_shortens_it(tokenizer: Any) -> None:
    async def scenario() -> None:
        async with running(build("llama"), tokenizer, cache_memory_bytes=1) as engine:
            assert engine.max_context == engine.load().cache_tokens_total == 4 * 32
        async with running(build("llama"), tokenizer, max_context=96, cache_memory_bytes=1) as engine:
            assert engine.max_context == 96

    asyncio.run(scenario())


def test_an_architecture_with_other_attention_is_refused_by_name(tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=300, hidden_size=64, n_layer=2, n_head=4))

    async def scenario() -> None:
        engine = TorchEngine(model, tokenizer, TorchEngineOptions(max_context=CONTEXT))
        with pytest.raises(UnsupportedArchitecture, match="BloomForCausalLM cannot run in the embedded engine"):
            await engine.start()
        assert not engine.healthy()

    asyncio.run(scenario())


def test_options_beyond_the_model_are_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="max_context 200 exceeds the 128 positions"):
        TorchEngine(build("llama"), tokenizer, TorchEngineOptions(max_context=200))
    with pytest.raises(ValueError, match="max_batch must be at least 1"):
        TorchEngine(build("llama"), tokenizer, TorchEngineOptions(max_batch=0))


def furthest_from_best(judge: Any, prompt: tuple[int, ...], completion: list[int]) -> float:
    """How much less likely than the judge's best choice the worst token of a completion is, in nats."""
    with torch.inference_mode():
        logits = judge(torch.tensor([[*prompt, *completion[:-1]]])).logits[0, len(prompt) - 1 :]
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(completion)[:, None])[:, 0]
    return float((logprobs.max(-1).values - chosen).max())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("runner", ["torch", "native"])
def test_bf16_tokens_are_near_the_best_of_the_model(runner: str, architecture: str, tokenizer: Any) -> None:
    """Batch shapes change the rounding, so tokens may differ; each must be within 0.05 nats of the reference's best.

    Through chunks, shared prefixes and a cache so small that texts give way.
    """
    # logits of about 1: at 8 and more one bf16 step alone is 0.06
    judge, model = (build(architecture, spread=0.08).to(torch.bfloat16) for _ in range(2))
    if runner == "native" and (reason := refusal(model)) is not None:
        pytest.skip(reason)
    beginning = prompts(1, seed=6, longest=80)[0][:40]
    texts = prompts(6, seed=5, longest=25) + [beginning + prompt for prompt in prompts(6, seed=7, longest=20)]
    wanted = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    options = {"runner": runner, "max_batch": 12, "prefill_tokens": 16, "cache_memory_bytes": 14 * BLOCK_BYTES}

    async def scenario() -> None:
        async with running(model, tokenizer, **options) as engine:
            assert engine.report()["runner"] == runner
            crowd = await asyncio.gather(*(collect(engine, prompt, wanted) for prompt in texts))
            load = engine.load()
            assert load.preemptions > 0
            assert load.reused_tokens > 0
            assert load.cache_tokens_used == 0
        for prompt, deltas in zip(texts, crowd, strict=True):
            assert furthest_from_best(judge, prompt, ids(deltas)) < 0.05

    asyncio.run(scenario())


def quantised(directory: Path) -> Any:
    config = TorchAoConfig(Int8WeightOnlyConfig())
    return AutoModelForCausalLM.from_pretrained(directory, quantization_config=config, dtype=torch.float32)


@pytest.mark.parametrize("int8", [False, True], ids=["plain", "int8"])
def test_a_model_directory_is_served_through_its_task(int8: bool, tmp_path: Path, tokenizer: Any) -> None:
    tiny_models.export(tmp_path / "plain", tokenizer, build("llama"))
    directory, model = tmp_path / "plain", build("llama")
    if int8:
        directory, model = tmp_path / "int8", quantised(directory)
        tiny_models.export(directory, tokenizer, model)
    prompt = tuple(tokenizer.encode("the cache"))
    expected = reference(model, prompt, 12)

    async def scenario() -> None:
        engine = TorchEngine.from_directory(directory, precision="fp32", device="cpu", threads=1, max_context=64)
        await engine.start()
        try:
            params = SamplingParams(temperature=0.0, max_tokens=12)
            assert ids(await collect(engine, prompt, params)) == expected
            assert engine.max_context == 64
            assert engine.tokenizer.encode("the cache") == list(prompt)
        finally:
            await engine.stop()

    asyncio.run(scenario())


@pytest.mark.parametrize("runner", ["torch", "auto"])
@pytest.mark.parametrize("precision", ["auto", "int8", "int4"])
def test_quantised_weights_are_near_the_best(runner: str, precision: str, tmp_path: Path, tokenizer: Any) -> None:
    """`auto` on a directory that jobs/quantize wrote, the others on a plain one."""
    plain = build("llama", spread=0.05)
    tiny_models.export(tmp_path / "plain", tokenizer, plain)
    directory, judge = tmp_path / "plain", plain
    if precision == "auto":
        directory, judge = tmp_path / "int8", quantised(directory)
        tiny_models.export(directory, tokenizer, judge)
    allowed = {"auto": 0.05, "int8": 0.05, "int4": 0.5}[precision]
    texts = prompts(4, seed=5, longest=60)

    async def scenario() -> None:
        engine = TorchEngine.from_directory(directory, precision=precision, device="cpu", threads=1, runner=runner)
        await engine.start()
        try:
            crowd = await asyncio.gather(*(collect(engine, prompt) for prompt in texts))
        finally:
            await engine.stop()
        for prompt, deltas in zip(texts, crowd, strict=True):
            assert furthest_from_best(judge, prompt, ids(deltas)) < allowed

    asyncio.run(scenario())


def test_torch_compile_gives_near_texts_and_says_what_it_took(tokenizer: Any) -> None:
    # In bf16, inductor's code for ATEN_CPU_CAPABILITY=avx2 gives nan (torch 2.13), which the engine's start refuses.
    dtype = torch.bfloat16 if this_cpu().bf16 else torch.float32
    judge, model = (build("llama", spread=0.08).to(dtype) for _ in range(2))
    texts = prompts(4, seed=5, longest=40)

    async def scenario() -> None:
        async with running(model, tokenizer, compile=True, prefill_tokens=16) as engine:
            crowd = await asyncio.gather(*(collect(engine, prompt) for prompt in texts))
            assert engine.report()["compile_s"] > 0
        for prompt, deltas in zip(texts, crowd, strict=True):
            assert furthest_from_best(judge, prompt, ids(deltas)) < 0.05

    asyncio.run(scenario())
    with pytest.raises(ValueError, match="compile does not go with precision int8"):
        TorchEngine(model, tokenizer, TorchEngineOptions(compile=True), "int8")
