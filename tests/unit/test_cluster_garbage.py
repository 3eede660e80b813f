"""What a process holds when it has started is not walked again by the garbage collector."""

from __future__ import annotations

import subprocess
import sys

FROZEN = """
import gc
from cluster import garbage
kept, cycle = [[] for _ in range(1000)], []
cycle.append(cycle)
del cycle
garbage.settle()
assert gc.get_freeze_count() >= 1000, gc.get_freeze_count()
assert gc.collect() == 0 and len(gc.get_objects()) < 100
later = []
later.append(later)
del later
assert gc.collect() == 1
"""


def test_what_is_there_is_frozen_and_what_comes_later_is_collected() -> None:
    subprocess.run([sys.executable, "-c", FROZEN], check=True)
