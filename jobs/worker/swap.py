"""Training state and parameters on NVMe: a folder for each rank and each start of the group, removed with it."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import secrets
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cluster.errors import UserError
from jobs.checkpoint import resume
from jobs.spec import TrainingSpec
from jobs.worker.zero import PERSISTENT, SWAP_BUFFERS


def folder(path: str, key: str, attempt: str, rank: int) -> Path:
    """Return where a rank keeps its swap files: DeepSpeed names them by rank and parameter alone. Pure."""
    return Path(path) / f"tandem-{key}" / f"{attempt}-{rank}"


@contextmanager
def held(training: TrainingSpec | None, key: str, attempt: str, rank: int) -> Iterator[Path | None]:
    """Hold the folder of a rank's swap files, where the spec wants one; what killed starts of the run left goes.

    Raises:
        UserError: there is no such folder on this node, or it cannot hold swap files.
    """
    if training is None or isinstance(training.deepspeed, str) or training.deepspeed.nvme_path is None:
        yield None
        return
    path = training.deepspeed.nvme_path
    check(Path(path), direct=training.deepspeed.offload == "nvme")
    mine = folder(path, key, attempt, rank)
    for left in mine.parent.glob("*"):
        if not left.name.startswith(f"{attempt}-"):
            shutil.rmtree(left, ignore_errors=True)
    mine.mkdir(parents=True, exist_ok=True)
    try:
        yield mine
    finally:
        shutil.rmtree(mine, ignore_errors=True)
        with suppress(OSError):  # not where another rank's is left
            mine.parent.rmdir()


class Files(NamedTuple):
    """What all ranks keep in files together."""

    states: Sequence[int]
    """Elements of each parameter whose masters, moments and gradients are there."""
    parameters: int
    """Bytes of parameters, twice: what was written is read back beside them."""


def files_of(settings: Mapping[str, Any], model: torch.nn.Module, dtype: torch.dtype) -> Files:
    """Return what is to be in files of a model, which may be on the meta device. Pure.

    Args:
        settings: `zero_optimization` of DeepSpeed's configuration.
        dtype: of the weights.

    Raises:
        UserError: parameters are to be, and all are too small.
    """
    on_nvme = {key for key in ("offload_optimizer", "offload_param") if settings[key]["device"] == "nvme"}
    states = [each.numel() for each in model.parameters() if each.requires_grad]
    large = [each.numel() for each in model.parameters() if each.numel() > PERSISTENT]
    if "offload_param" in on_nvme and not large:
        raise UserError(
            f"training.deepspeed.offload_parameters: nvme has no effect: no parameter of this model has more than "
            f"{PERSISTENT:,} elements, and smaller ones stay in memory; leave it out"
        )
    return Files(
        states if "offload_optimizer" in on_nvme else [],
        2 * dtype.itemsize * sum(large) if "offload_param" in on_nvme else 0,
    )


def check_in_parts(model: torch.nn.Module, why: Sequence[str]) -> None:
    """Refuse parameters in files of a model that workers begin whole: DeepSpeed's own swapper would take them.

    Args:
        why: what was said of how it begins.

    Raises:
        UserError: its weights are in memory already.
    """
    if not any(each.is_meta for each in model.parameters()):
        raise UserError(
            "training.deepspeed.offload_parameters: nvme is for models of which each worker begins its own parts, and "
            f"this one begins whole: {'; '.join(why) or 'its weights are made by code'}; leave it out"
        )


def check_nodes(folder: Path, kept: Files, world_size: int, workers_here: int) -> None:
    """Have every rank look at its node as `check_node` does, before any writes there. Collective.

    Raises:
        UserError: a rank refuses its node; on all of them.
    """
    problem = None
    try:
        check_node(folder, kept, world_size, workers_here)
    except UserError as error:
        problem = str(error)
    if (found := resume.first_of(problem)) is not None:
        raise UserError(found)


def check_node(folder: Path, kept: Files, world_size: int, workers_here: int) -> None:
    """Refuse a node whose disk or whose limit on locked memory is too small; DeepSpeed would not say so.

    Args:
        folder: of this rank's swap files.
        workers_here: ranks on this node.

    Raises:
        UserError: it is one.
    """
    files = (16 * sum(kept.states) + kept.parameters) // world_size * workers_here
    free = shutil.disk_usage(folder).free
    if free < files:
        raise UserError(
            f"training.deepspeed.nvme_path: {folder.parents[1]} on the node {socket.gethostname()} has "
            f"{free >> 20:,} MiB free, and its {workers_here} workers keep {files >> 20:,} MiB there; make room, or "
            "name another disk"
        )
    locked = 4 * SWAP_BUFFERS * math.ceil(max(kept.states, default=0) / world_size)
    if locked and not can_lock(locked):
        raise UserError(
            f"training.deepspeed.offload: nvme locks {locked >> 20:,} MiB of memory in each worker, more than the node "
            f"{socket.gethostname()} allows: raise its limit (`ulimit -l unlimited`, or memlock in "
            "/etc/security/limits.conf) and start the cluster again, or use offload: cpu"
        )


def can_lock(size: int) -> bool:
    """Say whether this process may keep so many bytes from being swapped out, by doing it for a moment."""
    with mmap.mmap(-1, max(size, mmap.PAGESIZE)) as memory:
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        libc = ctypes.CDLL(None, use_errno=True)
        may = libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(len(memory))) == 0
        libc.munlock(ctypes.c_void_p(address), ctypes.c_size_t(len(memory)))
    return may


def check(path: Path, *, direct: bool = True) -> None:
    """Refuse a folder that cannot hold swap files.

    Args:
        direct: whether they are to be read and written past the kernel's cache, as optimizer states are.

    Raises:
        UserError: not there, not writable, or its file system has no direct I/O (as tmpfs).
    """
    place = f"training.deepspeed.nvme_path: {path} on the node {socket.gethostname()}"
    if not path.is_dir():
        raise UserError(f"{place} is no folder; name one on a disk of every node")
    probe = path / f".tandem-{secrets.token_hex(4)}"
    try:
        os.close(os.open(probe, os.O_CREAT | os.O_WRONLY | (os.O_DIRECT if direct else 0)))
    except OSError as error:
        how = "cannot be written to directly" if direct else "cannot be written to"
        raise UserError(f"{place} {how} ({error.strerror}); name a folder on a disk") from error
    finally:
        probe.unlink(missing_ok=True)
