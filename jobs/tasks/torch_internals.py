"""What attention within documents takes of torch's insides (2.13): its attention on CPUs, its gradient, one on GPUs."""

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
    Internal(
        "torch.ops.aten._efficient_attention_forward",
        "attention of sequences of different lengths on GPUs in fp32, or with dropout, which torch.nn.attention.varlen "
        "has not; nested tensors, the public way, take the same",
        "packed rows cannot be trained on GPUs in fp32 or with dropout of attention",
        "torch.nn.attention.varlen takes fp32 and dropout",
    ),
)

_CAUSAL = 1
"""The mask of `_efficient_attention_forward` by which each token sees those before it in its sequence, and itself."""

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


EFFICIENT_OF_LENGTHS = torch.ops.aten._efficient_attention_forward
"""(query (1, T, H, D), key, value, bias, begins, begins of keys, longest, …); jobs/worker/flops.py counts it."""
EFFICIENT_OF_LENGTHS_BACKWARD = torch.ops.aten._efficient_attention_backward
"""(gradient, query, key, value, bias, made, begins, begins of keys, longest, …)."""


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


def efficient_of_lengths(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    *,
    dropout: float,
    scale: float | None,
) -> torch.Tensor:
    """Return causal attention within sequences that lie one after another on a GPU, (T, H, V). Never run yet.

    What it keeps for its gradient has a place for `longest` tokens of each sequence and head.

    Args:
        query, key: (T, H, D).
        value: (T, H, V).
        bounds: where sequences begin, and T: (N + 1,) int32.
        longest: at least the tokens of the longest sequence.
        dropout: share of the weights that is dropped.
        scale: what products are multiplied by; None: 1 / √D.
    """
    given = (query[None], key[None], value[None])
    made: torch.Tensor = EFFICIENT_OF_LENGTHS(
        *given, None, bounds, bounds, longest, longest, dropout, _CAUSAL, True, scale=scale
    )[0]
    return made[0]
