"""A model's weights in the Hugging Face layout, written as they come: a block is in memory, and never a whole tensor.

    shards = plan([Stored("lm_head.weight", (32000, 4096), torch.bfloat16), …], 5 << 30)
    digests = {shard.name: write_one(Folder(directory), shard, blocks) for shard in shards}
                                                    blocks(stored) yields the tensor's elements, flattened, in order
    digests |= write_index(directory, shards)
    problem = verify(directory, digests, rank, world_size)

They go to a folder of this machine, or to another `Place`: a store (jobs/worker/elsewhere.py). The index stays here.
Blocks of ZeRO-3 are gathered, which takes all ranks: those that write nothing take them in the same order (`in_order`).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import torch

from jobs.worker.weight_files import DTYPES, INDEX, SINGLE

SHARD_BYTES = 5 << 30
"""Of tensors, in one file."""
READ_BYTES = 4 << 20
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor that is to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    """In the file."""

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """What it takes in the file."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """One file."""

    name: str
    tensors: tuple[Stored, ...]
    """In the order in which they lie there."""

    @property
    def numel(self) -> int:
        """The number of elements."""
        return sum(tensor.numel for tensor in self.tensors)

    @property
    def nbytes(self) -> int:
        """What it takes, with its header."""
        return len(header(self)) + sum(tensor.nbytes for tensor in self.tensors)


class Place(Protocol):
    """Where files of weights go."""

    def stream(self, name: str) -> AbstractContextManager[Any]:
        """Open a new file, which has a `write`; at the context's end it is there."""

    def digest(self, name: str) -> str:
        """Return the SHA-256 (hex) of what is read back."""

    def locate(self, name: str) -> str:
        """Return where a file is, for people."""


@dataclass(frozen=True)
class Folder:
    """A folder of this machine."""

    path: Path

    @contextmanager
    def stream(self, name: str) -> Iterator[IO[bytes]]:
        """Open a new file; at the end it is on the disk."""
        with (self.path / name).open("xb") as file:
            yield file
            _settle(file)

    def digest(self, name: str) -> str:
        """Return the SHA-256 (hex) of what is read back."""
        return digest(self.path / name)

    def locate(self, name: str) -> str:
        """Return where a file is."""
        return str(self.path / name)


def plan(tensors: Iterable[Stored], shard_bytes: int = SHARD_BYTES) -> list[Shard]:
    """Divide tensors, in their order, over files of at most `shard_bytes`; a larger tensor has a file to itself. Pure.

    Within a file wider dtypes come first: readers map tensors into memory, where each has to begin at a multiple of its
    elements' size.
    """
    parts: list[list[Stored]] = [[]]
    free = shard_bytes
    for tensor in tensors:
        if parts[-1] and tensor.nbytes > free:
            parts.append([])
            free = shard_bytes
        parts[-1].append(tensor)
        free -= tensor.nbytes
    count = len(parts)
    names = [SINGLE] if count == 1 else [f"model-{at:05}-of-{count:05}.safetensors" for at in range(1, count + 1)]
    ordered = (sorted(part, key=lambda tensor: -tensor.dtype.itemsize) for part in parts)
    return [Shard(name, tuple(part)) for name, part in zip(names, ordered, strict=True)]


def in_order(shards: Iterable[Shard]) -> Iterator[Stored]:
    """Yield the tensors in the order in which they are written."""
    return (tensor for shard in shards for tensor in shard.tensors)


def header(shard: Shard) -> bytes:
    """Return what stands before the tensors of a file: its length, and where they lie. Pure."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in shard.tensors:
        place = [position, position + tensor.nbytes]
        entries[tensor.name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
        position += tensor.nbytes
    if len(entries) != len(shard.tensors) + 1:
        raise ValueError(f"{shard.name}: of its tensors two have one name")
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def index(shards: Sequence[Shard]) -> bytes:
    """Return the content of the file that says which tensor is in which file. Pure."""
    weight_map = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
    total = sum(tensor.nbytes for tensor in in_order(shards))
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def write_index(directory: Path, shards: Sequence[Shard]) -> dict[str, str]:
    """Write the index, where there are several files, durably; return its digest by its name."""
    digests = {}
    if len(shards) > 1:
        content = index(shards)
        with Folder(directory).stream(INDEX) as file:
            file.write(content)
        digests[INDEX] = hashlib.sha256(content).hexdigest()
    folder = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return digests


def verify(
    directory: Path, digests: Mapping[str, str], rank: int, world_size: int, place: Place | None = None
) -> str | None:
    """Read this rank's share of the files back, and return what is wrong with the first that is; None: nothing.

    Over all ranks every file is read once.

    Args:
        place: where files of weights are, if not in the directory.
    """
    for name in sorted(digests)[rank::world_size]:
        at: Place = Folder(directory) if place is None or name == INDEX else place
        try:
            found = at.digest(name)
        except OSError as error:
            return f"{at.locate(name)} cannot be read back: {error}"
        if found != digests[name]:
            wrong = f"SHA-256 {found[:12]}, not {digests[name][:12]}"
            return f"{at.locate(name)} does not read back as it was written ({wrong})"
    return None


def digest(path: Path) -> str:
    """Return the SHA-256 (hex) of a file, past the system's cache where it lets go of it."""
    total = hashlib.sha256()
    buffer = memoryview(bytearray(READ_BYTES))
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while count := file.readinto(buffer):
            total.update(buffer[:count])
    return total.hexdigest()


def write_one(place: Place, shard: Shard, blocks: Callable[[Stored], Iterable[torch.Tensor]]) -> str:
    """Write one new file, durably, and return the SHA-256 (hex) of what was handed to it.

    Args:
        blocks: gives a tensor's elements, flattened, in order, in blocks [n] of any dtype, on any device.

    Raises:
        ValueError: the blocks of a tensor are more or fewer elements than it has.
    """
    with place.stream(shard.name) as file:
        return _write(file, shard, blocks)


def _write(file: Any, shard: Shard, blocks: Callable[[Stored], Iterable[torch.Tensor]]) -> str:
    total = hashlib.sha256()

    def put(content: bytes | memoryview) -> None:
        total.update(content)
        file.write(content)

    put(header(shard))
    for tensor in shard.tensors:
        written = 0
        for block in blocks(tensor):
            written += block.numel()
            if written > tensor.numel:
                break
            put(_bytes(block, tensor.dtype))
        if written != tensor.numel:
            raise ValueError(f"{tensor.name} has {tensor.numel} elements, and its blocks {written} or more")
    return total.hexdigest()


def _bytes(block: torch.Tensor, dtype: torch.dtype) -> memoryview:
    flat = block.detach().to("cpu", dtype).contiguous().view(-1)
    return memoryview(flat.view(torch.uint8).numpy())


def _settle(file: IO[bytes]) -> None:
    """Have a file's content on the disk rather than on its way there."""
    file.flush()
    os.fsync(file.fileno())
