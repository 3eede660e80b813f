"""What scaling costs and how long requests wait: our policy, Ray Serve's default, and a fixed number, simulated.

    python benchmarks/scaling.py                                      a step, a square wave, bursts, a day
    python benchmarks/scaling.py --recorded ml-100k/u.data            arrivals as somebody recorded them
    python benchmarks/scaling.py --users 1000000                      one size, to 10,000 replicas

`--recorded` takes a file with a time in seconds as the last column of each line; it is squeezed into `--seconds`.
What people did over months (MovieLens' u.data) has their days and their bursts in it.
Serve's policy is Serve's own code with its default settings but for the number of requests a replica shall have
(half its slots, as our specs set it); "tuned" has the delays of our specs too.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from ray.serve import autoscaling_policy
from ray.serve._private.common import DeploymentID
from ray.serve.config import AutoscalingConfig, AutoscalingContext
from simulated_pool import Arrivals, Engine, Moment, Outcome, Policy, run

from serve.scaling.decider import Decider, Plan
from serve.scaling.policy import WorkPolicy
from serve.scaling.settings import Scaled
from serve.scaling.steps import Bounds
from serve.wire import GatewayState, Load, ReplicaState, Work

SLOTS_OF_MANY = 3
"""Slots of a replica with `--users`: a million of them then need 10,000 replicas."""


def requests(at: np.ndarray, seed: int) -> Arrivals:
    """Give arrivals their lengths: log-normal, a mean of about 200 tokens of prompt and 130 of answer."""
    random = np.random.default_rng(seed)
    prompt = np.clip(random.lognormal(5.0, 0.8, len(at)), 1, 4_000).astype(np.int64)
    generated = np.clip(random.lognormal(4.5, 0.8, len(at)), 1, 2_000).astype(np.int64)
    return Arrivals(np.sort(at), prompt, generated)


def poisson(rate: Callable[[np.ndarray], np.ndarray], peak: float, seconds: float, seed: int) -> np.ndarray:
    """Return arrivals of a rate that changes (by thinning; Lewis and Shedler, 1979)."""
    random = np.random.default_rng(seed)
    at = np.cumsum(random.exponential(1 / peak, int(peak * seconds * 1.2) + 100))
    at = at[at < seconds]
    return at[random.random(len(at)) * peak < rate(at)]


def workloads(seconds: float, per_s: float) -> dict[str, np.ndarray]:
    """Return arrivals by name: `per_s` requests a second at their height."""
    phase = 2 * math.pi / seconds
    low = 0.05 * per_s
    return {
        "step": poisson(lambda t: np.where(t > seconds / 10, per_s, low), per_s, seconds, 1),
        "square wave, 60 s": poisson(lambda t: np.where(t % 60 < 30, per_s, low), per_s, seconds, 2),
        "bursts": poisson(_bursts(seconds, per_s, low), per_s, seconds, 3),
        "a day": poisson(lambda t: low + (per_s - low) * (1 - np.cos(phase * t)) / 2, per_s, seconds, 4),
    }


def _bursts(seconds: float, per_s: float, low: float) -> Callable[[np.ndarray], np.ndarray]:
    starts = np.sort(np.random.default_rng(5).uniform(0, seconds, int(seconds / 120)))

    def rate(t: np.ndarray) -> np.ndarray:
        last = np.searchsorted(starts, t) - 1
        since = np.where(last >= 0, t - starts[np.maximum(last, 0)], np.inf)
        return np.where(since < 15, per_s, low)

    return rate


def recorded(path: Path, seconds: float) -> np.ndarray:
    """Return the times that a file's last column has, squeezed into `seconds`."""
    lines = path.read_text(encoding="utf-8").replace(",", " ").splitlines()
    at = np.sort(np.array([float(line.split()[-1]) for line in lines if line]))
    return (at - at[0]) * (seconds / max(1.0, at[-1] - at[0]))


def ours(most: int, least: int = 1) -> Policy:
    """Return our policy as a spec has it that says nothing but the bounds."""
    policy = WorkPolicy(Bounds(least, most, hold_s=Scaled().downscale_delay_s, up_after_s=Scaled().upscale_delay_s))
    return lambda moment: policy.decide(moment.look).replicas


def serves(most: int, slots: int, **settings: float) -> Policy:
    """Return Serve's default policy: its own code over the mean of what was in flight in its look-back period."""
    config = AutoscalingConfig(min_replicas=1, max_replicas=most, target_ongoing_requests=slots / 2, **settings)
    decide = autoscaling_policy._apply_autoscaling_config(autoscaling_policy.replica_queue_length_autoscaling_policy)
    seen: deque[tuple[float, int]] = deque()
    state: dict[str, object] = {}
    clock = time.time

    def policy(moment: Moment) -> int:
        nonlocal state
        now, look = moment.look.now, moment.look
        seen.append((now, moment.ongoing))
        while now - seen[0][0] > config.look_back_period_s:
            seen.popleft()
        mean = sum(count for _, count in seen) / len(seen)
        context = AutoscalingContext(
            DeploymentID("m", "a"), "m", "a", look.ready, moment.target, [], mean, 0.0, None, None,
            1, most, dict(state), None, None, now, config,
        )  # fmt: skip
        time.time = lambda: now  # its delays are of the simulation's time
        try:
            wanted, state = decide(context)
        finally:
            time.time = clock
        return max(1, min(most, int(wanted)))

    return policy


def fixed(count: int) -> Policy:
    """Return the policy of a number that never changes."""
    return lambda moment: count


def show(name: str, outcome: Outcome, base: Outcome | None) -> None:
    """Print one policy's line: waits until the first token, cost, and decisions."""
    waits = np.percentile(outcome.waits, [50, 95, 99])
    cost = f"{outcome.replica_s:13,.0f}" + (f" {outcome.replica_s / base.replica_s:5.2f}" if base else "  1.00")
    print(
        f"  {name:24}" + "".join(f"{wait:9.2f}" for wait in waits)
        + f"{cost}{outcome.most:8,}{outcome.ups:6}{outcome.downs:7}{outcome.decision_us:9.1f}", flush=True,
    )  # fmt: skip


def compare(name: str, arrivals: Arrivals, engine: Engine, most: int) -> None:
    """Print all policies' lines for one kind of arrivals."""
    rate = 1 / (float(arrivals.generated.mean()) / engine.tokens_per_s)
    mean = max(1, math.ceil(len(arrivals.at) / float(arrivals.at[-1]) / (rate * engine.slots) / 0.8))
    print(f"{name}: {len(arrivals.at):,} requests in {arrivals.at[-1]:,.0f} s")
    base = run(engine, arrivals, ours(most), 1)
    show("ours", base, None)
    show("Serve's default", run(engine, arrivals, serves(most, engine.slots), 1), base)
    delays = {"upscale_delay_s": 1.5, "downscale_delay_s": 30.0, "look_back_period_s": 2.0, "metrics_interval_s": 0.5}
    tuned = serves(most, engine.slots, **delays)
    show("Serve's, tuned", run(engine, arrivals, tuned, 1), base)
    show(f"fixed, {mean} (the mean)", run(engine, arrivals, fixed(mean), mean), base)
    show(f"fixed, {base.most} (our most)", run(engine, arrivals, fixed(base.most), base.most), base)


def look_ms(replicas: int, gateways: int = 10) -> float:
    """Return the milliseconds of one look of the endpoint's own loop over so many replicas' reports."""
    decider = Decider()
    decider.know({"m": Plan(Bounds(1, replicas), "1", slots=16)}, {"m": replicas})
    reports: dict[str, Any] = {
        f"r{at}": ReplicaState("m", f"r{at}", "1", Load(16, 2, 640.0), {}) for at in range(replicas)
    }
    reports |= {f"g{at}": GatewayState({"m": 9}, {"m": Work(1e6, 1e6, 500, 9e4)}) for at in range(gateways)}
    times = []
    for at in range(20):
        begun = time.perf_counter()
        decider.look(float(at), 0.0, reports)
        times.append(time.perf_counter() - begun)
    return 1e3 * float(np.median(times))


def main() -> None:
    """Run the comparison that the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recorded", type=Path, help="a file of recorded arrivals")
    parser.add_argument("--seconds", type=float, default=3600.0, help="how long the arrivals last")
    parser.add_argument("--per-second", type=float, default=20.0, help="requests a second at the height")
    parser.add_argument("--start", type=float, default=10.0, help="seconds until a new replica is ready")
    parser.add_argument("--users", type=int, help="so many users, each asking every 100 s, in a day of 300 s")
    given = parser.parse_args()
    engine = Engine(start_s=given.start)
    print(f"{'':26}{'p50':>9}{'p95':>9}{'p99':>9}{'replica-s':>13}{'ratio':>6}{'most':>8}{'up':>6}{'down':>7}{'us':>9}")
    if given.users:
        per_s = given.users / 100
        at = workloads(300.0, per_s)["a day"]
        engine = Engine(slots=SLOTS_OF_MANY, start_s=given.start)
        compare(f"{given.users:,} users", requests(at, 0), engine, most=10_000)
        print(f"one look of the endpoint's loop over 10,000 replicas' reports: {look_ms(10_000):.1f} ms")
        return
    if given.recorded:
        compare(given.recorded.name, requests(recorded(given.recorded, given.seconds), 0), engine, most=1_000)
        return
    for name, at in workloads(given.seconds, given.per_second).items():
        compare(name, requests(at, 0), engine, most=100)


if __name__ == "__main__":
    main()
