"""Modules whose construction cannot be recorded: each is built for real, alone, whenever its weights are asked for.

A construction that fails under recording fails in some module's `__init__`. Modules of that class are built for real
the next time, from a seed of their own; their parameters' values are given up at once, and an operation that builds the
module again is written down in their place. The others stay recorded.
"""

from __future__ import annotations

import functools
import hashlib
import random
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from jobs.worker.recording import META, Tape, Unrecordable
from jobs.worker.torch_internals import tree_leaves

REGISTERED = ("_parameters", "_buffers", "_modules")
"""The attributes in which a module keeps what `named_parameters` and its like find."""


def culprit(error: Exception) -> type[torch.nn.Module] | None:
    """Return the class of the innermost module that an error came out of the construction of."""
    found = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        names = frame.f_code.co_varnames
        built = frame.f_locals.get(names[0]) if names else None
        if frame.f_code.co_name == "__init__" and isinstance(built, torch.nn.Module):
            found = type(built)
    return found


@dataclass(eq=False)
class Built:
    """The operation of a tape that builds a module for real; its results are the module's parameters."""

    module: torch.nn.Module
    """What was built, without the values."""
    why: str
    """It is not recorded."""
    again: Callable[[], torch.nn.Module]
    nbytes: int
    digests: Sequence[bytes]
    overloadpacket: None = None
    tags: Sequence[torch.Tag] = (torch.Tag.nondeterministic_seeded,)

    def __call__(self) -> list[torch.Tensor]:
        """Build it, and return what it makes of any shapes.

        Raises:
            Unrecordable: that is another thing each time.
        """
        found = [parameter.detach() for parameter in self.again().parameters()]
        if [_digest(tensor) for tensor in found] != list(self.digests):
            raise Unrecordable(f"{type(self.module).__name__} is another one each time that it is built")
        return found


@dataclass
class Builder:
    """A context in which modules of some classes are built for real while the others are recorded."""

    kinds: Mapping[type[torch.nn.Module], str]
    """With what is in the way of recording them."""
    tape: Tape
    seed: int
    _count: int = 0
    _stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Builder:
        for kind in self.kinds:
            own = kind.__init__
            restore = functools.partial(setattr, kind, "__init__", own)
            self._stack.callback(restore if "__init__" in vars(kind) else functools.partial(delattr, kind, "__init__"))
            kind.__init__ = self._instead(kind, own)  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _instead(self, kind: type[torch.nn.Module], own: Callable[..., None]) -> Callable[..., None]:
        """Return what is called in the place of a class's `__init__`."""

        @functools.wraps(own)
        def construct(module: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
            if type(module) is not kind or self.tape.paused:
                own(module, *args, **kwargs)
            else:
                self._build(module, own, args, kwargs)

        return construct

    def _build(self, module: torch.nn.Module, own: Callable[..., None], args: Any, kwargs: Any) -> None:
        """Construct a module for real, and put what builds it again in the place of its values."""
        kind: Any = type(module)
        why = self.kinds[kind]
        if any(isinstance(leaf, (torch.Tensor, torch.nn.Module)) for leaf in tree_leaves((args, kwargs))):
            raise Unrecordable(f"{why}, and {kind.__name__} is made of other modules or tensors")
        known_by = f"{self.seed}|{kind.__qualname__}|{self._count}"
        own_seed = int.from_bytes(hashlib.sha256(known_by.encode()).digest()[:4], "little")
        self._count += 1
        dtype = torch.get_default_dtype()

        def construct(instance: torch.nn.Module) -> torch.nn.Module:
            with self.tape.pause(), seeded(own_seed), _default(dtype):
                own(instance, *args, **kwargs)
            return instance

        construct(module)
        with self.tape.pause():
            _check_found(module, why)
            values = list(module.parameters())
            stand_ins = [torch.empty(each.shape, dtype=each.dtype, device=META) for each in values]
            nbytes = sum(each.nbytes for each in values)
            built = Built(
                module, why, lambda: construct(kind.__new__(kind)), nbytes, [_digest(each) for each in values]
            )
            replace(module, dict(zip(map(id, values), stand_ins, strict=True)))
            if values:
                self.tape.add(built, (), {}, [], dict(enumerate(stand_ins)))


def _check_found(module: torch.nn.Module, why: str) -> None:
    """Refuse a module whose parameters are kept where their replacements would not be."""
    for each in module.modules():
        kept = [value for name, value in vars(each).items() if name not in REGISTERED]
        if not isinstance(each, torch.nn.RNNBase) and any(
            isinstance(leaf, torch.nn.Parameter) for leaf in tree_leaves(kept)
        ):
            raise Unrecordable(f"{why}, and {type(each).__name__} keeps parameters where they are not found")
    if any(parameter.is_meta for parameter in module.parameters()):
        raise Unrecordable(f"{why}, and {type(module).__name__} is made of what others have made")


def replace(module: torch.nn.Module, values: Mapping[int, torch.Tensor]) -> None:
    """Put other values, of any shapes, by the id of the parameter, into parameters; what is tied stays tied."""
    made: dict[int, torch.nn.Parameter] = {}
    for name, old in list(module.named_parameters(remove_duplicate=False)):
        if id(old) in values:
            if id(old) not in made:
                made[id(old)] = parameter_like(old, values[id(old)])
            put(module, name, made[id(old)])


def place(model: torch.nn.Module, name: str) -> tuple[torch.nn.Module, str]:
    """Return the module that has a parameter or buffer, and its name there."""
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def put(model: torch.nn.Module, name: str, parameter: torch.nn.Parameter) -> None:
    """Put a parameter in place by assignment, which recurrent layers notice: they keep a list of their own."""
    owner, leaf = place(model, name)
    setattr(owner, leaf, parameter)


def parameter_like(old: torch.nn.Parameter, values: torch.Tensor) -> torch.nn.Parameter:
    """Return a parameter with other values, of any shape, and all else as it was."""
    new = torch.nn.Parameter(values, requires_grad=old.requires_grad)
    vars(new).update(vars(old))
    return new


def _digest(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    return hashlib.blake2b(flat.numpy(), digest_size=16).digest()


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed Python's, numpy's and torch's global random states meanwhile, and give them back as they were."""
    python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(of_numpy)
