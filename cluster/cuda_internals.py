"""Imports that leave CUDA asleep, so that a process that has made them can be forked.

The children of a process that has woken the CUDA driver cannot use it (torch's notes on multiprocessing, "poison
fork"). Libraries look for GPUs while they are imported. How many there are, torch learns without the driver from NVML
where PYTORCH_NVML_BASED_CUDA_CHECK is set; what they can do, the driver alone tells. A child is asked for that, and
its answer stands in for the driver's while things are imported.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any

from cluster.internals import Internal

ENTRIES = (
    Internal(
        "torch.cuda.get_device_properties, torch.cuda.current_device",
        "replaced by ones that another process answers while things are imported, and they themselves from then on: "
        "torchao, which transformers imports, asks them what the GPU can do, and modules keep them",
        "workers with GPUs are started, not forked: each imports for itself, ten seconds and more",
        "torch tells a GPU's compute capability without its driver, as it does how many there are",
    ),
    Internal(
        "torch._dynamo.device_interface.caching_worker_device_properties",
        "emptied once things are imported: it keeps what the other process has answered",
        "torch.compile takes every GPU of a node for the first",
        "torch tells what GPUs can do without their driver",
    ),
)
KIND = ("name", "major", "minor", "multi_processor_count")
"""What GPUs of one kind have in common."""


class CannotFork(RuntimeError):
    """A process that is forked off this one could not use its GPUs."""


@contextmanager
def asleep() -> Iterator[None]:
    """Have what is imported meanwhile find this machine's GPUs without waking CUDA.

    Raises:
        CannotFork: it was woken, GPUs of several kinds are here, or what they are cannot be asked.
    """
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    import torch

    if torch.version.hip is not None:
        raise CannotFork("whether ROCm can be forked is not known")
    if torch.version.cuda is None or not torch.cuda.device_count():
        yield
    else:
        with _standing_in(SimpleNamespace(**kind_of(_asked_of_a_child()))):
            yield
    if is_awake():
        raise CannotFork("something that was imported has initialised CUDA")


@contextmanager
def _standing_in(described: SimpleNamespace) -> Iterator[None]:
    """Answer for the driver meanwhile. What asks it stays replaced, since modules keep it, and asks it from then on."""
    import torch

    importing = True
    of_device, current = torch.cuda.get_device_properties, torch.cuda.current_device

    def get_device_properties(*device: Any, **named: Any) -> Any:
        return described if importing else of_device(*device, **named)

    def current_device() -> int:
        return 0 if importing else current()

    torch.cuda.get_device_properties, torch.cuda.current_device = get_device_properties, current_device
    try:
        yield
    finally:
        importing = False
        if interface := sys.modules.get("torch._dynamo.device_interface"):
            interface.caching_worker_device_properties.clear()


def is_awake() -> bool:
    """Say whether this process has initialised the CUDA driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    found: int = driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int()))  # before that it is CUDA_ERROR_NOT_INITIALIZED
    return found == 0


def kind_of(gpus: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the properties of the first of a machine's GPUs, which are of one kind. Pure.

    Raises:
        CannotFork: they are of several kinds, so that what is imported may depend on which one a worker is given.
    """
    if not gpus:
        raise CannotFork("the GPUs could not be asked for what they are")
    kinds = {tuple(gpu.get(name) for name in KIND) for gpu in gpus}
    if len(kinds) > 1:
        raise CannotFork(f"this machine has GPUs of several kinds: {', '.join(map(str, sorted(kinds)))}")
    return gpus[0]


def _asked_of_a_child() -> list[dict[str, Any]]:
    """Return the properties of each GPU, as a child of this process sees them; none if it fails."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        with suppress(BaseException):
            os.write(writer, json.dumps(_properties()).encode())
        os._exit(0)
    os.close(writer)
    with open(reader, encoding="utf-8") as answer:
        found = answer.read()
    os.waitpid(pid, 0)
    return list(json.loads(found or "[]"))


def _properties() -> list[dict[str, Any]]:
    import torch

    every = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        {
            name: getattr(gpu, name)
            for name in dir(gpu)
            if not name.startswith("_") and isinstance(getattr(gpu, name), bool | int | float | str)
        }
        for gpu in every
    ]
