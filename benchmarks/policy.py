"""How fast a served policy answers, and whether it controls: requests at a fixed rate, then a pole that it balances.

    tandem serve up serve/specs/policy.yaml
    python benchmarks/policy.py [--url http://127.0.0.1:8000] [--rate 50] [--seconds 20]

Open loop: a request every 1/rate seconds, whether or not the last one is answered, each timed from the moment at which
it was due. Closed loop: the pole of jobs/data/pole.py, one step each 20 ms; an answer that is later than that step
finds the pole a step further. Printed: percentiles in ms, how late the client itself sent (on a machine that is shared
with the server, a late client is not the server's fault), failures; and for how many steps the pole stood.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from jobs.data import pole  # noqa: E402
from serve.bench.http import Client, Lost  # noqa: E402
from serve.bench.settings import target  # noqa: E402

WARM = 100
STEPS = 500
SPUN_S = 0.0015


class Asked:
    """The policy behind its endpoint."""

    def __init__(self, url: str, model: str, key: str | None) -> None:
        self._client, self._key = Client(target(url, allow_remote=False)), key
        self._path = f"/v2/models/{model}/infer"

    async def action(self, state: pole.State) -> float:
        """Return the force that the policy wants in newtons.

        Raises:
            Lost: no answer, or none that says so.
        """
        tensor = {"name": "observation", "datatype": "FP32", "shape": [1, 4], "data": state.observation}
        status, _, answer = await self._client.post(self._path, json.dumps({"inputs": [tensor]}).encode(), self._key)
        if status != 200:
            raise Lost(f"status {status}: {answer}", begun=True)
        (action,) = next(part["data"] for part in answer["outputs"] if part["name"] == "action")
        return action if isinstance(action, float) else pole.FORCE_N * (1 if action == "right" else -1)

    def close(self) -> None:
        """End the connections."""
        self._client.close()


async def open_loop(asked: Asked, rate: float, seconds: float) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return the answers' times and the client's own lateness, (N,) ms each, and what failed."""
    draw = np.random.default_rng(0)
    states = [pole.drawn(draw) for _ in range(int(rate * seconds))]
    taken, late, failed = [], [], []

    async def one(state: pole.State, due: float) -> None:
        late.append(1000 * (time.perf_counter() - due))
        try:
            await asked.action(state)
        except (OSError, Lost) as error:
            failed.append(str(error))
        else:
            taken.append(1000 * (time.perf_counter() - due))

    begin, running = time.perf_counter() + 0.05, []
    for number, state in enumerate(states):
        due = begin + number / rate
        await until(due)
        running.append(asyncio.create_task(one(state, due)))
    await asyncio.gather(*running)
    return np.array(taken), np.array(late), failed


async def until(due: float) -> None:
    """Wait for a moment of `perf_counter`; timers of event loops may be a millisecond late, so the last one is spun."""
    await asyncio.sleep(max(0, due - SPUN_S - time.perf_counter()))
    while time.perf_counter() < due:
        await asyncio.sleep(0)


async def closed_loop(asked: Asked) -> tuple[int, int]:
    """Balance the pole in real time; return for how many steps it stood, and how many actions came too late."""
    state, force, missed = pole.drawn(np.random.default_rng(1)), 0.0, 0
    begin = time.perf_counter()
    for step in range(STEPS):
        answer = asyncio.create_task(asked.action(state))
        done, _ = await asyncio.wait([answer], timeout=max(0, begin + (step + 1) * pole.STEP_S - time.perf_counter()))
        missed += not done
        force = await answer
        await until(begin + (step + 1) * pole.STEP_S)
        state = state.after(force)
        if state.lost:
            return step + 1, missed
    return STEPS, missed


async def measured(options: argparse.Namespace) -> None:
    """Measure, and print."""
    asked = Asked(options.url, options.model, options.key)
    for _ in range(WARM):
        await asked.action(pole.State(0, 0, 0, 0))
    taken, late, failed = await open_loop(asked, options.rate, options.seconds)
    print(f"{len(taken)} answers at {options.rate:g} a second; {len(failed)} failed {failed[:1]}")
    for name, values in (("answer", taken), ("client late", late)):
        p50, p90, p99 = np.percentile(values, [50, 90, 99])
        print(f"{name:12} p50 {p50:.2f}  p90 {p90:.2f}  p99 {p99:.2f}  max {values.max():.2f} ms")
    stood, missed = await closed_loop(asked)
    print(f"the pole stood for {stood} of {STEPS} steps; {missed} actions were later than 20 ms")
    asked.close()


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="policy")
    parser.add_argument("--key", default=None)
    parser.add_argument("--rate", type=float, default=50.0)
    parser.add_argument("--seconds", type=float, default=20.0)
    asyncio.run(measured(parser.parse_args()))


if __name__ == "__main__":
    main()
