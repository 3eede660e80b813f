"""The exported model, whole on every rank, in the memory of the trained one: read below ZeRO stage 3 without a copy.

    refill(begun.model, begun.fill, live, dtype, device)      the trained weights are gone then

Each weight is NaN before it is read: what no file gives shows in the loss, and so would what is left of the training.
The ranks read in turn, a parameter each, and hand it to the others: over all of them the files are read once.
"""

from __future__ import annotations

from itertools import count

import torch
import torch.distributed as dist

from cluster.errors import UserError
from jobs.checkpoint import resume
from jobs.checkpoint.resume import Fill
from jobs.tasks import adapters
from jobs.worker import export_in_parts
from jobs.worker.recorded import materialise


def refill(model: torch.nn.Module, fill: Fill, live: torch.nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Give a model on the meta device its weights and, as far as it goes, those of `live` as memory for them.

    Args:
        fill: knows the values.
        live: has its weights whole, adapted or not; no good for anything afterwards.
        dtype: of the weights, and of the buffers that are saved with them.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    free = {name: held for name, (_, held) in export_in_parts.held(live) if isinstance(held, torch.nn.Parameter)}
    taken: set[int] = set()

    def room(old: torch.nn.Parameter) -> torch.Tensor:
        known = free.get(names[id(old)])
        found = None
        if known is not None and known.device.type == device.type and id(known) not in taken:
            taken.add(id(known))
            found = within(known, old.shape, dtype)
        found = torch.empty(old.shape, dtype=dtype, device=device) if found is None else found
        return found.fill_(torch.nan)

    with torch.no_grad():
        materialise(model, fill, room)
        adapters.as_type(model, dtype).to(device)


def within(memory: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor | None:
    """Return a tensor of that shape in the memory of another one of any, from its first byte on; None: it is no run."""
    needed = shape.numel() * dtype.itemsize
    if not memory.is_contiguous() or memory.nbytes < needed:
        return None
    return memory.detach().view(-1).view(torch.uint8)[:needed].view(dtype).view(shape)


class InTurn:
    """Fills in slices that one rank reads, and the next one the next: all call it alike. Collective."""

    def __init__(self, fill: Fill, rank: int, world_size: int) -> None:
        """Begin with the first rank.

        Args:
            fill: reads.
        """
        self._fill, self._rank, self._world_size = fill, rank, world_size
        self._turns = count()
        self._problem: str | None = None

    def __call__(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill in a slice [n]; one that cannot be read stays as it is."""
        reader = next(self._turns) % self._world_size
        if reader == self._rank:
            try:
                self._fill(name, start, out)
            except (OSError, UserError) as error:  # the others are in the next line already
                self._problem = self._problem or str(error)
        dist.broadcast(out, src=reader)

    def check(self) -> None:
        """Raise what any rank could not read, on all of them. Collective.

        Raises:
            OSError: there is something.
        """
        if (found := resume.first_of(self._problem)) is not None:
            raise OSError(f"the exported model cannot be read back: {found}")
