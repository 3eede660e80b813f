"""What attention within documents takes of torch's insides (2.13): its attention on CPUs, and that one's gradient."""

from __future__ import annotations

import torch

from cluster.internals import Internal

ENTRIES = (
    Internal(
        "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, …_backward",
        "attention within the documents of a row writes each one's part where it belongs, forward and backward; the "
        "public function would have autograd copy the whole row for each document",
        "no packed rows can be trained on CPUs",
        "torch's attention of sequences of different lengths (torch.nn.attention.varlen) runs on CPUs",
    ),
)

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def flash_on_cpu(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return causal attention over (B, H, S, D), and the logarithms of its weights' sums (B, H, S)."""
    made, sums = _forward(query, key, value, 0.0, True, scale=scale)
    return made, sums


def flash_on_cpu_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    made: torch.Tensor,
    sums: torch.Tensor,
    *,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key and value, (B, H, S, D), from that of what was made of them."""
    found: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = _backward(
        gradient, query, key, value, made, sums, 0.0, True, scale=scale
    )
    return found
