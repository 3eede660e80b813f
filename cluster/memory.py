"""How much memory a node has for a job's processes, and how much of it is free: the machine's, a container's, a GPU's.

A container, or a service, may take less than the machine has: its control group says so, version 1 or 2, or one of the
groups around it. What is cached of files counts as free, since the kernel gives it back when it is asked for.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

UNLIMITED = 1 << 60
"""From here on a limit is none (version 1 has no other way to say so)."""
MIB = 1 << 20


@dataclass(frozen=True)
class Memory:
    """In bytes."""

    total: int
    """What there is at all."""
    available: int
    """What is free now."""


def of_node() -> Memory:
    """Return what the processes of this machine, in this process's control groups, may have."""
    import psutil

    machine = psutil.virtual_memory()
    try:
        membership = Path("/proc/self/cgroup").read_text(encoding="ascii")
    except OSError:
        membership = ""
    return least([Memory(machine.total, machine.available), *limits(Path("/sys/fs/cgroup"), membership)])


def of_gpu() -> Memory | None:
    """Return the memory of this machine's smallest GPU, whichever of them this process may use; None without one."""
    command = ("nvidia-smi", "--query-gpu=memory.total,memory.free", "--format=csv,noheader,nounits")
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()
        found = [tuple(int(part) * MIB for part in line.split(",")) for line in lines if line.strip()]
        return least(Memory(total, free) for total, free in found) if found else None
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def of_device(on_gpu: bool) -> Memory | None:
    """Return what computes on this node has: a GPU's memory, or all of the node's; None where that is not known."""
    return of_gpu() if on_gpu else of_node()


def least(found: Iterable[Memory]) -> Memory:
    """Return the least of each. Pure."""
    found = list(found)
    return Memory(min(each.total for each in found), min(each.available for each in found))


def limits(root: Path, membership: str) -> Iterator[Memory]:
    """Yield what the control groups of a process leave to it, of those that have a limit.

    Args:
        root: where control groups are mounted.
        membership: the text of /proc/PID/cgroup (cgroups(7)): a line `number:controllers:path` for each hierarchy.
    """
    for line in membership.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            names = ("memory.max", "memory.current", "inactive_file")
            yield from _around(root, path, names)
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            yield from _around(root / "memory", path, names)


def _around(mount: Path, path: str, names: tuple[str, str, str]) -> Iterator[Memory]:
    """Yield the limits of a group and of those around it; of a container's own view only the mount may be there."""
    inner = Path(path.strip("/"))
    for group in (inner, *inner.parents):
        limit, used = _number(mount / group / names[0]), _number(mount / group / names[1])
        if limit is not None and used is not None and limit < UNLIMITED:
            held = used - _cached(mount / group / "memory.stat", names[2])
            yield Memory(limit, max(0, limit - held))


def _number(file: Path) -> int | None:
    """Return the number in a file; None where there is none: no file, or no limit."""
    try:
        text = file.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _cached(file: Path, name: str) -> int:
    """Return what of a group's memory is files that it has not used lately."""
    try:
        lines = file.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0)
