"""What jobs use of torch's insides (2.13): the process group's store, and huge pages. No torch is imported with it."""

from __future__ import annotations

from typing import Any

from cluster.internals import Internal

HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}
"""Torch's CPU allocator asks for huge pages: with small ones a fifth of a step's time goes into page faults."""

ENTRIES = (
    Internal(
        "torch.distributed.distributed_c10d._get_default_store",
        "the key-value store by which the ranks have met: they tell rank 0 through it that they have saved",
        "no checkpoint of more than one rank is ever committed",
        "torch.distributed gives the store of a process group",
    ),
    Internal(
        "THP_MEM_ALLOC_ENABLE",
        "torch's allocator on CPUs asks for huge pages",
        "a training step on a CPU takes a fifth longer",
        "it is torch's default",
    ),
)


def group_store() -> Any:
    """Return the store of the process group that this process is in."""
    import torch.distributed as dist

    return dist.distributed_c10d._get_default_store()
