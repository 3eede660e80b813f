"""What a worker may run on: a table of known accelerators by their makers' data sheets, and this machine.

Memory is in the data sheet's own unit, 10^9 bytes; FLOP/s are those of dense matrices (data sheets often print twice
as many, "with sparsity"), in bf16 on tensor cores and in fp32 without TF32, which torch leaves off.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from cluster import memory
from cluster.errors import UserError
from cluster.precision import Precision

GB = 10**9
TERA = 10**12


@dataclass(frozen=True)
class Device:
    """What one worker computes with."""

    name: str
    memory_bytes: int
    """Of one device; of this machine's memory, the part of one worker."""
    flops: Mapping[Precision, float] | None = None
    """Peak FLOP/s; None where nothing is known."""
    bandwidth: float | None = None
    """Of its memory, bytes/s."""
    watts: float | None = None
    """The most that its board takes."""
    here: bool = False
    """It is of the machine that asks."""
    on_gpu: bool = True
    """False: the workers' memory is the machine's own."""
    source: str = ""
    """Where the figures are from."""


def _gpu(name: str, memory: float, bf16: float, fp32: float, bandwidth: float, watts: float, source: str) -> Device:
    """Make a device of GB, TFLOP/s, TFLOP/s, TB/s and W."""
    flops: dict[Precision, float] = {"bf16": bf16 * TERA, "fp32": fp32 * TERA}
    return Device(name, int(memory * GB), flops, bandwidth * TERA, watts, source=source)


KNOWN = {
    "h100": _gpu("H100 SXM 80 GB", 80, 989.4, 66.9, 3.35, 700, "NVIDIA H100 Tensor Core GPU data sheet, H100 SXM"),
    "h200": _gpu("H200 SXM 141 GB", 141, 989.4, 66.9, 4.8, 700, "NVIDIA H200 Tensor Core GPU data sheet, H200 SXM"),
    "b200": _gpu("B200 180 GB", 180, 2250, 75, 7.7, 1000, "NVIDIA HGX B200 data sheet, an eighth of the board"),
    "a100-80": _gpu("A100 SXM 80 GB", 80, 312, 19.5, 2.039, 400, "NVIDIA A100 data sheet, A100 80GB SXM"),
    "a100-40": _gpu("A100 SXM 40 GB", 40, 312, 19.5, 1.555, 400, "NVIDIA A100 data sheet, A100 40GB SXM"),
    "l40s": _gpu("L40S 48 GB", 48, 362.05, 91.6, 0.864, 350, "NVIDIA L40S data sheet"),
    "l4": _gpu("L4 24 GB", 24, 121, 30.3, 0.3, 72, "NVIDIA L4 Tensor Core GPU data sheet (242 TFLOP/s with sparsity)"),
    "rtx-4090": _gpu("RTX 4090 24 GB", 24, 165.2, 82.6, 1.008, 450, "NVIDIA Ada white paper, appendix A"),
}  # fmt: skip


def named(name: str) -> Device:
    """Return a device of the table; capitals, spaces, "-" and "_" do not matter.

    Raises:
        UserError: there is none of that name.
    """
    plain = {_plain(key): key for key in KNOWN}
    if (key := plain.get(_plain(name))) is not None:
        return KNOWN[key]
    begins = [key for short, key in plain.items() if _plain(name) and short.startswith(_plain(name))]
    close = begins or [plain[found] for found in difflib.get_close_matches(_plain(name), list(plain), n=1)]
    hint = f"did you mean {' or '.join(map(repr, close))}? Known" if close else "known"
    raise UserError(f"--device: {name!r} is no device whose figures are known; {hint}: {', '.join(KNOWN)}")


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name.lower())


def this_machine(workers: int) -> Device:
    """Return one worker's part of this machine's memory; a container's limit counts."""
    return Device("this machine's CPUs", memory.of_node().total // workers, here=True, on_gpu=False)


def this_gpu() -> Device | None:
    """Return this machine's GPU, with what the table knows of its kind; None where torch sees none."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    known = next(
        (each for key, each in KNOWN.items() if f" {key.partition('-')[0]} " in f" {_words(properties.name)} "), None
    )
    plain = Device(properties.name, properties.total_memory, here=True)
    return plain if known is None else replace(known, name=plain.name, memory_bytes=plain.memory_bytes, here=True)


def _words(name: str) -> str:
    """Return "nvidia a100 sxm4 80gb" of "NVIDIA A100-SXM4-80GB"."""
    return re.sub(r"[^a-z0-9]+", " ", name.lower())
