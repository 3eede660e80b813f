"""torch.compile of the model: where it may be, where what is compiled is kept, and how long it took.

What is counted (FLOPs of the first micro-batches, bytes of the third step) and what is evaluated runs as it is written;
everything else runs compiled, so that a compiler works in one of the first SETTLED steps. A micro-batch of other shapes
may have it work again later, while the other ranks wait.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import sysconfig
import time
from collections.abc import Mapping, Set
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from cluster.errors import UserError
from cluster.precision import cpu_flags
from jobs.worker import torch_internals
from jobs.worker.watchdog import Watchdog

SETTLED = 4
"""So many steps of a start may take as long as a compiler does."""
MARGIN_S = 300.0
"""So much longer than before any later step may take."""
AT_STAGE_3 = (
    "ZeRO stage 3 on CPUs is compiled again at each hook that gathers weights, for minutes: take stage 1 or 2, or "
    "leave it out"
)


def check(stage: int, on_gpu: bool, environment: Mapping[str, str]) -> None:
    """Refuse to compile where it does not pay, or cannot be done.

    Args:
        environment: of this process.

    Raises:
        UserError: stage 3 on CPUs, or a node without a compiler.
    """
    if on_gpu:
        return
    if stage == 3:
        raise UserError(f"training.compile: {AT_STAGE_3}")
    compiler, header = environment.get("CXX", "g++"), Path(sysconfig.get_paths()["include"]) / "Python.h"
    if shutil.which(compiler) is None:
        raise UserError(
            f"training.compile: {platform.node()} has no C++ compiler ({compiler}): install g++, or name one by CXX"
        )
    if not header.is_file():
        raise UserError(f"training.compile: {platform.node()} lacks {header}: install Python's headers (python3-dev)")


def keep_in(folder: Path, device: torch.device) -> Path:
    """Have this process find in a folder what was compiled, and leave there what it compiles; return the exact place.

    Machine code is for one kind of device, so each has a place of its own.
    """
    place = folder / kind_of(device, cpu_flags())
    place.mkdir(parents=True, exist_ok=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(place)
    os.environ["TRITON_CACHE_DIR"] = str(place / "triton")
    return place


def kind_of(device: torch.device, flags: Set[str]) -> str:
    """Return a name for torch's version and the kind of device that this process computes on.

    Args:
        flags: features of its CPU.
    """
    if device.type == "cuda":
        kind = f"{torch.cuda.get_device_name(device)} {torch.cuda.get_device_capability(device)}"
    else:
        kind = f"{platform.machine()} {' '.join(sorted(flags))}"
    digest = hashlib.sha256(kind.encode()).hexdigest()[:8]
    return f"torch-{torch.__version__}-python-{platform.python_version()}-{device.type}-{digest}"


class Compiling:
    """When a compiler works in this process: it is no hang, and its time is told apart from the steps'."""

    def __init__(self, watchdog: Watchdog, place: Path) -> None:
        """Begin to listen; `place` is where it keeps what it makes."""
        self.place, self._watchdog = place, watchdog
        self.total_s = 0.0
        """Of all until now."""
        self._told_s, self._began = 0.0, 0.0
        self._allowed = ExitStack()
        torch_internals.listen_to_compiler(self._start, self._end)

    def take(self) -> dict[str, float]:
        """Return the seconds since the last call as a metric, if there were any."""
        seconds, self._told_s = self.total_s - self._told_s, self.total_s
        return {"compile_s": seconds} if seconds else {}

    def said(self) -> str:
        """Say what came of it, once the first steps are over."""
        if not self.total_s:
            return "training.compile: nothing was compiled, for the task never calls the model as a whole"
        return f"compiled the model in {self.total_s:.1f} s; a later start finds that in {self.place}"

    def _start(self, _: Any) -> None:
        self._allowed.enter_context(self._watchdog.during("compile", learns=False))
        self._began = time.perf_counter()

    def _end(self, _: Any) -> None:
        self.total_s += time.perf_counter() - self._began
        self._allowed.close()
