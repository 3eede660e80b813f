"""Sums over all nodes, as gloo makes them for gradients."""

from __future__ import annotations

import time
from datetime import timedelta

NBYTES = 8 << 20
SECONDS = 1.0
MOST_SUMS = 20
TIMEOUT = timedelta(seconds=30)


def timed_sum(rank: int, world_size: int, address: str, port: int) -> tuple[int, float]:
    """Make a process group of its own, sum for about a second, end the group; return bytes and seconds of one sum.

    Raises:
        RuntimeError: the group does not come up, or a sum does not end.
    """
    import torch
    import torch.distributed as dist

    url = f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"
    dist.init_process_group("gloo", init_method=url, rank=rank, world_size=world_size, timeout=TIMEOUT)
    try:
        content = torch.ones(NBYTES // 4)
        took = _timed(lambda: dist.all_reduce(content), 1)
        count = torch.tensor([_sums(took)])
        dist.broadcast(count, 0)  # all ranks make as many
        return NBYTES, _timed(lambda: dist.all_reduce(content), int(count))
    finally:
        dist.destroy_process_group()


def _sums(seconds: float) -> int:
    """Say how many sums of so many seconds fit into SECONDS."""
    return max(1, min(MOST_SUMS, int(SECONDS / max(seconds, 1e-6))))


def _timed(call: object, times: int) -> float:
    assert callable(call)
    began = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - began) / times


def bus_bytes_per_s(nbytes: int, seconds: float, world_size: int) -> float:
    """Return what each node has to send, a second, as nccl-tests counts it. Pure."""
    return 2 * (world_size - 1) / world_size * nbytes / seconds
