"""What this machine has not, and so cannot test; and the limits that make a plain CPU of any x86 one."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence

from cluster import precision

PLAIN_CPU = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
"""torch's and oneDNN's own limits; they are read when torch first computes."""


def has_gpu() -> bool:
    """Say whether a GPU of this machine answers."""
    return precision.this_device(on_gpu=True).reason.startswith("the GPU")


def can_swap() -> bool:
    """Say whether what optimizer states on NVMe need can be built: libaio and a compiler are there."""
    from jobs.worker.deepspeed_internals import import_deepspeed

    import_deepspeed()
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return bool(AsyncIOBuilder().is_compatible())


def lacking(flags: frozenset[str], gpu: bool) -> list[str]:
    """List the hardware that no test could use, without any test being skipped for it: tests use what there is."""
    amx = [] if "amx_bf16" in flags else ["native kernels with AMX (the CPU has none)"]
    return amx + ([] if gpu else ["GPUs (none here)"])


def summary(lacked: Sequence[str], skipped: Iterable[str]) -> str:
    """Return the line that ends a test run: hardware that lacks, and the reasons of skipped tests."""
    counted = Counter(skipped)
    tests = [f"{count} test{'s' if count > 1 else ''} ({reason})" for reason, count in sorted(counted.items())]
    untested = [*lacked, *tests]
    under = " under " + " ".join(f"{name}={os.environ[name]}" for name in PLAIN_CPU if name in os.environ)
    where = f"this machine{under if under != ' under ' else ''}"
    return f"not tested on {where}: {'; '.join(untested)}" if untested else f"nothing went untested on {where}"
