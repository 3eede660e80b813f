"""The engine's speed on this machine, beside `transformers.generate` with one static batch, in one run.

    python benchmarks/engine.py [--sizes 14M 197M] [--streams 1 8 32 64] [--rounds 5] [--threads 2] [--only decode ...]

Random weights, bf16, greedy, prompts of 16 tokens, 64 new ones. Contestants alternate, so that the machine's own drift
hits all alike; a rate is the median of the rounds, a ratio the median of each round's ratio. Parts:

    decode    tokens/s of the engine and of `generate`, and the ratio
    weights   int8 and int4 weights against bf16, at one stream and at many
    memory    bytes read by a step of one token, as a share of what this machine can read
    prefill   prompt tokens/s of the engine and of one forward pass of transformers
    latency   time to first token, and the longest wait of running streams, while prompts keep arriving
    parts     where a step's time goes
    start     seconds from the start of a process to a ready engine, without loading the model; plain, and forked
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SIZES = {
    "14M": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1024},
    "197M": {
        **{"hidden_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 16},
        **{"num_key_value_heads": 8, "intermediate_size": 2816},
    },
}
VOCABULARY, PROMPT, NEW = 8192, 16, 64
LONG_PROMPT, LONG_PROMPTS = 512, 8
RUNNING, ARRIVING = 32, 8
PARTS = ("decode", "weights", "memory", "prefill", "latency", "parts", "start")


def random_model(size: str) -> Any:
    """Build a Llama of this size with random weights in bf16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {**SIZES[size], "vocab_size": VOCABULARY, "max_position_embeddings": 2048}
    return LlamaForCausalLM(LlamaConfig(**shape, eos_token_id=None, bos_token_id=None)).to(torch.bfloat16).eval()


def tokenizer() -> Any:
    """A vocabulary of made-up words: the engine turns every token into text, as it would for a real model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    words += [f"Ġw{number}" for number in range(len(words), VOCABULARY)]
    raw = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw)


def prompts(count: int, length: int) -> list[list[int]]:
    import torch

    return torch.randint(0, VOCABULARY, (count, length)).tolist()  # type: ignore[no-any-return]


class Contestant:
    """A started engine and what is measured of it."""

    def __init__(self, size: str, options: argparse.Namespace, precision: str = "bf16", model: Any = None) -> None:
        from serve.engines.torch.torch_engine import TorchEngine, TorchEngineOptions

        limits = TorchEngineOptions(
            max_batch=max(64, *options.streams), max_context=1024, threads=options.threads, runner=options.runner
        )
        model = copy.deepcopy(model) if model is not None else random_model(size)
        self.engine = TorchEngine(model, tokenizer(), limits, precision)  # type: ignore[arg-type]

    async def stream(self, prompt: list[int], new: int = NEW) -> list[float]:
        """Generate; return when each token arrived."""
        from serve.engines.protocol import GenerationRequest, SamplingParams

        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
        arrived = []
        async for delta in self.engine.generate(GenerationRequest("", tuple(prompt), params)):
            arrived += [time.perf_counter()] * len(delta.token_ids)
        return arrived

    async def rate(self, streams: int) -> float:
        """Tokens/s of so many streams that start together."""
        texts = prompts(streams, PROMPT)
        began = time.perf_counter()
        arrived = await asyncio.gather(*(self.stream(text) for text in texts))
        return sum(map(len, arrived)) / (time.perf_counter() - began)

    async def prefill_rate(self) -> float:
        """Prompt tokens/s of several long prompts that arrive together."""
        texts = prompts(LONG_PROMPTS, LONG_PROMPT)
        began = time.perf_counter()
        await asyncio.gather(*(self.stream(text, 1) for text in texts))
        return LONG_PROMPTS * LONG_PROMPT / (time.perf_counter() - began)


def generate_rate(model: Any, streams: int) -> float:
    """Tokens/s of transformers' `generate` with one static batch."""
    import torch

    tokens = torch.tensor(prompts(streams, PROMPT))
    began = time.perf_counter()
    model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        **{"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0},
    )
    return streams * NEW / (time.perf_counter() - began)


def forward_rate(model: Any) -> float:
    """Prompt tokens/s of transformers' forward pass, one prompt at a time."""
    import torch

    began = time.perf_counter()
    with torch.inference_mode():
        for text in prompts(LONG_PROMPTS, LONG_PROMPT):
            model(input_ids=torch.tensor([text]), logits_to_keep=1)
    return LONG_PROMPTS * LONG_PROMPT / (time.perf_counter() - began)


async def alternate(
    contestants: dict[str, Callable[[], Awaitable[float] | float]], rounds: int
) -> dict[str, list[float]]:
    """Measure each in turn, round after round, after one round that does not count."""
    measured: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, measure in contestants.items():
            result = measure()
            value = await result if isinstance(result, Awaitable) else result
            if number:
                measured[name].append(value)
    return measured


def ratio(over: list[float], under: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


async def decode(size: str, options: argparse.Namespace) -> None:
    model = random_model(size)
    contestant = Contestant(size, options, model=model)
    await contestant.engine.start()
    for streams in options.streams:
        measured = await alternate(
            {
                "engine": partial(contestant.rate, streams),
                "generate": partial(generate_rate, model, streams),
            },
            options.rounds,
        )
        engine, generate = measured["engine"], measured["generate"]
        print(
            f"{size} decode, {streams:2} streams: engine {statistics.median(engine):7,.0f} tok/s, generate "
            f"{statistics.median(generate):6,.0f}, ratio {ratio(engine, generate):.2f}",
            flush=True,
        )
    await contestant.engine.stop()


async def weights(size: str, options: argparse.Namespace) -> None:
    engines = {precision: Contestant(size, options, precision) for precision in ("bf16", "int8", "int4")}
    for contestant in engines.values():
        await contestant.engine.start()
    for streams in sorted({1, max(options.streams)}):
        measured = await alternate(
            {name: lambda c=contestant, s=streams: c.rate(s) for name, contestant in engines.items()},  # type: ignore[misc]
            options.rounds,
        )
        rates = ", ".join(f"{name} {statistics.median(values):,.0f} tok/s" for name, values in measured.items())
        ratios = ", ".join(f"{name} {ratio(measured[name], measured['bf16']):.2f}x bf16" for name in ("int8", "int4"))
        print(f"{size} weights, {streams:2} streams: {rates}: {ratios}", flush=True)
    for contestant in engines.values():
        await contestant.engine.stop()


async def memory(size: str, options: argparse.Namespace) -> None:
    from serve.engines.torch.native import library

    for precision in ("bf16", "int8", "int4"):
        contestant = Contestant(size, options, precision)
        await contestant.engine.start()
        runner = contestant.engine._runner
        if runner is None or runner.name != "native":
            print(f"{size} memory: the native runner does not serve here")
            return
        read_bytes = runner.weight_bytes  # type: ignore[attr-defined]
        measured = await alternate(
            {
                "step": lambda c=contestant: c.rate(1),  # type: ignore[misc]
                "memory": lambda b=read_bytes: library.read_rate(options.threads, b),  # type: ignore[misc]
            },
            options.rounds,
        )
        rates = [tokens * read_bytes for tokens in measured["step"]]
        print(
            f"{size} memory, {precision}: one stream reads {statistics.median(rates) / 1e9:.1f} GB/s of weights, "
            f"{ratio(rates, measured['memory']):.0%} of the {statistics.median(measured['memory']) / 1e9:.1f} GB/s "
            "that plain reading reaches",
            flush=True,
        )
        await contestant.engine.stop()


async def prefill(size: str, options: argparse.Namespace) -> None:
    model = random_model(size)
    contestant = Contestant(size, options, model=model)
    await contestant.engine.start()
    measured = await alternate(
        {"engine": contestant.prefill_rate, "forward": lambda: forward_rate(model)}, options.rounds
    )
    print(
        f"{size} prefill, {LONG_PROMPTS} prompts of {LONG_PROMPT}: engine "
        f"{statistics.median(measured['engine']):,.0f} tok/s, transformers' forward "
        f"{statistics.median(measured['forward']):,.0f}, "
        f"ratio {ratio(measured['engine'], measured['forward']):.2f}",
        flush=True,
    )
    await contestant.engine.stop()


async def latency(size: str, options: argparse.Namespace) -> None:
    contestant = Contestant(size, options)
    await contestant.engine.start()
    await contestant.rate(RUNNING)
    running = [asyncio.create_task(contestant.stream(text, 400)) for text in prompts(RUNNING, PROMPT)]
    firsts = []
    for text in prompts(ARRIVING, LONG_PROMPT):
        await asyncio.sleep(0.2)
        began = time.perf_counter()
        arrived = await contestant.stream(text, 1)
        firsts.append(arrived[0] - began)
    waits = []
    for arrived in await asyncio.gather(*running):
        waits += [late - early for early, late in itertools.pairwise(arrived)]
    print(
        f"{size} latency, prompts of {LONG_PROMPT} arriving beside {RUNNING} streams: first token after "
        f"{1e3 * statistics.median(firsts):.0f} ms (worst {1e3 * max(firsts):.0f}); running streams wait "
        f"{1e3 * statistics.median(waits):.0f} ms for a token, {1e3 * max(waits):.0f} at worst",
        flush=True,
    )
    await contestant.engine.stop()


async def parts(size: str, options: argparse.Namespace) -> None:
    contestant = Contestant(size, options)
    await contestant.engine.start()
    for streams in options.streams:
        await contestant.rate(streams)
        before = contestant.engine.report()["step_seconds"]
        profile = getattr(contestant.engine._runner, "profile", dict)
        profile()
        began = time.perf_counter()
        await contestant.rate(streams)
        elapsed = time.perf_counter() - began
        after = contestant.engine.report()["step_seconds"]
        spent = {name: after[name] - before.get(name, 0.0) for name in after if name != "forward"} | profile()
        spent["outside"] = elapsed - sum(spent.values())
        shares = ", ".join(f"{name} {seconds / elapsed:.0%}" for name, seconds in spent.items())
        print(f"{size} parts, {streams:2} streams: {shares}", flush=True)
    await contestant.engine.stop()


async def start(size: str, options: argparse.Namespace) -> None:
    """Start engines in processes of their own, plain and forked as replicas are; the kernels have been compiled."""
    with tempfile.TemporaryDirectory(prefix="eb-", dir="/tmp") as session:
        for name in ("sockets", "logs"):
            (Path(session) / name).mkdir()
        hook = ["-S", "-m", "cluster.fork_client", "serve.deploy.warm:import_before_ray"]
        plain = _start_s([], size, options, session)
        _start_s(hook, size, options, session)  # the first one on a node starts the server
        forked = _start_s(hook, size, options, session)
    print(f"{size} start: ready {statistics.median(plain):.1f} s after the process began, model load excluded; "
          f"forked, {statistics.median(forked):.1f} s")  # fmt: skip


def _start_s(how: list[str], size: str, options: argparse.Namespace, session: str) -> list[float]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_RAYLET_PID": str(os.getpid())}
    seconds = []
    for _ in range(options.rounds):
        command = [sys.executable, *how, __file__, "--child", str(time.time()), "--sizes", size]
        command += ["--threads", str(options.threads), f"--raylet-name={session}/sockets/raylet"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment)
        seconds.append(float(done.stdout.split()[-1]))
    return seconds


async def child(size: str, options: argparse.Namespace) -> None:
    """Print the seconds from the start of this process to a ready engine, less those of making the model."""
    import serve.engines.torch.torch_engine  # noqa: F401

    before = time.perf_counter()
    model = random_model(size)
    load_s = time.perf_counter() - before
    from serve.engines.torch.torch_engine import TorchEngine, TorchEngineOptions

    engine = TorchEngine(
        model, tokenizer(), TorchEngineOptions(max_batch=64, max_context=1024, threads=options.threads)
    )
    await engine.start()
    print(time.time() - options.child - load_s)
    await engine.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 8, 32, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runner", choices=("auto", "native", "torch"), default="auto")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--child", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--raylet-name", help=argparse.SUPPRESS)  # by which cluster/fork_client.py finds its server
    options = parser.parse_args()

    import torch

    torch.set_num_threads(options.threads)
    measures = {part.__name__: part for part in (decode, weights, memory, prefill, latency, parts, start)}
    for size in options.sizes:
        for name in ["child"] if options.child else options.only:
            asyncio.run((child if name == "child" else measures[name])(size, options))


if __name__ == "__main__":
    main()
