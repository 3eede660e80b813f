"""Summed cross-entropy over a large vocabulary, in chunks that stay in the cache.

PyTorch's own makes four passes over matrices of tokens × vocabulary in fp32: a copy of the logits, their log-softmax,
its gradient, the gradient in the logits' type. Here each chunk's gradient is computed with its loss and kept in the
logits' type, so only one such matrix exists besides the logits (the idea of Liger Kernel, arXiv:2410.10989).
"""

from __future__ import annotations

from typing import Any

import torch

from jobs.tasks import IGNORED

CPU_CHUNK_BYTES = 1 << 20
"""Half of a core's second-level cache: 2.3 times less CPU time than torch's own at 2,048 × 8,192, 1.2 times at 4 MB."""
GPU_CHUNK_BYTES = 1 << 28


def cross_entropy_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the sum of −log softmax(logits)[label] over the targets: a scalar () in fp32 nats.

    Args:
        logits: (…, V) of any floating type; the arithmetic is fp32.
        labels: (…) int64 of 0 … V-1; IGNORED is no target.
    """
    total: torch.Tensor = _CrossEntropySum.apply(logits.flatten(0, -2), labels.flatten())
    return total


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Sum the loss of logits (T, V) at labels (T,) chunk by chunk; with each at hand, compute its gradient too."""
        gradient = torch.empty_like(logits) if logits.requires_grad else None
        total = logits.new_zeros((), dtype=torch.float32)
        chunk_bytes = CPU_CHUNK_BYTES if logits.device.type == "cpu" else GPU_CHUNK_BYTES
        rows = max(1, chunk_bytes // (4 * logits.shape[-1]))
        for start in range(0, len(logits), rows):
            part = slice(start, start + rows)
            chunk, label = logits[part].to(torch.float32, copy=True), labels[part]
            counts = (label != IGNORED).float()
            at = label.clamp(min=0)[:, None]
            chunk -= chunk.amax(-1, keepdim=True)
            picked = chunk.gather(1, at)
            exponentials = chunk.exp_()
            sums = exponentials.sum(-1, keepdim=True)
            total += ((sums.log() - picked)[:, 0] * counts).sum()
            if gradient is not None:
                softmax = exponentials.mul_(counts[:, None] / sums)
                gradient[part] = softmax.scatter_add_(1, at, -counts[:, None])
        ctx.gradient = gradient
        return total

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Scale by a scalar () the gradient (T, V) that `forward` left, in place: there is one backward pass."""
        gradient = ctx.gradient
        ctx.gradient = None
        return gradient.mul_(scale), None
