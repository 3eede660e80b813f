"""A trained model → one directory in the Hugging Face layout, a parameter at a time, at every ZeRO stage.

    pieces = plan(skeleton, live, dtype)     what each tensor of the files is made of, or why that is not one parameter
    write(partial, …)                        parameter by parameter: written by rank 0; at stage 3 gathered by all ranks
    difference(pieces, read, …)              what of a rank's part is otherwise in the files

No rank has more of it than in training, plus one parameter. All calls are collective. Adapters are added to their
layer's weight as it is written: W + scaling · B A, in fp32 (Hu et al. 2021, LoRA, equation 3).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jobs.checkpoint import resume
from jobs.worker import deepspeed_internals, elsewhere, lora, parameter_files, weight_stream
from jobs.worker.elsewhere import Elsewhere
from jobs.worker.export import together
from jobs.worker.weight_match import saved_as
from jobs.worker.weight_stream import Place, Shard, Stored

BLOCK = 1 << 22
"""So many elements are converted, or merged, at a time."""
ATTEMPTS, PAUSE_S = 4, 1.0
"""How often a file is written to a store that fails, and the first pause; the others are four times as long each."""


@dataclass(frozen=True)
class Piece:
    """What one tensor of the files is made of."""

    stored: Stored
    tensor: torch.Tensor
    """A parameter of the model in training, of which this rank may have its part alone, or a buffer."""
    adapter: lora.Adapter | None = None
    """What is added to it."""

    @property
    def gathered(self) -> list[torch.Tensor]:
        """What it takes from the other ranks, of any shapes."""
        factors = [self.adapter.down, self.adapter.up] if self.adapter else []
        return [each for each in (self.tensor, *factors) if deepspeed_internals.is_in_parts(each)]


def plan(skeleton: torch.nn.Module, live: torch.nn.Module, dtype: torch.dtype) -> list[Piece] | str:
    """Return what is written, in the order of the model's state, or why a model has to be gathered whole.

    Args:
        skeleton: the model without adapters, on the meta device.
        live: the model in training, adapted or not.
        dtype: of floating-point tensors in the files.
    """
    keys = saved_as(skeleton)
    if isinstance(keys, str):
        return keys
    adapters = lora.adapters(live)
    if isinstance(adapters, str):
        return adapters
    state = skeleton.state_dict(keep_vars=True)
    known = dict(held(live))
    pieces = []
    for name, key in keys.items():
        if name not in known:
            return f"{name} is not found in the model in training"
        (live_name, tensor), of_file = known[name], dtype if state[name].is_floating_point() else state[name].dtype
        pieces.append(Piece(Stored(key, tuple(state[name].shape), of_file), tensor, adapters.get(live_name)))
    return pieces


def held(live: torch.nn.Module) -> Iterator[tuple[str, tuple[str, torch.Tensor]]]:
    """Yield a model's tensors, of any shapes, by their names before it was adapted, each with its name now.

    A copy that is trained comes after its original.
    """
    tensors = [*live.named_parameters(remove_duplicate=False), *live.named_buffers(remove_duplicate=False)]
    for name, tensor in sorted(tensors, key=lambda each: ".modules_to_save." in each[0]):
        yield lora.name_before(name), (name, tensor)


def files(pieces: Sequence[Piece]) -> list[Shard]:
    """Divide the pieces over files. Pure."""
    return weight_stream.plan([piece.stored for piece in pieces])


def write(directory: Path, pieces: Sequence[Piece], first: bool, place: Elsewhere | None = None) -> dict[str, str]:
    """Write the weights, on the first rank; return the digests of the files, which are empty elsewhere.

    Args:
        place: where they go, if not to the directory; that gets the index alone.

    Raises:
        StoreFailed: it does not take them; on all ranks, which are in step.
        NotWritten: the disk does not; so too.
    """
    shards = files(pieces)
    by_key = {piece.stored.name: piece for piece in pieces}
    if place is not None:
        digests = {shard.name: _stored(place, shard, by_key, first) for shard in shards}
    else:
        digests = {shard.name: _on_disk(directory, shard, by_key, first) for shard in shards}
    with together():
        return digests | weight_stream.write_index(directory, shards) if first else {}


def _on_disk(directory: Path, shard: Shard, by_key: Mapping[str, Piece], first: bool) -> str:
    """Write one file to the disk; return its digest, on the first rank."""
    digest, problem = "", None
    if first:
        digest, problem = _tried(weight_stream.Folder(directory), shard, by_key)
    else:
        _take(shard.tensors, by_key)
    with together():
        if problem is not None:
            raise problem
    return digest


def _stored(place: Elsewhere, shard: Shard, by_key: Mapping[str, Piece], first: bool) -> str:
    """Write one file to a store, several times if that fails for a moment; return its digest, on the first rank."""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(PAUSE_S * 4 ** (attempt - 1))
        digest, failure = "", None
        if first:
            if attempt:
                place.again(shard.name)
            digest, failure = _tried(place, shard, by_key)
        else:
            _take(shard.tensors, by_key)
        problem = resume.gathered(None if failure is None else str(failure))[0]
        if problem is None:
            return digest
        if first:
            print(f"{place.locate(shard.name)} could not be written: {problem}", flush=True)
    raise elsewhere.failed(place.locate(shard.name), str(problem))


def _tried(place: Place, shard: Shard, by_key: Mapping[str, Piece]) -> tuple[str, OSError | None]:
    """Write one file; return its digest, and why it could not be: then its tensors have been gathered all the same."""
    begun: list[Iterator[torch.Tensor]] = []

    def counted(stored: Stored) -> Iterator[torch.Tensor]:
        begun.append(blocks(by_key[stored.name], True))
        return begun[-1]

    try:
        return weight_stream.write_one(place, shard, counted), None
    except parameter_files.Failed:  # before all ranks have gathered it: this one cannot go on with the others
        raise
    except OSError as error:
        problem = error
    if begun:
        begun[-1].close()  # type: ignore[attr-defined]  # it lets go of what it has gathered
    _take(shard.tensors[len(begun) :], by_key)
    return "", problem


def _take(tensors: Sequence[Stored], by_key: Mapping[str, Piece]) -> None:
    """Take part in gathering tensors that another rank writes."""
    for stored in tensors:
        for _ in blocks(by_key[stored.name], False):
            pass


def blocks(piece: Piece, wanted: bool) -> Iterator[torch.Tensor]:
    """Gather a tensor and yield its elements, flattened, [n] each, where they are wanted."""
    with deepspeed_internals.gathered(piece.gathered):
        if wanted:
            yield from _rows(piece)


@torch.no_grad()
def _rows(piece: Piece) -> Iterator[torch.Tensor]:
    whole = piece.tensor.detach()
    if piece.adapter is None:
        yield from whole.reshape(-1).split(BLOCK)
        return
    rows = max(1, BLOCK // whole.shape[1])
    for start in range(0, whole.shape[0], rows):
        part = slice(start, start + rows)
        yield (whole[part].float() + piece.adapter.added(part)).view(-1)


def save_adapters(directory: Path, live: Any, first: bool) -> None:
    """Write the adapters by themselves, as peft does: with what is trained whole, and an adapted head's own weight."""
    head = live.get_output_embeddings() if hasattr(live, "get_output_embeddings") else None
    of_head = {id(each) for each in head.parameters()} if head is not None and hasattr(head, "base_layer") else set()
    found = trained(live, first, of_head)
    if first:
        live.save_pretrained(str(directory), state_dict=found)


def trained(live: torch.nn.Module, first: bool, others: Set[int] = frozenset()) -> dict[str, torch.Tensor]:
    """Return a model's trained parameters by name, each in its shape, in fp32 on the first rank's CPU. Collective.

    Args:
        others: further parameters, by their `id`.
    """
    found: dict[str, torch.Tensor] = {}
    for name, parameter in live.named_parameters():
        if parameter.requires_grad or id(parameter) in others:
            with deepspeed_internals.gathered([parameter] if deepspeed_internals.is_in_parts(parameter) else []):
                if first:
                    found[name] = parameter.detach().to("cpu", torch.float32, copy=True)
    return found


def save_config(model: Any, dtype: torch.dtype, directory: Path) -> None:
    """Write the config and the generation config of a model without weights, as `save_pretrained` does with them."""
    model.config.dtype = str(dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(str(directory))
    if model.can_generate():
        model.generation_config.to_json_file(directory / "generation_config.json")


def difference(
    pieces: Sequence[Piece], read: Callable[[str, int, torch.Tensor], None], rank: int, world_size: int
) -> str | None:
    """Compare this rank's part of what has no adapter with the files; return what is not in them as it is here.

    Over all ranks everything is compared once.

    Args:
        read: fills in a slice (N,) of a stored tensor, by its key, from an element on.
    """
    for piece in pieces:
        if piece.adapter is None:
            start, mine = _part(piece.tensor, rank, world_size)
            for at in range(0, mine.numel(), BLOCK):
                here = mine[at : at + BLOCK].to("cpu", piece.stored.dtype)
                there = torch.empty_like(here)
                read(piece.stored.name, start + at, there)
                if not torch.equal(here.view(torch.uint8), there.view(torch.uint8)):
                    return f"{piece.stored.name} does not load back as it was written"
    return None


def _part(tensor: torch.Tensor, rank: int, world_size: int) -> tuple[int, torch.Tensor]:
    """Return the first element of a rank's part of a tensor of any shape, and the part, (N,)."""
    if deepspeed_internals.is_in_parts(tensor):
        return deepspeed_internals.part(tensor)
    flat = tensor.detach().reshape(-1)
    start, end = (flat.numel() * each // world_size for each in (rank, rank + 1))
    return start, flat[start:end]
