"""A policy's forward pass as its network and as the graph that is served, in one run.

    python benchmarks/frozen.py [--repeats 200]

Cold: before each pass 48 MiB are written and 10 ms slept, so that nothing of it is in a cache, as between requests at
fifty a second. Warm: again and again. Printed: ms at the median and for one in ten, and the ratio of the medians.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from jobs.data import pole  # noqa: E402
from jobs.tasks import get  # noqa: E402

CONFIG = {"hidden_size": 64, "layers": 1, "dropout": 0.0}
FLUSHED_BYTES = 48 << 20


def times(work: Callable[[], object], repeats: int, before: Callable[[], None]) -> np.ndarray:
    """Return what each call took, (repeats,) ms; `before` runs ahead of each."""
    taken = []
    for _ in range(repeats):
        before()
        began = time.perf_counter()
        work()
        taken.append(1000 * (time.perf_counter() - began))
    return np.array(taken)


def main() -> None:
    """Measure both, by turns, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--repeats", type=int, default=200)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    draw, task = np.random.default_rng(0), get("policy")({})
    states = [pole.drawn(draw).observation for _ in range(64)]
    task.fit(task.observe([{"observation": s, "action": ["left", "right"][i % 2]} for i, s in enumerate(states)]))
    model = task.build("mlp", CONFIG).eval()
    numbers, room = torch.randn(1, 4), np.zeros(FLUSHED_BYTES, np.uint8)

    def flush() -> None:
        np.add(room, 1, out=room)
        time.sleep(0.01)

    for name, before in (("cold", flush), ("warm", lambda: None)):
        found = {}
        for what, network in (("network", model), ("graph", task.served_model(model))):
            with torch.inference_mode():
                times(lambda: network(numbers=numbers).logits, 20, lambda: None)  # noqa: B023
                found[what] = times(lambda: network(numbers=numbers).logits, repeats, before)  # noqa: B023
            p50, p90 = np.percentile(found[what], [50, 90])
            print(f"{name} {what:8} p50 {p50:.3f}  p90 {p90:.3f} ms")
        print(f"{name} graph over network: {np.median(found['graph']) / np.median(found['network']):.2f}")


if __name__ == "__main__":
    main()
