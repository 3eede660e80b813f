"""Where a model's tensor lies in the files when transformers makes it of others: merged experts, split projections.

What it does is not told by names of operations here: transformers' own conversion is run, first on tensors without
values, which tells names and shapes, then on row numbers in the weights' place. Where rows come out of it as they went
in, a parameter is read by ranges of the files like any other. Where they do not (transposed weights), the parameter is
made whole, alone, by the same conversion.
"""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from jobs.worker.weight_files import WeightFiles

MOST_RUNS = 16_384
"""A tensor of more than so many runs is made whole: reading it bit by bit would take long, and much memory to know."""
COLUMNS = 6
"""So many elements of each row are followed: of one a mirror image looks the same, of two what puts pairs apart."""


@dataclass(frozen=True)
class Runs:
    """A tensor, flattened, as runs of stored ones, one behind the other."""

    keys: tuple[str, ...]
    firsts: tuple[int, ...]
    """The element of the stored tensor that each begins with."""
    ends: tuple[int, ...]
    """The element of the tensor before which each ends."""

    def read(self, files: WeightFiles, start: int, out: torch.Tensor) -> None:
        """Fill `out` [n] with n elements from `start` on."""
        at, stop = bisect_right(self.ends, start), start + out.numel()
        if start < 0 or stop > self.ends[-1]:
            raise ValueError(f"a tensor of {self.ends[-1]} elements has no {out.numel()} from {start} on")
        done = start
        while done < stop:
            begin, end = self.ends[at - 1] if at else 0, min(self.ends[at], stop)
            files.read(self.keys[at], self.firsts[at] + done - begin, out[done - start : end - start])
            done, at = end, at + 1


def stored(key: str, numel: int) -> Runs:
    """Return a tensor that is stored as it is."""
    return Runs((key,), (0,), (numel,))


@dataclass(frozen=True)
class Shapes:
    """What a conversion may ask of a model, whose own parameters change while they are filled in."""

    config: Any
    state: Mapping[str, torch.Tensor]

    def get_parameter(self, name: str) -> torch.Tensor:
        """Return a tensor of the model, of any shape, as it was at first."""
        return self.state[name]


@dataclass(frozen=True, eq=False)
class Conversion:
    """What transformers makes of some stored tensors together."""

    model: Shapes
    target: str
    """The first tensor that it makes."""
    keys: Mapping[str, Sequence[str]]
    """By the pattern of the converter that they match, in the order in which transformers takes them."""
    converter: Any

    def made(self, files: WeightFiles) -> dict[str, torch.Tensor]:
        """Read and convert, whole, in fp32 what is no integer; return the tensors, of any shapes, by their names."""

        def read(key: str) -> torch.Tensor:
            found = files.whole(key)
            return found.float() if found.is_floating_point() else found

        return self._of(read)

    def shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]] | str:
        """Return what it makes of stored tensors of these shapes, or why it does not."""
        try:
            found = self._of(lambda key: torch.empty(shapes[key], device="meta"))
        except Exception as error:  # whatever a conversion does to what it does not expect
            said = " ".join(str(error).split())[:200]
            return f"transformers does not make {self.target} of what is stored: {type(error).__name__}: {said}"
        return {name: tuple(tensor.shape) for name, tensor in found.items()}

    def runs(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Runs] | None:
        """Return where the rows of what it makes are stored; None where it does more than to put rows in order."""
        rows = _Rows.of([(key, shapes[key]) for keys in self.keys.values() for key in keys])
        made = self.shapes(shapes)
        if rows is None or isinstance(made, str):
            return None
        ids = torch.arange(rows.count)
        others = torch.randperm(rows.count, generator=torch.Generator().manual_seed(0))
        narrow = {name: torch.empty(rows.narrowed(shape), device="meta") for name, shape in made.items()}
        try:
            numbered = self._of(lambda key: rows.numbers(key, ids), narrow)
            again = self._of(lambda key: rows.numbers(key, others), narrow)
        except Exception:  # a conversion that is for weights alone
            return None
        found = {}
        for name, shape in made.items():
            tensor, other = numbered.get(name), again.get(name)
            if tensor is None or other is None or tensor.shape != rows.narrowed(shape) or tensor.dtype != ids.dtype:
                return None
            if not torch.equal(others[tensor.clamp(0, rows.count - 1)], other):  # it calculates
                return None
            runs = rows.runs(tensor)
            if runs is None:
                return None
            found[name] = runs
        return found

    def _of(
        self, tensor_of: Callable[[str], torch.Tensor], state: Mapping[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """Have transformers convert, for a model of whose parameters the shapes are those of `state`."""
        converter, model = copy.deepcopy(self.converter), Shapes(self.model.config, state or self.model.state)
        for pattern, keys in self.keys.items():
            for key in keys:
                converter.add_tensor(self.target, key, pattern, tensor_of(key))
        found = converter.convert(self.target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in found.items()}


@dataclass(frozen=True)
class Converted:
    """A tensor that a conversion makes, whole."""

    conversion: Conversion
    name: str


@dataclass(frozen=True)
class _Rows:
    """The rows of stored tensors, numbered through; of vectors the elements."""

    keys: Sequence[str]
    shapes: Mapping[str, tuple[int, ...]]
    begins: torch.Tensor
    """The number of each one's first row [keys]."""
    width: int
    """The elements of a row."""
    columns: int
    """The elements of a row that are followed."""
    count: int
    """The elements that are followed, of all."""

    @classmethod
    def of(cls, stored: Sequence[tuple[str, tuple[int, ...]]]) -> _Rows | None:
        """Number rows; None where these are of several widths."""
        widths = {shape[-1] if len(shape) > 1 else 1 for _, shape in stored}
        if len(widths) > 1 or len({len(shape) > 1 for _, shape in stored}) > 1 or 0 in widths:
            return None
        width = widths.pop()
        counts = torch.tensor([0, *(torch.Size(shape).numel() // width for _, shape in stored)]).cumsum(0)
        columns = min(width, COLUMNS)
        return cls([key for key, _ in stored], dict(stored), counts[:-1], width, columns, int(counts[-1]) * columns)

    def narrowed(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return a shape with the columns that are followed."""
        return (*shape[:-1], self.columns) if self.width > 1 and shape[-1] == self.width else shape

    def numbers(self, key: str, of: torch.Tensor) -> torch.Tensor:
        """Return the elements of `of` [count] that stand for a stored tensor, in its shape."""
        shape = self.narrowed(self.shapes[key])
        first = int(self.begins[self.keys.index(key)]) * self.columns
        return of[first : first + torch.Size(shape).numel()].view(shape)

    def runs(self, numbered: torch.Tensor) -> Runs | None:
        """Return the runs that a tensor of numbers, of any shape, is; None where rows are not whole, or runs many."""
        flat = numbered.reshape(-1, self.columns)
        rows = flat[:, 0] // self.columns
        if not torch.equal(flat, rows[:, None] * self.columns + torch.arange(self.columns)):
            return None
        new = torch.ones(len(rows), dtype=torch.bool)
        new[1:] = (rows[1:] != rows[:-1] + 1) | torch.isin(rows[1:], self.begins)
        places = new.nonzero()[:, 0]
        if not 0 < len(places) <= MOST_RUNS:
            return None
        firsts = rows[places]
        keys = torch.searchsorted(self.begins, firsts, right=True) - 1
        offsets = (firsts - self.begins[keys]) * self.width
        ends = torch.cat([places[1:], torch.tensor([len(rows)])]) * self.width
        return Runs(tuple(self.keys[at] for at in keys.tolist()), tuple(offsets.tolist()), tuple(ends.tolist()))
