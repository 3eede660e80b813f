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
    key: str = ""
    """Its name in KNOWN, or `cpu`; empty: it is in no table."""


def _gpu(
    key: str, name: str, memory: float, bf16: float, fp32: float, bandwidth: float, watts: float, source: str
) -> Device:
    """Make a device of GB, TFLOP/s, TFLOP/s, TB/s and W."""
    flops: dict[Precision, float] = {"bf16": bf16 * TERA, "fp32": fp32 * TERA}
    return Device(name, int(memory * GB), flops, bandwidth * TERA, watts, source=source, key=key)


_ALL = (
    _gpu("h100", "H100 SXM 80 GB", 80, 989.4, 66.9, 3.35, 700, "NVIDIA H100 Tensor Core GPU data sheet, H100 SXM"),
    _gpu("h100-pcie", "H100 PCIe 80 GB", 80, 756, 51.2, 2, 350, "NVIDIA H100 Tensor Core GPU data sheet, H100 PCIe"),
    _gpu("h200", "H200 SXM 141 GB", 141, 989.4, 66.9, 4.8, 700, "NVIDIA H200 Tensor Core GPU data sheet, H200 SXM"),
    _gpu("b200", "B200 180 GB", 180, 2250, 75, 7.7, 1000, "NVIDIA HGX B200 data sheet, an eighth of the board"),
    _gpu("a100-80", "A100 SXM 80 GB", 80, 312, 19.5, 2.039, 400, "NVIDIA A100 data sheet, A100 80GB SXM"),
    _gpu("a100-40", "A100 SXM 40 GB", 40, 312, 19.5, 1.555, 400, "NVIDIA A100 data sheet, A100 40GB SXM"),
    _gpu("a100-80-pcie", "A100 PCIe 80 GB", 80, 312, 19.5, 1.935, 300, "NVIDIA A100 data sheet, A100 80GB PCIe"),
    _gpu("a100-40-pcie", "A100 PCIe 40 GB", 40, 312, 19.5, 1.555, 250, "NVIDIA A100 data sheet, A100 40GB PCIe"),
    _gpu("l40s", "L40S 48 GB", 48, 362.05, 91.6, 0.864, 350, "NVIDIA L40S data sheet"),
    _gpu("l4", "L4 24 GB", 24, 121, 30.3, 0.3, 72, "NVIDIA L4 Tensor Core GPU data sheet (242 TFLOP/s with sparsity)"),
    _gpu("rtx-4090", "RTX 4090 24 GB", 24, 165.2, 82.6, 1.008, 450, "NVIDIA Ada white paper, appendix A"),
)  # fmt: skip
KNOWN = {each.key: each for each in _ALL}
CPU = "cpu"
"""What a worker on CPUs is called in a table of prices."""
KEYS = (*KNOWN, CPU)
NAMES = {
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H100 PCIe": "h100-pcie",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
    "NVIDIA A100-SXM4-80GB": "a100-80",
    "NVIDIA A100-SXM4-40GB": "a100-40",
    "NVIDIA A100 80GB PCIe": "a100-80-pcie",
    "NVIDIA A100-PCIE-40GB": "a100-40-pcie",
    "NVIDIA L40S": "l40s",
    "NVIDIA L4": "l4",
    "NVIDIA GeForce RTX 4090": "rtx-4090",
}
"""What CUDA calls them, which torch repeats. A slice (MIG) and other boards with the same chip have other names, and
other figures."""


def of_cuda(name: str) -> Device | None:
    """Return the device that CUDA calls so; None where nothing is known of it."""
    key = NAMES.get(name)
    return None if key is None else KNOWN[key]


def key_of(name: str) -> str | None:
    """Return a device's name in the table, or `cpu`, however it is written; None of others."""
    return {_plain(key): key for key in KEYS}.get(_plain(name))


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
    return Device("this machine's CPUs", memory.of_node().total // workers, here=True, on_gpu=False, key=CPU)


def this_gpu() -> Device | None:
    """Return this machine's GPU, with what the table knows of its kind; None where torch sees none."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    known = of_cuda(properties.name)
    plain = Device(properties.name, properties.total_memory, here=True)
    return plain if known is None else replace(known, name=plain.name, memory_bytes=plain.memory_bytes, here=True)
