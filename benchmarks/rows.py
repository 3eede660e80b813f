"""What a worker holds in memory of its rows: bytes for each, while it takes steps all over them.

    python benchmarks/rows.py [--rows 100000000] [--files 200] [--steps 500]

Rows of one column, `targets`, are written to files in a temporary folder (4 bytes each), opened as a worker does, and
read by steps of 4,096 row numbers in the order of a run. Beside it, what a worker held before: that column in one
array. Printed is memory of the process's own (RssAnon); what the system keeps of the files is not, since it takes that
back where it is needed, and has it once for all workers of a machine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from jobs.data import batches  # noqa: E402
from jobs.data.rows import Rows, write  # noqa: E402

STEP = 4096


def own_bytes() -> int:
    """Return the memory of this process that no file stands behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def written(folder: Path, rows: int, files: int) -> list[Path]:
    """Write rows, as even as can be, into so many files."""
    paths = [folder / f"{number:05d}.arrow" for number in range(files)]
    for number, path in enumerate(paths):
        count = (number + 1) * rows // files - number * rows // files
        write(path, {"targets": np.full(count, number, dtype=np.int32)})
    return paths


def step_times(read: Rows, steps: int) -> list[float]:
    """Take steps in the order of a run, and return the seconds that each took, sorted."""
    order, times = batches.Order(len(read), seed=0), []
    for step in range(steps):
        began = time.perf_counter()
        chosen = order.take(step * STEP, STEP)
        read.targets(chosen)
        times.append(time.perf_counter() - began)
    return sorted(times)


def main() -> None:
    """Print what is held after opening, after the steps, and what one array would take."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10**8)
    parser.add_argument("--files", type=int, default=200)
    parser.add_argument("--steps", type=int, default=500)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = written(Path(folder), arguments.rows, arguments.files)
        step_times(Rows(files[:2]), 3)  # what the libraries take once
        before, began = own_bytes(), time.perf_counter()
        read = Rows(files)
        print(f"{len(read):,} rows in {len(files):,} files: opened in {time.perf_counter() - began:.2f} s")
        opened = own_bytes() - before
        times = step_times(read, arguments.steps)
        held = own_bytes() - before
        print(
            f"held after opening {opened / 2**20:.1f} MiB, after {arguments.steps} steps {held / 2**20:.1f} MiB: ",
            end="",
        )
        print(f"{held / len(read):.3f} bytes a row; a step of {STEP:,} took {1e3 * times[len(times) // 2]:.2f} ms")
        print(f"one array of the column: {4 * len(read) / 2**20:.1f} MiB: 4 bytes a row")


if __name__ == "__main__":
    main()
