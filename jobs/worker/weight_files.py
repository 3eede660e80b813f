"""Weights in the Hugging Face layout, read by ranges: a rank takes its own elements and never a whole tensor.

One `model.safetensors`, or the files that `model.safetensors.index.json` names. The `safetensors` library slices rows,
not runs of the flattened tensor that ZeRO cuts at; so the header is parsed here. The format: eight bytes with the
header's length, little-endian; the header, JSON; then the tensors' bytes, behind each other and without holes.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from jobs.worker.weights import Unreadable, is_permanent

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LARGEST_HEADER_BYTES = 100_000_000
"""As in the safetensors library."""
LARGEST_INDEX_BYTES = 100_000_000
BLOCK_BYTES = 4 << 20
DTYPES: Mapping[str, torch.dtype] = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    "BOOL": torch.bool,
}
"""What is read; a file may hold others, which are listed."""
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    file: Path
    dtype: str
    """As safetensors calls it."""
    shape: tuple[int, ...]
    offset: int
    """Of its first byte in the file."""
    nbytes: int

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


class Opened(Protocol):
    """A file that is open to be read by ranges."""

    size: int
    """In bytes."""

    def read_into(self, block: memoryview, offset: int) -> int:
        """Fill in what is there from `offset` on, or some of it; return how many bytes that is."""

    def close(self) -> None:
        """Let go of it."""


class OnDisk:
    """A file of this machine."""

    def __init__(self, path: Path) -> None:
        """Open it.

        Raises:
            Unreadable: it cannot be opened, and will not be at a second try.
        """
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            if is_permanent(error):
                raise Unreadable(f"model.from: {path} cannot be read: {error.strerror}") from error
            raise
        self.size = os.fstat(self._file).st_size

    def read_into(self, block: memoryview, offset: int) -> int:
        """Fill in what is there, or some of it."""
        return os.preadv(self._file, [block], offset)

    def close(self) -> None:
        """Close it."""
        os.close(self._file)


class WeightFiles:
    """The tensors of a model directory. Use as a context, or close it."""

    def __init__(
        self, directory: Path, opened: Callable[[Path], Opened] = OnDisk, stored: Set[str] = frozenset()
    ) -> None:
        """Read all headers.

        Args:
            opened: opens a file of weights, as if it were in the directory.
            stored: the names of those that are not.

        Raises:
            Unreadable: there are no safetensors, or a file is missing, damaged, or at odds with the index.
        """
        self.directory = directory
        self._open = opened
        self._files: dict[Path, Opened] = {}
        self._buffer = bytearray(BLOCK_BYTES)
        self.entries: dict[str, Entry] = {}
        for path, promised in _files(directory, stored).items():
            found = entries(path, opened)
            if missing := sorted(promised - found.keys()):
                raise Unreadable(f"model.from: {path}: {INDEX} says that it holds {missing[0]!r}, and it does not")
            if twice := sorted(found.keys() & self.entries.keys()):
                raise Unreadable(f"model.from: {path}: {twice[0]!r} is in {self.entries[twice[0]].file.name} too")
            self.entries.update(found)

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        while self._files:
            self._files.popitem()[1].close()

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` [n], of any dtype, on any device, with n elements of a tensor, flattened, from `start` on.

        Raises:
            KeyError: there is no such tensor.
            ValueError: it has not so many elements.
            Unreadable: it is of a dtype that torch has not, or its file has been cut since.
        """
        entry = self.entries[name]
        if out.dim() != 1 or start < 0 or start + out.numel() > entry.numel:
            raise ValueError(f"{name} has {entry.numel} elements: no {tuple(out.shape)} from {start} on")
        size = _dtype(name, entry).itemsize
        step = BLOCK_BYTES // size
        for first in range(0, out.numel(), step):
            count = min(step, out.numel() - first)
            block = memoryview(self._buffer)[: count * size]
            self._read(entry.file, block, entry.offset + (start + first) * size)
            out[first : first + count].copy_(torch.frombuffer(block, dtype=_dtype(name, entry)))

    def whole(self, name: str) -> torch.Tensor:
        """Return a tensor in its shape and dtype, on the CPU: buffers, of which every rank has all."""
        entry = self.entries[name]
        found = torch.empty(entry.shape, dtype=_dtype(name, entry))
        self.read(name, 0, found.view(-1))
        return found

    def equal(self, one: str, other: str) -> bool:
        """Return whether two tensors have the same shape, dtype and bytes; a block of each is in memory."""
        a, b = self.entries[one], self.entries[other]
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return False
        half = BLOCK_BYTES // 2
        for first in range(0, a.nbytes, half):
            count = min(half, a.nbytes - first)
            left, right = memoryview(self._buffer)[:count], memoryview(self._buffer)[half : half + count]
            self._read(a.file, left, a.offset + first)
            self._read(b.file, right, b.offset + first)
            if left != right:
                return False
        return True

    def _read(self, path: Path, block: memoryview, offset: int) -> None:
        if path not in self._files:
            self._files[path] = self._open(path)
        _fill(self._files[path], path, block, offset)


def entries(path: Path, opened: Callable[[Path], Opened] = OnDisk) -> dict[str, Entry]:
    """Return what a safetensors file holds, by name.

    Args:
        opened: opens it.

    Raises:
        Unreadable: its header is not what the format asks for, or promises other bytes than there are.
    """
    file = opened(path)
    try:
        size = file.size
        header = _header(file, path, size)
    finally:
        file.close()
    base = 8 + len(header)
    try:
        parsed = json.loads(header.decode(), object_pairs_hook=_once)
        if not isinstance(parsed, dict):
            raise ValueError("it is no object")
        parsed.pop("__metadata__", None)
        found = {name: _entry(path, name, about, base) for name, about in parsed.items()}
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"model.from: {path} is no whole safetensors file: its header: {error}") from error
    _check_gapless(path, found.values(), base, size)
    return found


def _header(file: Opened, path: Path, size: int) -> bytes:
    start = bytearray(8)
    _fill(file, path, memoryview(start), 0)
    (length,) = struct.unpack("<Q", start)
    if length > min(LARGEST_HEADER_BYTES, size - 8):
        raise Unreadable(
            f"model.from: {path} is no whole safetensors file: its header would have {length} bytes, it has {size}"
        )
    header = bytearray(length)
    _fill(file, path, memoryview(header), 8)
    return bytes(header)


def _entry(path: Path, name: str, about: Any, base: int) -> Entry:
    """Check what a header says of a tensor.

    Raises:
        ValueError: it is not what the format asks for.
    """
    if not isinstance(about, dict) or not about.keys() >= {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r} has not dtype, shape and data_offsets")
    dtype, shape, offsets = about["dtype"], about["shape"], about["data_offsets"]
    if not isinstance(dtype, str) or not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{name!r} has dtype {dtype!r}, shape {shape!r} and data_offsets {offsets!r}")
    entry = Entry(path, dtype, tuple(shape), base + offsets[0], offsets[1] - offsets[0])
    if entry.nbytes < 0 or (dtype in DTYPES and entry.nbytes != entry.numel * DTYPES[dtype].itemsize):
        raise ValueError(f"{name!r}, {dtype} {list(shape)}, has the bytes {offsets[0]} to {offsets[1]}")
    return entry


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice")
    return found


def _check_gapless(path: Path, found: Iterable[Entry], base: int, size: int) -> None:
    position = base
    for entry in sorted(found, key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset != position:
            raise Unreadable(f"model.from: {path} is no whole safetensors file: its tensors overlap or have holes")
        position += entry.nbytes
    if position != size:
        raise Unreadable(
            f"model.from: {path} has {size} bytes, and its header speaks of {position}: it has been cut, or more is "
            "behind it"
        )


def _files(directory: Path, stored: Set[str]) -> dict[Path, set[str]]:
    """Return the files of a model directory, with the tensors that the index says each holds."""
    if SINGLE in stored or (directory / SINGLE).is_file():  # as transformers, which looks for it first
        return {directory / SINGLE: set()}
    path = directory / INDEX
    if not path.is_file():
        raise Unreadable(f"model.from: {directory} has neither {SINGLE} nor {INDEX}")
    file = OnDisk(path)
    try:
        content = bytearray(min(file.size, LARGEST_INDEX_BYTES + 1))
        _fill(file, path, memoryview(content), 0)
    finally:
        file.close()
    if len(content) > LARGEST_INDEX_BYTES:
        raise Unreadable(f"model.from: {path} has more than {LARGEST_INDEX_BYTES} bytes, which no index has")
    try:
        weight_map = json.loads(content.decode())["weight_map"]
        named = [(str(name), weight_map[name]) for name in weight_map]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Unreadable(f"model.from: {path} is no index of weights: {error}") from error
    found: dict[Path, set[str]] = {}
    for name, where in named:
        if not isinstance(where, str) or Path(where).name != where or not where.endswith(".safetensors"):
            raise Unreadable(f"model.from: {path}: {name!r} is said to be in {where!r}, which is no file beside it")
        found.setdefault(directory / where, set()).add(name)
    if not found:
        raise Unreadable(f"model.from: {path} names no weights")
    return dict(sorted(found.items()))


def _dtype(name: str, entry: Entry) -> torch.dtype:
    if entry.dtype not in DTYPES:
        raise Unreadable(f"model.from: {entry.file}: {name!r} is of dtype {entry.dtype}, which is not read in parts")
    return DTYPES[entry.dtype]


def _fill(file: Opened, path: Path, block: memoryview, offset: int) -> None:
    """Read all of `block`, however many calls it takes."""
    done = 0
    while done < len(block):
        count = file.read_into(block[done:], offset + done)
        if not count:
            raise Unreadable(f"model.from: {path} ends after {offset + done} bytes: it has been cut")
        done += count
