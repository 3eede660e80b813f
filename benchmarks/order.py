"""What the order of rows costs beside a list of them: ns for each row number, a step's time, memory.

    python benchmarks/order.py [--listed 30000000] [--steps 300]

For each number of rows, both in one run and in turns: steps of 4,096 row numbers at places drawn at random from a
permutation that is computed (jobs/data/permutation.py), and the list that numpy's `Generator.permutation` draws, where
there are at most `--listed` rows. What the list costs is paid at once, when an epoch begins. Memory is what numpy and
Python take at most meanwhile, of which tracemalloc is told.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from jobs.data import permutation  # noqa: E402

SIZES = (2**20 + 1, 10**7, 3 * 10**7, 10**8, 2**31, 10**12)
STEP = 4096


def seconds_of(work: Callable[[], object]) -> float:
    """Return how long something takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def bytes_of(work: Callable[[], object]) -> int:
    """Return the most that is allocated meanwhile."""
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def computed(size: int, steps: int) -> str:
    """Describe steps of row numbers that are computed, each with its keys as `batches.Order` makes them."""
    generator = np.random.Generator(np.random.PCG64(size))

    def step(epoch: int) -> Callable[[], object]:
        places = generator.integers(0, size, STEP)
        return lambda: permutation.keyed(size, 1, epoch).at(places)

    times = [seconds_of(step(epoch)) for epoch in range(steps)]
    middle, slowest = statistics.median(times), max(times)
    took = f"{middle / STEP * 1e9:6.1f} ns a row number, {middle * 1e3:.3f} ms a step (slowest {slowest * 1e3:.3f})"
    return f"computed {took}, {bytes_of(step(0)) / 1024:.0f} KiB"


def listed(size: int, steps: int) -> str:
    """Describe a list of all row numbers, and steps that look into it."""
    draw = np.random.Generator(np.random.PCG64(size))
    whole = seconds_of(lambda: draw.permutation(size))
    rows = draw.permutation(size)
    looked = [draw.integers(0, size, STEP) for _ in range(steps)]
    middle = statistics.median(seconds_of(lambda places=places: rows[places]) for places in looked)  # type: ignore[misc]
    took = (
        f"{whole / size * 1e9:6.1f} ns a row number, {whole * 1e3:.0f} ms an epoch, then {middle * 1e3:.3f} ms a step"
    )
    return f"listed   {took}, {rows.nbytes / 2**20:.0f} MiB"


def main() -> None:
    """Print both for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--listed", type=int, default=30_000_000)
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    for size in SIZES:
        print(f"{size:>17,} rows  {computed(size, arguments.steps)}", flush=True)
        if size <= arguments.listed:
            print(f"{'':>22}  {listed(size, arguments.steps)}", flush=True)


if __name__ == "__main__":
    main()
