"""What the gateway costs and withstands on this machine: each figure beside its bar, measured side by side in one run.

    python benchmarks/serving.py [--only throughput first-token ...] [--rounds 3] [--litellm ENV/bin/python]

A 14M Llama with random weights (benchmarks/engine.py's), bf16, greedy, prompts of 16 tokens and 64 new ones; for the
last two parts an engine that answers at once. Contestants alternate; a rate is the median of the rounds, a ratio the
median of each round's ratio. Everything runs on this machine, in a cluster of its own that ends with it. Parts:

    throughput   tokens/s through HTTP at 64 streams over the bare engine's, with the same threads
    first-token  what HTTP adds to the time to first token, one stream at a time
    crowd        2,000 clients for 60 s on two replicas: failures, cut streams, memory
    fairness     two keys that offer 10:1: Jain's index of their parts of the max-min share, and the small one's TTFT
    step         from 1 to 32 users: seconds until another replica answers
    zero         from no replica to the first token
    replay       the longest gap in a stream when a replica is killed
    gateway      requests/s and latency with keys, limits, fairness and metering, without, and of Ray Serve's bare echo
    litellm      what litellm's proxy adds to a request, beside what the gateway adds
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serving_peers import MASTER_KEY, BareEngine, echo, litellm
from serving_rig import Rig, Verdicts, failures, get, load, memory, rig, said, wait_until

PROMPT, NEW, STREAMS = 16, 64, 64
IDS = (256, 8192)
"""Token ids of words: the first 256 are single bytes."""
WIDE = {"max_queued": 4_096, "max_queued_per_key": 4_096}


@dataclass
class Bench:
    """The cluster, the options, and the verdicts so far."""

    rig: Rig
    options: argparse.Namespace
    verdicts: Verdicts
    stack: ExitStack = field(default_factory=ExitStack)

    def llama(self, **model: Any) -> dict[str, Any]:
        """Return a spec that serves the Llama."""
        own = {"model": str(self.rig.folder / "llama"), "precision": "bf16", "max_batch": STREAMS, "max_context": 1024}
        own |= {"resources": {"cpus_per_replica": self.options.threads}}
        return {"models": {"llama": own | model}}

    def instant(self, required: str) -> dict[str, Any]:
        """Return a spec that serves the engine which answers at once."""
        model = {
            "model": str(self.rig.folder / "tiny"),
            "engine": "instant_engine:ENGINE",
            "max_batch": 256,
            "max_queued": 4_096,
        }
        return {"models": {"tiny": model | {"resources": {"cpus_per_replica": 1}}}, "keys": {"required": required}}

    def send(self, **given: Any) -> dict[str, Any]:
        """Load the Llama."""
        sizes = {"token_ids": IDS, "prompt_tokens": PROMPT, "answer_tokens": NEW}
        return load(self.rig.endpoint, **{**sizes, **given})


def throughput(bench: Bench) -> None:
    bare = BareEngine(bench.rig.folder / "llama", bench.options.threads)
    bench.stack.callback(bare.close)
    bench.rig.up(bench.llama())
    rates: dict[str, list[float]] = {"engine": [], "http": []}
    client = []
    for number in range(bench.options.rounds + 1):
        engine = bare.rate(STREAMS, PROMPT, NEW)
        told = bench.send(users=STREAMS, requests=STREAMS, seed=number, stream=True)
        if number:  # the first round warms both
            rates["engine"].append(engine)
            rates["http"].append(told["rates_with_drain"]["completion_tokens_per_second"])  # as the engine's is
            client += told["client"]["cpu_share"]
    ratio = statistics.median(http / engine for http, engine in zip(rates["http"], rates["engine"], strict=True))
    note = f"{statistics.median(rates['http']):,.0f} of {statistics.median(rates['engine']):,.0f} tokens/s; "
    note += f"the client took {statistics.mean(client):.0%} of a CPU"
    bench.verdicts.judge("throughput, 64 streams over the bare engine (goal 0.95)", ratio, ">= 0.90", "", note)


def first_token(bench: Bench) -> None:
    bare = BareEngine(bench.rig.folder / "llama", bench.options.threads)
    bench.stack.callback(bare.close)
    bench.rig.up(bench.llama())
    added, shown = [], []
    for number in range(bench.options.rounds + 1):
        engine = 1e3 * bare.ttft(20, PROMPT)
        told = bench.send(users=1, requests=20, answer_tokens=4, seed=number)
        http = told["latency_ms"]["ttft"]["p50"]
        if number:
            added.append(http - engine)
            shown.append((http, engine))
    http, engine = (statistics.median(each) for each in zip(*shown, strict=True))
    note = f"{http:.1f} ms through HTTP, {engine:.1f} ms of the engine"
    bench.verdicts.judge("TTFT added at one stream (goal 5)", statistics.median(added), "<= 10", "ms", note)


def crowd(bench: Bench) -> None:
    clients, seconds = bench.options.clients, bench.options.seconds
    bench.rig.up(bench.llama(replicas=2, **WIDE))
    groups = lambda: {"gateway": bench.rig.gateways(), "replicas": bench.rig.replicas("llama")}  # noqa: E731
    with memory(groups) as sampled:
        told = bench.send(
            users=clients, requests=10_000_000, seconds=seconds, answer_tokens=32, ramp_s=5.0, processes=2, drain_s=60.0
        )
    counted = told["requests"]
    note = f"{counted['completed']:,} completed, {counted['rejected_429']:,} rejected with 429; {said(told)}"
    bench.verdicts.judge(f"{clients:,} clients for {seconds:g} s: failures but 429", failures(told), "<= 0", "", note)
    bench.verdicts.judge(f"{clients:,} clients for {seconds:g} s: cut streams", counted["cut_streams"], "<= 0")
    for name, values in sampled.items():
        third = max(1, len(values) // 3)
        early, late = statistics.median(values[third // 2 : third + 1]), statistics.median(values[-third:])
        note = f"{values[0]:.0f} MiB before, {early:.0f} in the first third, {late:.0f} in the last"
        bench.verdicts.judge(f"memory of the {name}, last third over first", late / early, "<= 1.05", "", note)


def fairness(bench: Bench) -> None:
    bench.rig.up({**bench.llama(max_batch=16), "keys": {"required": "always"}})
    keys = {name: bench.rig.key(name) for name in ("big", "small")}
    own = {name: (key, 1.0) for name, key in keys.items()}
    capacity = bench.send(keys={"big": own["big"]}, users=32, requests=10_000, seconds=6)["rates"][
        "requests_per_second"
    ]
    small_rate = 0.3 * capacity
    alone = bench.send(keys={"small": own["small"]}, rate=small_rate, requests=10_000, seconds=20)
    both = bench.send(
        keys={"big": (keys["big"], 10.0), "small": (keys["small"], 1.0)},
        **{"rate": 11 * small_rate, "requests": 100_000, "seconds": 40},
    )
    share = both["fairness"]["jain_of_max_min_shares"]
    rate = both["rates"]["requests_per_second"]
    note = (
        f"big {_of(both, 'big')}, small {_of(both, 'small')}; tokens alone {both['fairness']['jain_of_tokens']:.3f}; "
    )
    note += f"{rate:.0f} requests/s, {capacity:.0f} with the big one alone"
    bench.verdicts.judge("fairness of two keys at 10:1, Jain of max-min shares", share, ">= 0.95", "", note)
    p95 = alone["latency_ms"]["ttft"]["p95"], both["callers"]["small"]["latency_ms"]["ttft"]["p95"]
    note = f"{p95[0]:.0f} ms alone, {p95[1]:.0f} ms beside the big one"
    bench.verdicts.judge("the small key's p95 TTFT over alone", p95[1] / p95[0], "<= 2", "", note)


def _of(told: dict[str, Any], caller: str) -> str:
    counted = told["callers"][caller]["requests"]
    return f"{counted['completed']} of {counted['sent']}"


def step(bench: Bench) -> None:
    spec = bench.llama(replicas={"min": 1, "max": 2}, max_batch=16, **WIDE)
    bench.rig.up(spec)
    bench.send(users=1, requests=20)
    found: list[float | None] = []

    def watch() -> None:
        found.append(wait_until(lambda: _answering(bench) >= 2, 45, 0.1))

    watching = threading.Thread(target=watch)
    watching.start()
    told = bench.send(users=32, requests=100_000, seconds=25, warmup=0, answer_tokens=128)
    watching.join()
    note = f"{failures(told)} failures"
    _judge_or_say(bench, "from 1 to 32 users: another replica answers (goal 5)", found[0], "<= 10", "s", note)


def _answering(bench: Bench) -> int:
    """Return how many replicas generate just now."""
    replicas = (get(f"{bench.rig.endpoint}/status") or {}).get("llama", {}).get("replicas", [])
    return sum(replica["running"] > 0 for replica in replicas)


def zero(bench: Bench) -> None:
    spec = bench.llama(replicas={"min": 0, "max": 1}, downscale_delay_s=1, **WIDE)
    try:
        bench.rig.up(spec)
    except RuntimeError as error:
        bench.verdicts.say(f"scale from zero: not run, this version refuses it: {str(error).strip().splitlines()[-1]}")
        return
    if wait_until(lambda: not bench.rig.replicas("llama"), 60, 0.5) is None:
        bench.verdicts.judge(
            "scale to zero when idle, replicas left after 60 s", len(bench.rig.replicas("llama")), "<= 0"
        )
        return
    time.sleep(2)
    told = bench.send(users=1, requests=1, warmup=0)
    first = told["latency_ms"].get("ttft", {}).get("p50")
    _judge_or_say(bench, "from no replica to the first token", first and first / 1e3, "<= 10", "s", said(told))


def replay(bench: Bench) -> None:
    bench.rig.up(bench.llama(replicas=2, max_batch=16, **WIDE))
    alone = bench.send(users=16, requests=16, answer_tokens=512)
    killed: list[float] = []

    def kill() -> None:
        time.sleep(alone["duration_s"] / 3)
        bench.rig.kill(bench.rig.replicas("llama")[0])
        killed.append(time.monotonic())

    killing = threading.Thread(target=kill)
    killing.start()
    told = bench.send(users=16, requests=16, answer_tokens=512, warmup=0, seconds=30, drain_s=60.0)
    killing.join()
    bench.verdicts.judge("replica killed under 16 streams: streams not whole", failures(told), "<= 0", "", said(told))
    note = f"{alone['longest_gap_ms']:.0f} ms undisturbed"
    _judge_or_say(bench, "replica killed: longest gap in a stream", told["longest_gap_ms"], "<= 5000", "ms", note)


def gateway(bench: Bench) -> None:
    echoing = bench.stack.enter_context(echo())
    found: dict[str, dict[str, float]] = {}
    shares: dict[str, float] = {}
    for name, required in (("without keys", "never"), ("with keys", "always")):
        bench.rig.up(bench.instant(required))
        keys = {"one": (bench.rig.key("one"), 1.0)} if required == "always" else None
        pairs = [(_quick(bench.rig.endpoint, keys), _quick(echoing, None)) for _ in range(bench.options.rounds)]
        found[name], found[f"echo beside {name}"] = (_medians([pair[side] for pair in pairs]) for side in (0, 1))
        shares[name] = statistics.median(ours["rate"] / theirs["rate"] for ours, theirs in pairs)
    rates = ", ".join(f"{name} {each['rate']:,.0f}" for name, each in found.items())
    note = f"requests/s of 32 clients: {rates}; without keys {shares['without keys']:.2f}"
    bench.verdicts.judge(
        "requests/s with keys over Serve's bare echo (aim 0.8)", shares["with keys"], ">= 0.6", "", note
    )
    for at in ("p50", "p99"):
        shown = ", ".join(f"{name} {each[at]:.2f}" for name, each in found.items())
        added = found["with keys"][at] - found["without keys"][at]
        if at == "p50":
            bench.verdicts.judge("keys, limits, fairness and metering add, p50", added, "<= 2", "ms", shown)
        else:
            bench.verdicts.say(f"keys, limits, fairness and metering add at p99: {added:.2f} ms; {shown}, one client")


def _medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}


def _quick(url: str, keys: dict[str, tuple[str, float]] | None, **given: Any) -> dict[str, float]:
    """Return requests/s of 32 clients, and percentiles in ms of one."""
    own = {"stream": False, "prompt_tokens": 16, "answer_tokens": 1, "requests": 100_000, "keys": keys, **given}
    many = load(url, users=32, seconds=4, warmup=20, **own)
    one = load(url, users=1, seconds=3, warmup=20, **own)
    for told in (many, one):
        if failures(told) or told["requests"]["rejected_429"]:
            raise RuntimeError(f"{url}: {told['requests']}")
    return {"rate": many["rates"]["requests_per_second"], **{at: one["latency_ms"]["e2e"][at] for at in ("p50", "p99")}}


def beside_litellm(bench: Bench) -> None:
    if bench.options.litellm is None:
        bench.verdicts.say("litellm: not run; name the Python of an environment with litellm[proxy] by --litellm")
        return
    bench.rig.up(bench.instant("always"))
    key = bench.rig.key("beside")
    url, kept = bench.stack.enter_context(litellm(bench.options.litellm, bench.rig.endpoint, key))
    rounds = [
        (
            _quick(bench.rig.endpoint, {"one": (key, 1.0)}),
            _quick(url, {"one": (MASTER_KEY, 1.0)}, model="tiny", ignore_eos=False),
        )
        for _ in range(bench.options.rounds)
    ]
    ours, theirs = (_medians([pair[side] for pair in rounds]) for side in (0, 1))
    added = {at: theirs[at] - ours[at] for at in ("p50", "p99")}
    bench.verdicts.say(
        f"litellm ({kept}) in front of the same endpoint adds {added['p50']:.2f} ms at the median, {added['p99']:.2f} "
        f"at p99, and does {theirs['rate']:,.0f} requests/s; the endpoint alone, with a key: {ours['p50']:.2f} and "
        f"{ours['p99']:.2f} ms in all, {ours['rate']:,.0f} requests/s"
    )


def _judge_or_say(bench: Bench, name: str, value: float | None, bar: str, unit: str, note: str) -> None:
    if value is None:
        bench.verdicts.failed += 1
        bench.verdicts.say(f"{name}: never (bar {bar} {unit}) MISSED  {note}")
    else:
        bench.verdicts.judge(name, value, bar, unit, note)


PARTS: dict[str, Callable[[Bench], None]] = {
    "throughput": throughput,
    "first-token": first_token,
    "crowd": crowd,
    "fairness": fairness,
    "step": step,
    "zero": zero,
    "replay": replay,
    "gateway": gateway,
    "litellm": beside_litellm,
}


def main() -> None:
    """Run the parts and print their figures; the exit code is 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of the engine, bare and served (default 1)")
    parser.add_argument("--clients", type=int, default=2_000, help="of the crowd (default 2,000)")
    parser.add_argument("--seconds", type=float, default=60, help="of the crowd (default 60)")
    parser.add_argument("--litellm", type=Path, help="the Python of an environment with litellm[proxy]")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started ends then too
    verdicts = Verdicts()
    with rig(cpus=4) as own:
        for name in options.only:
            began = time.monotonic()
            bench = Bench(own, options, verdicts)
            try:
                with bench.stack:
                    PARTS[name](bench)
            except Exception as error:  # one part's failure shall not hide the others' figures
                verdicts.failed += 1
                verdicts.say(f"{name}: FAILED: {error}")
            print(f"    ({name}: {time.monotonic() - began:.0f} s)", file=sys.stderr, flush=True)
    sys.exit(1 if verdicts.failed else 0)


if __name__ == "__main__":
    main()
