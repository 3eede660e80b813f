"""Where a worker group goes on: the newest checkpoint that verifies, agreed on and checked by all ranks together."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from jobs.checkpoint import catalog
from jobs.checkpoint.catalog import Manifest
from jobs.checkpoint.shards import Reader
from jobs.checkpoint.store import Store

Value = TypeVar("Value")
Fill = Callable[[str, int, torch.Tensor], None]
"""(a parameter's name, its first element, `out` 1-D) → `out` has its elements from there on."""
_name: list[str] = []
"""This process's attempt: a process serves one."""


@dataclass
class Point:
    """What all ranks agreed on."""

    attempt: str
    """A name for this start of the group, for the files it writes."""
    manifest: Manifest | None = None
    """None: there is nothing to go on from."""
    skipped: list[str] = field(default_factory=list)
    """Why newer checkpoints were passed over."""

    @property
    def step(self) -> int:
        """The steps that are behind."""
        return self.manifest.step if self.manifest else 0


def agree(store: Store) -> Point:
    """Find the newest checkpoint that verifies. Collective: each rank checks its share of the files."""
    manifest, skipped = catalog.newest_valid(store, agreed=_from_first, check=_verify)
    return Point(attempt_name(), manifest, skipped)


def attempt_name() -> str:
    """Return a name for this start of the group, the same on all ranks and at every call. The first is collective."""
    if not _name:
        _name.append(_from_first(lambda: secrets.token_hex(4)))
    return _name[0]


def gathered(mine: Value) -> list[Value]:
    """Return what every rank gives, by rank; a process without a group is the only one. Collective."""
    found: list[Any] = [mine] * (dist.get_world_size() if dist.is_initialized() else 1)
    if len(found) > 1:
        dist.all_gather_object(found, mine)
    return found


def first_of(reason: str | None) -> str | None:
    """Return what the first rank gives that gives something, on all of them. Collective."""
    return next((found for found in gathered(reason) if found is not None), None)


def reader(store: Store, manifest: Manifest) -> Reader:
    """Open the shards of a checkpoint."""
    return Reader(store, [f"{catalog.folder(manifest.step)}/{name}" for name in manifest.shards])


def resumed(model: torch.nn.Module, fill: Fill | None, state: Reader, store: Store, manifest: Manifest) -> Fill | None:
    """Put a checkpoint's weights and buffers into a model in fp32 on the CPU, before DeepSpeed divides it.

    Args:
        fill: fills in what the model starts from, if that is known without it.

    Returns:
        The same of the checkpoint: its weights where it has them, what is never trained from `fill`.

    Raises:
        ShardError: the checkpoint is of another model.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if manifest.elements:
        state.check_whole({name: parameter.numel() for name, parameter in trained.items()})
    for name, parameter in trained.items():
        if not parameter.is_meta:
            state.read("weight", name, 0, parameter.data.view(-1))
    if manifest.buffers is not None:
        from safetensors.torch import load

        content = store.read(f"{catalog.folder(manifest.step)}/{manifest.buffers}")
        model.load_state_dict(load(content), strict=False)
    if fill is None:
        return None
    begun = fill

    def filled(name: str, start: int, out: torch.Tensor) -> None:
        if name in trained:
            state.read("weight", name, start, out)
        else:
            begun(name, start, out)

    return filled


def buffers(model: torch.nn.Module) -> dict[str, bytes]:
    """Return the file of what a model learns outside its parameters (running statistics), if there is any."""
    from safetensors.torch import save

    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    found = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if name not in parameters
    }
    return {catalog.BUFFERS: save(found)} if found else {}


def _verify(store: Store, manifest: Manifest) -> str | None:
    """Check this rank's share of the files; return what any rank found wrong."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mine = catalog.verify(store, manifest, rank=rank, world_size=world_size)
    return next((problem for problem in gathered(mine) if problem), None)


def _from_first(produce: Callable[[], Value]) -> Value:
    """Return on every rank what `produce` returns on rank 0."""
    box: list[Any] = [produce() if dist.get_rank() == 0 else None]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]
