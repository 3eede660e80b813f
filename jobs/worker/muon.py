"""Muon: matrices learn by the orthogonal part of their momentum, everything else by AdamW.

    momentum ← 0.95 momentum + 0.05 gradient                                    element by element
    update   ← orthogonal(0.05 gradient + 0.95 momentum)                        of a whole matrix
    weight   ← (1 - rate decay) weight - rate 0.2 √max(rows, columns) update    element by element

Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/. The factor is that of Liu et al. 2025 (arXiv:2502.16982,
section 2.2): the root mean square of an update is as large as AdamW's tend to be, so that one learning rate and one
weight decay go for both.

Momentum and weights stay cut over the ranks as ZeRO cuts them. In a step the ranks send their parts of a matrix to its
owner, who makes it orthogonal, and get their parts of the update back; matrices are dealt out to the ranks in turn.
A rank sends 2 (W-1)/W numbers of those that it holds, and has one matrix whole at a time.

Why not one of those that are there: torch's takes whole matrices, and ZeRO has none. DeepSpeed's (0.19) makes gradients
orthogonal before it takes their norm, so that `training.clip` would shorten all updates and `gradient_norm` would be
that of updates; and its momentum lies elsewhere at each stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

MOMENTUM = 0.95
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic that moves singular values towards 1: it stays within about 0.7 to 1.2 and does not converge."""
TINY = 1e-7
RMS = 0.2
STATE = "momentum"


@dataclass(frozen=True)
class Matrix:
    """A matrix of which this rank holds a run of elements in one of the optimizer's flat tensors."""

    rows: int
    columns: int
    offset: int
    """Where this rank's elements begin in the flat tensor."""
    parts: tuple[int, ...]
    """How many elements each rank holds, in their order; a single number: every rank holds all of them."""
    owner: int = 0
    """The rank that makes it orthogonal."""

    @property
    def scale(self) -> float:
        """What an update is multiplied by."""
        return RMS * math.sqrt(max(self.rows, self.columns))

    def held(self, rank: int) -> int:
        """Return how many elements a rank holds."""
        return self.parts[rank if len(self.parts) > 1 else 0]


class MuonAndAdamW(torch.optim.AdamW):
    """AdamW; groups with `matrices` learn by Muon."""

    param_groups: list[dict[str, Any]]

    def __init__(self, groups: Iterable[dict[str, Any]], compute: torch.dtype, device: torch.device, **adamw: Any):
        """Begin; `lay_out` says later where the matrices are.

        Args:
            compute: what orthogonal matrices are computed in.
            device: where that is done, and by what the ranks send: not where the state is, if that is offloaded.
        """
        super().__init__(groups, **adamw)
        self._compute, self._device = compute, device
        self._matrices: dict[torch.Tensor, list[Matrix]] = {}

    def lay_out(self, matrices: Mapping[torch.Tensor, Sequence[Matrix]]) -> None:
        """Say which matrices lie in each flat tensor (N,) or parameter (rows, columns): one order on all ranks."""
        self._matrices = {flat: list(inside) for flat, inside in matrices.items()}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step of the groups that are set. Collective where the state is in parts."""
        assert closure is None
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group.get("matrices")]
        try:
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            for flat in group["params"] if group.get("matrices") else ():
                if flat.grad is not None:
                    self._step_matrices(flat, group["lr"], group["weight_decay"])

    def _step_matrices(self, flat: torch.Tensor, rate: float, decay: float) -> None:
        state = self.state[flat]
        if STATE not in state:
            state[STATE] = torch.zeros_like(flat)
        state[STATE].lerp_(flat.grad, 1 - MOMENTUM)
        blend = flat.grad.lerp(state[STATE], MOMENTUM).reshape(-1)
        flat.mul_(1 - rate * decay)
        weights, rank = flat.view(-1), dist.get_rank() if dist.is_initialized() else 0
        for matrix, update in self._updates(self._matrices[flat], blend, rank):
            mine = weights[matrix.offset : matrix.offset + update.numel()]
            mine.add_(update.to(mine.device, mine.dtype), alpha=-rate * matrix.scale)

    def _updates(
        self, matrices: Sequence[Matrix], blend: torch.Tensor, rank: int
    ) -> Iterator[tuple[Matrix, torch.Tensor]]:
        """Yield each matrix with this rank's elements (n,) of its orthogonal part."""
        ranks = len(matrices[0].parts)
        for first in range(0, len(matrices), ranks):
            some = matrices[first : first + ranks]  # of as many owners
            sent = [blend[each.offset : each.offset + each.held(rank)] for each in some]
            if ranks == 1:
                yield some[0], orthogonal(sent[0].view(some[0].rows, some[0].columns), self._compute).reshape(-1)
                continue
            counts = [0] * ranks
            for each in some:
                counts[each.owner] = each.held(rank)
            by_owner = sorted(zip(some, sent, strict=True), key=lambda pair: pair[0].owner)
            back = self._exchanged(
                torch.cat([part for _, part in by_owner]).to(self._device, self._compute),
                counts,
                next((each for each in some if each.owner == rank), None),
            )
            for (each, _), update in zip(by_owner, back.split([each.held(rank) for each, _ in by_owner]), strict=True):
                yield each, update

    def _exchanged(self, sent: torch.Tensor, counts: list[int], mine: Matrix | None) -> torch.Tensor:
        """Send parts (N,), so many to each rank; make this rank's own matrix orthogonal; return the parts of all."""
        received = list(mine.parts) if mine else [0] * len(counts)
        whole = sent.new_empty(sum(received))
        dist.all_to_all_single(whole, sent, received, counts)
        if mine:
            whole = orthogonal(whole.view(mine.rows, mine.columns), self._compute).reshape(-1)
        back = torch.empty_like(sent)
        dist.all_to_all_single(back, whole, counts, received)
        return back


def dealt(matrices: Mapping[torch.Tensor, Sequence[Matrix]]) -> dict[torch.Tensor, list[Matrix]]:
    """Give the matrices of each flat tensor, of any shape, owners: ranks in turn, large matrices first. Pure."""
    found: dict[torch.Tensor, list[Matrix]] = {}
    count = 0
    for flat, inside in matrices.items():
        found[flat] = []
        for each in sorted(inside, key=lambda matrix: -matrix.rows * matrix.columns):
            found[flat].append(Matrix(each.rows, each.columns, each.offset, each.parts, count % len(each.parts)))
            count += 1
    return found


def orthogonal(matrix: torch.Tensor, compute: torch.dtype) -> torch.Tensor:
    """Return (rows, columns) with the singular vectors of `matrix`, of the same shape, and singular values near 1.

    Newton-Schulz iterations of a quintic (Jordan et al. 2024), computed in `compute`; zeros stay zeros.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.to(compute).mT if tall else matrix.to(compute)
    x = x / (x.norm() + TINY)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
