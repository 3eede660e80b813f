"""What a replica computes in: the model's `precision`, or what its own device does, said in its log."""

from __future__ import annotations

import logging
from typing import Any

from cluster.precision import Device, Wanted, decide, gpu, this_cpu

logger = logging.getLogger(__name__)


def dtype_for(precision: Wanted, device: Any) -> Any:
    """Return the torch.dtype for a model on a torch.device; log which it is, and what it costs if it is emulated."""
    import torch

    decision = decide(precision, [judge(device)])
    if decision.warning:
        logger.warning("%s", decision.warning)
    logger.info("the model computes in %s: %s", decision.precision, decision.reason)
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[decision.precision]


def judge(device: Any) -> Device:
    """Say whether a torch.device of this process computes in bf16."""
    import torch

    if device.type == "cpu":
        return this_cpu()
    if device.type == "cuda":
        return gpu(torch.cuda.get_device_capability(device))
    return Device(False, f"nothing is known of bf16 on {device.type}")


def best_device() -> Any:
    """Return the torch.device that a replica computes on: its GPU if it was given one."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
