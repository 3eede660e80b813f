"""What it is worth to send a prompt to the replica that has read its beginning, and what it may cost.

    python benchmarks/routing.py [--rounds 3] [--requests 96] [--replicas 2]

Two real engines of one thread each, 14M random weights, and three ways to choose between them: at random, the least
busy one, and ours (`serve/routing/choose.py`). Each round gives all three the same requests at the same times, as a
Poisson process that keeps the engines about half busy; the ways take turns, with caches that are empty at the start.
Workloads:

    shared    16 system prompts of 384 tokens, each request one of them and 32 tokens of its own
    hot       nine of ten requests have one and the same system prompt: balance matters more
    apart     416 tokens that no two requests share: nothing to gain

Printed: time to first token (median, p95), tokens a second, the share of prompt tokens that were not computed again,
and for each round's figures the ratio to the least busy way (median of the rounds).
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from engine import VOCABULARY, random_model, tokenizer  # noqa: E402

from serve.engines.protocol import GenerationRequest, SamplingParams  # noqa: E402
from serve.engines.torch.torch_engine import TorchEngine, TorchEngineOptions  # noqa: E402
from serve.routing.choose import ByPrefix, Candidate, least_busy  # noqa: E402
from serve.wire import GenerateCall  # noqa: E402

SHARED, OWN, NEW = 384, 32, 32
PREFIXES = 16
SLOTS = 16
Choose = Callable[[GenerateCall, Sequence[Candidate]], Candidate]


@dataclass(frozen=True)
class Arrival:
    """One request: when, and with which prompt."""

    at_s: float
    prompt: tuple[int, ...]


@dataclass(frozen=True)
class Outcome:
    """What one way made of the arrivals."""

    median_ms: float
    p95_ms: float
    tokens_s: float
    reused: float


def arrivals(workload: str, count: int, rate: float, seed: int) -> list[Arrival]:
    """Return the requests of a workload."""
    draw = random.Random(seed)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(draw.randrange(VOCABULARY) for _ in range(length))

    prefixes = [tokens(SHARED) for _ in range(PREFIXES)]
    at, made = 0.0, []
    for _ in range(count):
        at += draw.expovariate(rate)
        prefix = {
            "shared": lambda: draw.choice(prefixes),
            "hot": lambda: prefixes[0] if draw.random() < 0.9 else draw.choice(prefixes),
            "apart": lambda: tokens(SHARED),
        }[workload]()
        made.append(Arrival(at, prefix + tokens(OWN)))
    return made


async def play(choose: Choose, todo: Sequence[Arrival], replicas: int) -> Outcome:
    """Serve the arrivals with fresh engines."""
    limits = TorchEngineOptions(max_batch=SLOTS, max_context=1024, threads=1)
    engines = [TorchEngine(random_model("14M"), tokenizer(), limits, "bf16") for _ in range(replicas)]
    await asyncio.gather(*(engine.start() for engine in engines))
    running = [0] * replicas
    waits: list[float] = []
    began = time.perf_counter()

    async def one(arrival: Arrival) -> None:
        await asyncio.sleep(max(0.0, arrival.at_s - (time.perf_counter() - began)))
        found = [Candidate(str(at), "1", SLOTS, running[at], 0) for at in range(replicas)]
        at = int(choose(GenerateCall("", arrival.prompt), found).replica_id)
        running[at] += 1
        first = None
        params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
        async for _ in engines[at].generate(GenerationRequest("", arrival.prompt, params)):
            first = first or time.perf_counter()
        running[at] -= 1
        assert first is not None
        waits.append(1000 * (first - began - arrival.at_s))

    await asyncio.gather(*(one(each) for each in todo))
    took = time.perf_counter() - began
    reused = sum(engine.load().reused_tokens for engine in engines) / sum(len(each.prompt) for each in todo)
    await asyncio.gather(*(engine.stop() for engine in engines))
    ordered = sorted(waits)
    return Outcome(statistics.median(ordered), ordered[int(0.95 * len(ordered))], len(todo) * NEW / took, reused)


def ways(seed: int) -> dict[str, Choose]:
    """Return the ways to choose, as new."""
    draw, ours = random.Random(seed), ByPrefix()
    return {
        "random": lambda call, found: draw.choice(found),
        "least busy": lambda call, found: least_busy(found),
        "tandem": lambda call, found: ours.choose("m", call, found),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--rate", type=float, default=12.0, help="requests a second")
    parser.add_argument("--workloads", nargs="+", default=["shared", "hot", "apart"])
    options = parser.parse_args()
    for workload in options.workloads:
        rounds: list[dict[str, Outcome]] = []
        for number in range(options.rounds):
            todo = arrivals(workload, options.requests, options.rate, seed=number)
            chosen = list(ways(number).items())
            order = chosen[number % 3 :] + chosen[: number % 3]
            rounds.append({name: asyncio.run(play(way, todo, options.replicas)) for name, way in order})
        show(workload, rounds)


def show(workload: str, rounds: Sequence[dict[str, Outcome]]) -> None:
    """Print one workload's table."""
    print(f"\n{workload}: first token median / p95 ms, tokens/s, read before; ratio of the p95 to least busy")
    for name in ("random", "least busy", "tandem"):
        found = [each[name] for each in rounds]
        middle = [statistics.median(getattr(each, field) for each in found) for field in Outcome.__annotations__]
        ratio = statistics.median(each[name].p95_ms / each["least busy"].p95_ms for each in rounds)
        print(f"  {name:10}  {middle[0]:7.1f} / {middle[1]:7.1f}  {middle[2]:7.0f}  {middle[3]:5.0%}   {ratio:.2f}")


if __name__ == "__main__":
    main()
