"""The GPUs of a node: their memory's errors and what slows them, where NVML tells."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path
from typing import Any

from cluster.doctor.facts import Gpu

THROTTLES = {
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
    0x4: "power cap",
}
"""Bits of NVML's clocksEventReasons (nvml.h); an idle GPU, or clocks that somebody set, are nobody's fault."""
DRIVER_FILE = Path("/proc/driver/nvidia/version")


def looked_at() -> tuple[tuple[Gpu, ...], str]:
    """Return this machine's GPUs, and what told of them or why nothing did."""
    if importlib.util.find_spec("pynvml") is None:
        return _by_nvidia_smi()
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return (), f"NVML: {error}"
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return tuple(_gpu(pynvml, handle) for handle in handles), "NVML"
    finally:
        pynvml.nvmlShutdown()


def driver_version() -> str:
    """Return the version of the NVIDIA driver that the kernel has loaded; empty where there is none."""
    try:
        words = DRIVER_FILE.read_text(encoding="utf-8").partition("\n")[0].split()
    except OSError:
        return ""
    return next((word for word in words if word[0].isdigit() and "." in word), "")


def throttles(reasons: int) -> tuple[str, ...]:
    """Name the bits that tell of a GPU kept from its speed. Pure."""
    return tuple(name for bit, name in THROTTLES.items() if reasons & bit)


def _gpu(pynvml: Any, handle: Any) -> Gpu:
    def told(name: str, *arguments: str) -> Any | None:
        """Ask NVML; None where this GPU, driver or version of NVML's bindings does not tell."""
        try:
            return getattr(pynvml, name)(handle, *(getattr(pynvml, argument) for argument in arguments))
        except (pynvml.NVMLError, AttributeError):
            return None

    memory = told("nvmlDeviceGetMemoryInfo")
    rows = told("nvmlDeviceGetRemappedRows")  # (correctable, uncorrectable, pending, failed); since Ampere
    pages = [
        told("nvmlDeviceGetRetiredPages", f"NVML_PAGE_RETIREMENT_CAUSE_{cause}")
        for cause in ("MULTIPLE_SINGLE_BIT_ECC_ERRORS", "DOUBLE_BIT_ECC_ERROR")
    ]
    counted = [len(listed) for listed in pages if listed is not None]
    reasons = told("nvmlDeviceGetCurrentClocksEventReasons")
    if reasons is None:
        reasons = told("nvmlDeviceGetCurrentClocksThrottleReasons")
    return Gpu(
        name=_text(told("nvmlDeviceGetName") or "a GPU without a name"),
        memory_bytes=int(memory.total) if memory else 0,
        uncorrected_errors=told(
            "nvmlDeviceGetTotalEccErrors", "NVML_MEMORY_ERROR_TYPE_UNCORRECTED", "NVML_VOLATILE_ECC"
        ),
        retired_pages=int(rows[0] + rows[1]) if rows else sum(counted) if counted else None,
        is_repair_pending=bool(rows[2] if rows else told("nvmlDeviceGetRetiredPagesPendingStatus")),
        has_repair_failed=bool(rows[3]) if rows else False,
        throttled_by=throttles(int(reasons or 0)),
        temperature_c=told("nvmlDeviceGetTemperature", "NVML_TEMPERATURE_GPU"),
    )


def _by_nvidia_smi() -> tuple[tuple[Gpu, ...], str]:
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return (), "none found: neither NVML's Python bindings nor nvidia-smi is here"
    lines = [line.rpartition(", ") for line in said.splitlines() if line.strip()]
    found = tuple(Gpu(name, int(size) << 20 if size.isdigit() else 0) for name, _, size in lines)
    return found, "nvidia-smi: of errors and throttling nothing is known without `pip install nvidia-ml-py`"


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
