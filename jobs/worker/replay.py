"""The values of recorded tensors: any slice of most, and the others one at a time (jobs/worker/recording.py).

A storage that only random, constant and elementwise operations have written to is replayed in blocks of 2²⁰ elements. A
block's random numbers come from a generator of its own, seeded by (seed, the parameter's name, operation, block), so
that they are the same however the parameter is cut up. Of what is made of other tensors (copied, transposed, multiplied
by them) the operations that lead to it are run again, whole.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from jobs.worker.built_alone import Built
from jobs.worker.recording import EMPTY, Line, Tape, Unrecordable, View, aten
from jobs.worker.torch_internals import tree_leaves, tree_map_only

BLOCK = 1 << 20
"""Elements that are drawn together."""
_CONSTANT = {
    **{aten.zeros: 0, aten.zeros_like: 0, aten.new_zeros: 0, aten.ones: 1, aten.ones_like: 1, aten.new_ones: 1},
    **dict.fromkeys((aten.full, aten.full_like, aten.new_full)),
}
"""Operations that make a tensor of one value, which is their second argument where it is None here."""
_SET = frozenset({aten.zero_, aten.fill_, aten.copy_})
"""Operations that do not depend on what was there before; those that draw do not either."""


@dataclass(frozen=True)
class Step:
    """One operation on elements `first` to `last` of a storage."""

    op: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    first: int
    last: int
    ordinal: int
    draws: bool


@dataclass(frozen=True)
class Replay:
    """The values of a tape's storages.

    Args:
        names: of the storages that are parameters or buffers.
    """

    tape: Tape
    seed: int
    names: Mapping[int, str]
    _scratch: dict[torch.dtype, torch.Tensor] = field(default_factory=dict)
    _built: dict[Built, list[torch.Tensor]] = field(default_factory=dict)
    """The parameters of the last module that was built alone: those after it are asked for next."""

    def steps(self, view: View) -> list[Step] | None:
        """Return how a parameter is replayed in slices; None where it is made of other tensors.

        Raises:
            Unrecordable: some of its elements nothing is ever written to.
        """
        lines, unknown = self.needed(view.storage)
        elements = self.tape.nbytes[view.storage] // view.dtype.itemsize
        steps = [
            step for line in lines if line.op.overloadpacket not in EMPTY for step in [_step(line, view, elements)]
        ]
        found = [step for step in steps if step is not None]
        if view.run is None or unknown or len(found) < len(steps):
            return None
        _check_covered(found, elements, self.label(view.storage))
        return found

    def fill(self, view: View, steps: Iterable[Step], start: int, out: torch.Tensor) -> None:
        """Fill `out` [n] with n elements, flattened, from `start` on of a parameter that has `steps`."""
        assert view.run is not None
        elements = self.tape.nbytes[view.storage] // view.dtype.itemsize
        first = view.run.start + start
        last = first + out.numel()
        for begin in range(first - first % BLOCK, last, BLOCK):
            block = self._block(view.dtype)[: elements - begin]
            for step in steps:
                self._apply(step, block, begin, view.storage)
            low, high = max(first, begin), min(last, begin + block.numel())
            out[low - first : high - first].copy_(block[low - begin : high - begin])

    def whole(self, view: View) -> torch.Tensor:
        """Return a tensor's values in its shape, contiguous, by running again all that leads to them.

        Raises:
            Unrecordable: some have none, or where they come from is not on the tape.
        """
        lines, unknown = self.needed(view.storage)
        storages: dict[int, torch.UntypedStorage] = {}
        for storage in unknown:
            if storage not in self.tape.constants:
                raise Unrecordable(f"{self.label(view.storage)}: its values come from outside of what was recorded")
            storages[storage] = self.tape.constants[storage].clone().untyped_storage()
        plain = [line for line in lines if not isinstance(line.op, Built)]
        used = {view.storage, *(each.storage for line in plain for each in (*line.read, *line.results))}
        for line in lines:
            if isinstance(line.op, Built):
                self._build(line, used, storages)
            else:
                self._run(line, storages)
        values = _look(view, storages).contiguous().clone()
        if values.is_floating_point() and bool(values.isnan().any()):
            raise Unrecordable(f"{self.label(view.storage)}: nothing is ever written to some of its elements")
        return values

    def let_go(self) -> None:
        """Give up the module that was built last."""
        self._built.clear()

    def drawn(self, view: View) -> bool:
        """Return whether any of a tensor's values are random."""
        return any(line.draws for line in self.needed(view.storage)[0])

    def needed(self, storage: int) -> tuple[list[Line], set[int]]:
        """Return the lines that a storage's values come from, in order, and the storages that none of them makes."""
        wanted: set[int] = set()
        found: list[Line] = []
        later_first: list[int] = []

        def want(storage: int, before: int) -> None:
            if storage not in wanted:
                wanted.add(storage)
                for at in self.tape.touching.get(storage, ()):
                    if at < before:
                        heapq.heappush(later_first, -at)

        want(storage, len(self.tape.lines))
        while later_first:
            at = -heapq.heappop(later_first)
            line = self.tape.lines[at]
            if (found and line is found[-1]) or wanted.isdisjoint(view.storage for view in line.results):
                continue  # seen, or what it does is overwritten later
            found.append(line)
            wanted -= {view.storage for view in line.made.values()} | set(self._overwritten(line))
            for view in line.read:
                want(view.storage, at)
        return found[::-1], wanted

    def label(self, storage: int) -> str:
        """Return the name by which a storage's random numbers are seeded."""
        return self.names.get(storage, f"#{storage}")

    def _overwritten(self, line: Line) -> Iterator[int]:
        """Yield the storage whose every element a line sets, whatever was there."""
        if len(line.written) == 1 and (line.draws or line.op.overloadpacket in _SET):
            (view,) = line.written
            if view.run is not None and view.numel * view.dtype.itemsize == self.tape.nbytes[view.storage]:
                yield view.storage

    def _block(self, dtype: torch.dtype) -> torch.Tensor:
        """Return room for a block, always the same: new ones of that size fragment the heap."""
        if dtype not in self._scratch:
            self._scratch[dtype] = torch.empty(BLOCK, dtype=dtype)
        return self._scratch[dtype]

    def _apply(self, step: Step, block: torch.Tensor, begin: int, storage: int) -> None:
        """Do a step to the elements of `block`, which are those of a storage from `begin` on."""
        piece = block[max(step.first - begin, 0) : max(step.last - begin, 0)]
        if piece.numel():
            generator = {"generator": self._generator(storage, step.ordinal, begin // BLOCK)} if step.draws else {}
            step.op(piece, *step.args, **step.kwargs, **generator)

    def _run(self, line: Line, storages: dict[int, torch.UntypedStorage]) -> None:
        """Run a line on real storages."""
        if line.op.overloadpacket in EMPTY:
            storages[line.made[0].storage] = _unwritten(line.made[0], self.tape)
            return
        for storage in self._overwritten(line):
            storages.setdefault(storage, torch.UntypedStorage(self.tape.nbytes[storage]))
        step = _in_place(line)
        if step is not None and line.draws:  # as in slices: the same numbers
            view = line.written[0]
            flat = torch.empty(0, dtype=view.dtype).set_(storages[view.storage])
            for begin in range(0, flat.numel(), BLOCK):
                self._apply(step, flat[begin : begin + BLOCK], begin, view.storage)
            return
        result = self._called(line, storages)
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        for view in line.made.values():
            storages[view.storage] = torch.UntypedStorage(self.tape.nbytes[view.storage])
        for place, view in line.made.items():
            _look(view, storages).copy_(tensors[place])

    def _build(self, line: Line, used: set[int], storages: dict[int, torch.UntypedStorage]) -> None:
        """Build a module alone, if it is not the last one that was, and copy those of its parameters that are used."""
        if line.op not in self._built:
            self.let_go()
            self._built[line.op] = line.op()
        for at, view in line.made.items():
            if view.storage in used:
                values = self._built[line.op][at].clone(memory_format=torch.contiguous_format)
                storages[view.storage] = values.untyped_storage()

    def _called(self, line: Line, storages: dict[int, torch.UntypedStorage]) -> Any:
        args, kwargs = tree_map_only(View, lambda view: _look(view, storages), (line.args, dict(line.kwargs)))
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        with torch.random.fork_rng(devices=[]):
            if line.draws:
                first = line.results[0].storage
                torch.manual_seed(seed_of(self.seed, self.label(first), line.ordinal, 0))
            return line.op(*args, **{key: value for key, value in kwargs.items() if key != "generator"})

    def _generator(self, storage: int, ordinal: int, block: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed_of(self.seed, self.label(storage), ordinal, block))


def seed_of(seed: int, name: str, ordinal: int, block: int) -> int:
    """Return the seed of a block's generator. Torch's, on the CPU, has room for 32 bits of it."""
    digest = hashlib.sha256(f"{seed}|{name}|{ordinal}|{block}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


def _look(view: View, storages: Mapping[int, torch.UntypedStorage]) -> torch.Tensor:
    return torch.empty(0, dtype=view.dtype).set_(storages[view.storage], view.offset, view.size, view.stride)


def _unwritten(view: View, tape: Tape) -> torch.UntypedStorage:
    if not (view.dtype.is_floating_point or view.dtype.is_complex):
        raise Unrecordable(f"a tensor of {view.dtype} is filled in part only")
    return torch.full(
        (tape.nbytes[view.storage] // view.dtype.itemsize,), torch.nan, dtype=view.dtype
    ).untyped_storage()


def _step(line: Line, view: View, elements: int) -> Step | None:
    """Return what a line does to a storage that it makes or writes to; None where that takes other tensors."""
    packet = line.op.overloadpacket
    if packet in _CONSTANT and line.made[0].dtype == view.dtype:
        value = _CONSTANT[packet] if _CONSTANT[packet] is not None else line.args[1]
        return Step(aten.fill_.Scalar, (value,), {}, 0, elements, line.ordinal, False)
    step = _in_place(line)
    return step if step is not None and line.written[0].dtype == view.dtype else None


def _in_place(line: Line) -> Step | None:
    """Return a line as a step, where it changes each element of a run by itself."""
    elementwise = (
        line.draws or torch.Tag.pointwise in line.op.tags or line.op in (aten.zero_.default, aten.fill_.Scalar)
    )
    if not elementwise or line.read or line.made or len(line.written) != 1 or line.args[:1] != line.written:
        return None
    run = line.written[0].run
    if run is None or any(isinstance(leaf, View) for leaf in tree_leaves((line.args[1:], dict(line.kwargs)))):
        return None
    kwargs = {key: value for key, value in line.kwargs.items() if key != "generator"}
    return Step(line.op, line.args[1:], kwargs, run.start, run.stop, line.ordinal, line.draws)


def _check_covered(steps: Iterable[Step], elements: int, label: str) -> None:
    """Refuse a storage of which nothing ever sets some elements."""
    position = 0
    setting = (step for step in steps if step.draws or step.op.overloadpacket in _SET)
    for step in sorted(setting, key=lambda step: step.first):
        if step.first > position:
            break
        position = max(position, step.last)
    if position < elements:
        raise Unrecordable(f"{label}: nothing is ever written to its elements from {position} on")
