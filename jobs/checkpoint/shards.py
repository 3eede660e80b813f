"""The training state as fragments: which numbers a rank holds, how they lie in a file, how any other rank finds them.

A fragment is a run of one flattened parameter with the optimizer's moments for the same elements, in fp32. However
DeepSpeed cuts the parameters up (not at all, by rank over the concatenated group, by rank within each parameter), the
fragments of all ranks cover each element once. So a shard written by any group can be read by any other: a resume
needs neither the same number of workers nor the same ZeRO stage. The idea is that of universal checkpoints (Lian et
al. 2024, arXiv:2406.18820) without the conversion between two formats.

A shard is a safetensors file: no pickle is ever loaded. Its keys are `kind|parameter|first element`.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from jobs.checkpoint.store import Store

KINDS = ("weight", "exp_avg", "exp_avg_sq")
"""The fp32 master weights and AdamW's two moments."""
FLOAT_BYTES = 4


class ShardError(RuntimeError):
    """A shard does not hold what it should."""


@dataclass(frozen=True)
class Fragment:
    """A run of one parameter: `tensors` are fp32 views (1-D, all of one length) into live training state, by kind."""

    parameter: str
    start: int
    tensors: Mapping[str, torch.Tensor]
    in_files: bool = False
    """They are mapped files, and too large to be copied to memory."""

    @property
    def numel(self) -> int:
        """The number of elements."""
        return next(iter(self.tensors.values())).numel()


def total_elements(fragments: Iterable[Fragment]) -> int:
    """Count the numbers in all fragments, of all kinds."""
    return sum(fragment.numel * len(fragment.tensors) for fragment in fragments)


def share(fragments: Sequence[Fragment], rank: int, world_size: int) -> list[Fragment]:
    """Cut state that every rank holds whole into equal parts, so that each writes its own."""
    total = sum(fragment.numel for fragment in fragments)
    first, last = total * rank // world_size, total * (rank + 1) // world_size
    mine, position = [], 0
    for fragment in fragments:
        start, stop = max(first, position) - position, min(last, position + fragment.numel) - position
        if start < stop:
            views = {kind: tensor[start:stop] for kind, tensor in fragment.tensors.items()}
            mine.append(replace(fragment, start=fragment.start + start, tensors=views))
        position += fragment.numel
    return mine


def copy_out(fragments: Iterable[Fragment], buffer: torch.Tensor) -> None:
    """Copy all fragments behind each other into `buffer`, fp32 [all their elements] on the CPU."""
    position = 0
    for fragment in fragments:
        for tensor in fragment.tensors.values():
            buffer[position : position + tensor.numel()].copy_(tensor, non_blocking=tensor.is_cuda)
            position += tensor.numel()


def chunks(fragments: Iterable[Fragment]) -> Iterator[Any]:
    """Yield what `copy_out` would copy, tensor by tensor, without a copy; all on the CPU."""
    return (tensor.detach().numpy() for fragment in fragments for tensor in fragment.tensors.values())


def header(fragments: Iterable[Fragment]) -> bytes:
    """Return the safetensors header of a shard whose data is what `copy_out` makes."""
    entries: dict[str, Any] = {}
    position = 0
    for fragment in fragments:
        for kind, tensor in fragment.tensors.items():
            stop = position + tensor.numel() * FLOAT_BYTES
            key = f"{kind}|{fragment.parameter}|{fragment.start}"
            entries[key] = {"dtype": "F32", "shape": [tensor.numel()], "data_offsets": [position, stop]}
            position = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


@dataclass(frozen=True)
class _Piece:
    start: int
    numel: int
    file: Any
    offset: int


class Reader:
    """Every element of a checkpoint's state, wherever its shards hold it."""

    def __init__(self, store: Store, names: Iterable[str]) -> None:
        """Read the headers of the shards `names`."""
        self._pieces: dict[tuple[str, str], list[_Piece]] = {}
        for name in names:
            self._index(store.open(name), name)
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece.start)

    def __contains__(self, parameter: str) -> bool:
        return ("weight", parameter) in self._pieces

    def read(self, kind: str, parameter: str, start: int, out: torch.Tensor) -> None:
        """Fill `out`, fp32 [n], with the n elements from `start` on.

        Raises:
            ShardError: the shards do not hold all of them.
        """
        position, stop = start, start + out.numel()
        for piece in self._pieces.get((kind, parameter), ()):
            if position < stop and piece.start <= position < piece.start + piece.numel:
                count = min(stop, piece.start + piece.numel) - position
                offset = piece.offset + (position - piece.start) * FLOAT_BYTES
                data = bytearray(piece.file.read_at(count * FLOAT_BYTES, offset))
                out[position - start : position - start + count].copy_(torch.frombuffer(data, dtype=torch.float32))
                position += count
        if position < stop:
            raise ShardError(f"{kind} of {parameter!r}: elements {position} to {stop} are in no shard")

    def check_whole(self, elements: Mapping[str, int]) -> None:
        """Compare what the shards hold with a model: every element of each parameter once, of every kind.

        Raises:
            ShardError: not so; it names the first few parameters that differ.
        """
        strange = {name for _, name in self._pieces} - elements.keys()
        wrong = [f"{name!r} is no parameter of the model" for name in sorted(strange)]
        for name, numel in elements.items():
            for kind in KINDS:
                pieces = self._pieces.get((kind, name), [])
                if (problem := _uncovered(pieces, numel)) is not None:
                    wrong.append(f"{kind} of {name!r} {problem}")
        if wrong:
            more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
            raise ShardError(f"the shards do not add up to the model: {'; '.join(wrong[:3])}{more}")

    def _index(self, file: Any, name: str) -> None:
        (length,) = struct.unpack("<Q", file.read_at(8, 0))
        for key, entry in json.loads(file.read_at(length, 8)).items():
            kind, parameter, start = key.split("|")
            first, last = entry["data_offsets"]
            if entry["dtype"] != "F32" or kind not in KINDS:
                raise ShardError(f"{name}: {key!r} is no fp32 {' or '.join(KINDS)}")
            piece = _Piece(int(start), (last - first) // FLOAT_BYTES, file, 8 + length + first)
            self._pieces.setdefault((kind, parameter), []).append(piece)


def _uncovered(pieces: Sequence[_Piece], numel: int) -> str | None:
    """Return how `pieces`, sorted by their start, fail to be the elements 0 to `numel`, each once; None if they do."""
    position = 0
    for piece in pieces:
        if piece.start != position:
            what = "are there twice" if piece.start < position else "are in no shard"
            return f"has {numel} elements, of which {min(position, piece.start)} to {max(position, piece.start)} {what}"
        position += piece.numel
    if position == numel:
        return None
    return (
        f"has {numel} elements, of which {position} to {numel} are in no shard"
        if position < numel
        else (f"has {numel} elements, the shards hold {position}")
    )
