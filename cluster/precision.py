"""In which precision a device computes: bf16 where its instructions do, else fp32.

`cpu` and `gpu` judge facts, `decide` chooses; both are pure. `this_cpu` and `this_device` read the machine.

A CPU without bf16 instructions still accepts bf16: oneDNN widens, multiplies and rounds, at a fifth of fp32's speed
forward and a tenth in training. torch's own `_is_mkldnn_bf16_supported` is no answer: it is true on any AVX-512.
What oneDNN sees is what counts, so its limit (ONEDNN_MAX_CPU_ISA) does. ATEN_CPU_CAPABILITY does not: it chooses
torch's own vector code, which widens bf16 at any width; matrix products are oneDNN's (as fast in bf16 with `avx2`).
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

Precision = Literal["bf16", "fp32"]
Wanted = Literal["auto", "bf16", "fp32"]

LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""Variables that keep oneDNN from instructions that the CPU has; the first one that is set counts."""
WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")
"""Limits below AVX512_BF16 (oneDNN 3, dnnl_types.h); any other, known or not, leaves it."""
FLAGS = {"x86_64": ("avx512_bf16", "amx_bf16"), "aarch64": ("bf16",)}
"""What Linux calls the instructions, by machine; one of them suffices."""
GPU_CAPABILITY = (8, 0)
"""Compute capability from which a GPU multiplies bf16 (Ampere)."""
SLOWDOWN = "about ten times as slow as fp32 in training, five times in answering"


@dataclass(frozen=True)
class Device:
    """What computes, and whether it does so in bf16."""

    bf16: bool
    reason: str
    """For a log: "the CPU has avx512_bf16"."""


@dataclass(frozen=True)
class Decision:
    """In which precision something is computed, why, and what it costs where that is not what the device does."""

    precision: Precision
    reason: str
    warning: str | None = None


def cpu(machine: str, flags: frozenset[str], limit: str = "") -> Device:
    """Judge a CPU.

    Args:
        machine: as `platform.machine()` names it.
        flags: its features, as Linux names them.
        limit: oneDNN's, empty for none.
    """
    wanted = FLAGS.get(machine, ())
    found = [flag for flag in wanted if flag in flags]
    if not found:
        names = " and ".join(wanted)
        return Device(False, f"the CPU lacks {names}" if names else f"nothing is known of bf16 on {machine} CPUs")
    if machine == "x86_64" and limit.upper() in WITHOUT_BF16:
        return Device(False, f"{LIMITS[0]}={limit} keeps oneDNN from the CPU's {found[0]}")
    return Device(True, f"the CPU has {found[0]}")


def gpu(capability: tuple[int, int]) -> Device:
    """Judge a GPU by its compute capability."""
    major, minor = capability
    return Device(capability >= GPU_CAPABILITY, f"the GPU has compute capability {major}.{minor}")


def decide(wanted: Wanted, devices: Sequence[Device]) -> Decision:
    """Choose the precision for work on all of `devices`: what was asked for; for auto bf16 if each computes in it."""
    emulating = [device for device in devices if not device.bf16]
    if wanted == "fp32":
        return Decision("fp32", "as asked for")
    if wanted == "bf16":
        warning = f"bf16 is emulated here ({emulating[0].reason}): {SLOWDOWN}" if emulating else None
        return Decision("bf16", "as asked for", warning)
    if not devices:
        return Decision("fp32", "no node said what it computes in")
    if not emulating:
        return Decision("bf16", devices[0].reason)
    if len(emulating) < len(devices):
        return Decision("fp32", f"the nodes differ: on {len(emulating)} of {len(devices)} {emulating[0].reason}")
    return Decision("fp32", emulating[0].reason)


def resolve(wanted: Wanted, devices: Sequence[Device]) -> Precision:
    """Return only what `decide` chooses."""
    return decide(wanted, devices).precision


# -- this machine ----------------------------------------------------------------------------------------------------


def this_device(on_gpu: bool = False) -> Device:
    """Judge this machine's CPU, or its GPUs, of which the oldest counts."""
    if not on_gpu:
        return this_cpu()
    capability = _gpu_capability()
    return gpu(capability) if capability else Device(False, "no GPU says what it computes in")


def this_cpu() -> Device:
    """Judge this machine's CPU under the limit that this process has."""
    return cpu(platform.machine(), cpu_flags(), limit(os.environ))


def limit(environment: Mapping[str, str]) -> str:
    """Return oneDNN's limit, or an empty string."""
    return next((environment[name] for name in LIMITS if environment.get(name)), "")


@cache
def cpu_flags() -> frozenset[str]:
    """Return the CPU's features as Linux names them, whatever the limits; empty on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((_values(line) for line in lines if line.lower().startswith(("flags", "features"))), ()))


def _values(line: str) -> list[str]:
    return line.partition(":")[2].split()


def _gpu_capability() -> tuple[int, int] | None:
    """Return the lowest capability of this machine's GPUs, whichever of them this process may use."""
    command = ("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split()
        return min((int(major), int(minor)) for major, _, minor in (line.partition(".") for line in said))
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
