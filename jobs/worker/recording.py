"""What a model's construction does to its tensors, written down instead of done: the tape behind recorded.py.

While it records, tensors that would hold much (`torch.empty`, `zeros`, `randn`, …) are made on the meta device, without
memory, and every operation on them becomes a line of the tape. Small things that code wants to look at (`torch.tensor`,
`arange`, `linspace`) are made for real, and are constants where they meet the others. A tensor is known by its storage:
a parameter, its `data` and its views are one. To the construction all of them seem to lie on the CPU: torch's own
initialisation, and transformers', leave out what they take to be without values, and say nothing.

This is deferred initialisation (torchdistx had it first), with torch's two public kinds of modes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from jobs.worker.torch_internals import (
    TorchDispatchMode,
    storage_key,
    tree_leaves,
    tree_map_only,
    truncated_whole,
    written,
)

aten = torch.ops.aten
META, CPU = torch.device("meta"), torch.device("cpu")
EMPTY = frozenset({aten.empty, aten.empty_strided, aten.empty_permuted, aten.empty_like, aten.new_empty})
"""Operations whose result has no values yet."""
_HEAVY = frozenset({torch.empty, torch.empty_strided, torch.zeros, torch.ones, torch.full, torch.eye})
_HEAVY |= {torch.rand, torch.randn, torch.randint, torch.randperm}
"""What is made on the meta device, where the construction has not asked for a third one."""
_GIVEN = frozenset({torch.tensor, torch.as_tensor, torch.asarray})
"""What makes a tensor of values that are there: on the meta device these would be lost without a trace."""
_TENSOR = torch.Tensor
_LOOKS = frozenset(
    {_TENSOR.item, _TENSOR.tolist, _TENSOR.numpy, _TENSOR.__bool__, _TENSOR.__int__, _TENSOR.__float__}
    | {_TENSOR.__index__, _TENSOR.__array__}
)
"""Where Python asks for the values."""


class Unrecordable(RuntimeError):
    """The construction does what cannot be replayed; building the model whole still can."""


@dataclass(frozen=True)
class View:
    """A strided look at a storage; `offset`, `size` and `stride` in elements of `dtype`."""

    storage: int
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        """The number of elements."""
        return torch.Size(self.size).numel()

    @property
    def run(self) -> range | None:
        """The elements of the storage that it is, in order; None where these are no run."""
        expected = 1
        for size, stride in zip(reversed(self.size), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return None
            expected *= size
        return range(self.offset, self.offset + self.numel)


@dataclass(frozen=True)
class Line:
    """One operation; in `args` and `kwargs` its tensors are views."""

    op: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    written: tuple[View, ...]
    """What it changes in place."""
    made: Mapping[int, View]
    """Results with storages of their own, by their place among all results."""
    ordinal: int
    """The operations before it that wrote to or made the storage of its first result."""

    @property
    def draws(self) -> bool:
        """Whether its result is random."""
        return torch.Tag.nondeterministic_seeded in self.op.tags

    @property
    def read(self) -> list[View]:
        """Its tensors that it does not change."""
        found = [leaf for leaf in tree_leaves((self.args, dict(self.kwargs))) if isinstance(leaf, View)]
        return [view for view in found if view not in self.written]

    @property
    def results(self) -> list[View]:
        """What it changes, and what it makes."""
        return [*self.written, *self.made.values()]


@dataclass
class Tape:
    """The lines, in order, and what is known of the storages that they name."""

    lines: list[Line] = field(default_factory=list)
    constants: dict[int, torch.Tensor] = field(default_factory=dict)
    """Values of storages that no line makes, each as it was when it was read."""
    nbytes: list[int] = field(default_factory=list)
    """Of each storage."""
    touching: dict[int, list[int]] = field(default_factory=dict)
    """The lines that make a storage or write to it, by their place."""
    paused: bool = False
    """Nothing is written down, and all is done for real."""
    _numbers: dict[int, int] = field(default_factory=dict)
    _alive: list[Any] = field(default_factory=list)
    """Storages whose address must not be given to another."""

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Do what happens meanwhile for real."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    def view(self, tensor: torch.Tensor) -> View:
        """Return what a tensor of any shape on the meta device is a look at."""
        key = storage_key(tensor)
        if key not in self._numbers:
            self._numbers[key] = len(self.nbytes)
            self.nbytes.append(tensor.untyped_storage().nbytes())
            self._alive.append(tensor.untyped_storage())
        number = self._numbers[key]
        return View(number, tensor.dtype, tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride()))

    def add(self, op: Any, args: Any, kwargs: Any, written: list[torch.Tensor], made: Mapping[int, Any]) -> None:
        """Write a line down; its tensors have any shapes."""
        changed, fresh = tuple(map(self.view, written)), {place: self.view(tensor) for place, tensor in made.items()}
        storages = {view.storage: None for view in (*changed, *fresh.values())}
        ordinal = len(self.touching.get(next(iter(storages)), ()))
        args, kwargs = tree_map_only(_TENSOR, self.view, (args, kwargs))
        for storage in storages:
            self.touching.setdefault(storage, []).append(len(self.lines))
        self.lines.append(Line(op, args, kwargs, changed, fresh, ordinal))

    def shadow(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a constant's stand-in of the same shape on the meta device; its values are kept as they are now."""
        values = tensor.detach().contiguous().clone()
        stand_in = torch.empty(values.shape, dtype=values.dtype, device=META)
        self.constants[self.view(stand_in).storage] = values
        return stand_in


class _Factories(TorchFunctionMode):
    """Makes large things on the meta device, and shows Python real values where it asks for them."""

    def __init__(self, tape: Tape, look: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self._tape, self._look = tape, look

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, device = dict(kwargs or {}), (kwargs or {}).get("device")
        if self._tape.paused:
            return func(*args, **kwargs)
        if func in (_TENSOR.device.__get__, _TENSOR.is_meta.__get__, _TENSOR.is_cpu.__get__) and args[0].is_meta:
            return CPU if func == _TENSOR.device.__get__ else func == _TENSOR.is_cpu.__get__
        if func in _LOOKS and args[0].is_meta:
            return self._seen(func, *args, **kwargs)
        if func in _HEAVY and kwargs.get("out") is None and (device is None or torch.device(device) == CPU):
            kwargs["device"] = META
        elif func in _GIVEN and device is not None and torch.device(device) == META:
            kwargs["device"] = CPU
        return func(*args, **kwargs)

    def _seen(self, func: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Let Python look at a recorded tensor."""
        found = func(self._look(tensor), *args, **kwargs)
        if func in (_TENSOR.numpy, _TENSOR.__array__):
            found.flags.writeable = False  # what would be written to it were lost
        return found


class _Operations(TorchDispatchMode):
    """Writes the operations on tensors of the meta device down."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if self._tape.paused:
            return func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, _TENSOR)]
        if not any(tensor.is_meta for tensor in tensors):
            return self._made(func, args, kwargs)
        changed = written(func, args, kwargs)
        if not all(tensor.is_meta for tensor in changed):
            raise Unrecordable(f"{func} writes what is only recorded into a tensor that has values")
        if kwargs.get("device") is not None:
            kwargs["device"] = META
        args, kwargs = tree_map_only(_TENSOR, lambda t: t if t.is_meta else self._tape.shadow(t), (args, kwargs))
        result = func(*args, **kwargs)
        self._note(func, args, kwargs, changed, result)
        return result

    def _made(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run what has no tensor of the meta device: its result may be one."""
        result = func(*args, **kwargs)
        if isinstance(result, _TENSOR) and result.is_meta:
            self._note(func, args, kwargs, [], result)
        elif func.overloadpacket in EMPTY and result.is_floating_point():
            result.fill_(torch.nan)  # so that what nothing is ever written to shows
        return result

    def _note(self, func: Any, args: Any, kwargs: Any, changed: list[torch.Tensor], result: Any) -> None:
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, _TENSOR)]
        inputs = {storage_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, _TENSOR)}
        made = {at: tensor for at, tensor in enumerate(results) if storage_key(tensor) not in inputs}
        if any(not tensor.is_meta for tensor in made.values()):
            raise Unrecordable(f"{func} makes values of what is only recorded")
        if changed or made:
            self._tape.add(func, args, kwargs, changed, made)


class Recording(ExitStack):
    """A context in which a tape is written."""

    def __init__(self, tape: Tape, look: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """`look` gives the values of a recorded tensor where the construction depends on them."""
        super().__init__()
        self._modes = (_Factories(tape, look), _Operations(tape))

    def __enter__(self) -> Recording:
        super().__enter__()
        self.enter_context(truncated_whole())
        for mode in self._modes:
            self.enter_context(mode)
        return self
