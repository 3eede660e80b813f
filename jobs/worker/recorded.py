"""Initial weights without the model: its construction is recorded once, and any slice of a parameter replayed.

    recorded = record(lambda: task.build(architecture, config), seed)
    recorded.model                           every parameter on the meta device; buffers are real
    recorded.fill("lm_head.weight", 0, out)  the first elements of one
    recorded.materialise()                   all of it, on the CPU

The same numbers come out at every ZeRO stage, number of workers and slicing. They are not those of a construction
without recording: a parameter's depend on its name and not on what was drawn before it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from rich.filesize import decimal

from cluster.errors import UserError
from jobs.worker import replay as replaying
from jobs.worker.built_alone import REGISTERED, Builder, Built, culprit, parameter_like, place, put, seeded
from jobs.worker.recording import Recording, Tape, Unrecordable, View
from jobs.worker.replay import Replay, Step
from jobs.worker.torch_internals import tree_leaves, tree_map_only

__all__ = ["Recorded", "Unrecordable", "materialise", "record"]


@dataclass
class Recorded:
    """A model without weights, and how to make them."""

    model: torch.nn.Module
    _replay: Replay
    _views: dict[str, View]
    _steps: dict[str, list[Step] | None] = field(default_factory=dict)
    """None: what is made of other tensors, so that a slice costs the whole."""
    alone: dict[str, Built] = field(default_factory=dict)
    """The modules that are built whole for any slice of their parameters, by name."""
    _last: tuple[str, torch.Tensor] | None = None

    @property
    def whole(self) -> dict[str, int]:
        """The parameters of which any slice costs all elements for a moment, with their number."""
        return {name: self._views[name].numel for name, steps in self._steps.items() if steps is None}

    @property
    def said(self) -> list[str]:
        """What is to be said of that: of modules, and of parameters that are larger than what is drawn together."""
        kinds: dict[type[torch.nn.Module], list[str]] = defaultdict(list)
        for path, built in self.alone.items():
            kinds[type(built.module)].append(path)
        found = []
        for kind, paths in kinds.items():
            largest = max(paths, key=lambda path: self.alone[path].nbytes)
            found.append(
                f"every worker builds {len(paths)} module{'s' * (len(paths) > 1)} of class {kind.__name__} whole, one "
                f"at a time, and keeps its part: {largest} has {decimal(self.alone[largest].nbytes)}. It cannot be "
                f"recorded: {self.alone[largest].why}"
            )
        large = [name for name, numel in self.whole.items() if numel > replaying.BLOCK and not self._is_alone(name)]
        if large:
            largest = max(large, key=lambda name: self.whole[name])
            nbytes = self._views[largest].numel * self._views[largest].dtype.itemsize
            found.append(
                f"every worker makes {len(large)} parameter{'s' * (len(large) > 1)} whole, one at a time, since they "
                f"are computed from other tensors: {largest} has {decimal(nbytes)}"
            )
        return found

    def _is_alone(self, name: str) -> bool:
        return any(name.startswith(f"{path}.") for path in self.alone)

    def fill(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` [n], of any float type, with n of a parameter's elements, flattened, from `start` on.

        Args:
            name: any of its names, where it is tied.

        Raises:
            KeyError: there is no such parameter.
            ValueError: it has not so many elements.
        """
        view, steps = self._views[name], self._steps[name]
        if out.dim() != 1 or start < 0 or start + out.numel() > view.numel:
            raise ValueError(f"{name} has {view.numel} elements: no {tuple(out.shape)} from {start} on")
        with torch.no_grad():
            if steps is not None:
                self._replay.fill(view, steps, start, out)
                return
            if self._last is None or self._last[0] != name:
                self._last = None  # let go before the next is made
                self._last = name, self._replay.whole(view).view(-1)
            out.copy_(self._last[1][start : start + out.numel()])

    def materialise(self) -> torch.nn.Module:
        """Give the model its weights, on the CPU, and return it; tied parameters stay tied."""
        materialise(self.model, self.fill)
        self._last = None
        self._replay.let_go()
        return self.model


def _on_cpu(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Return memory for a parameter's values, of its shape and type."""
    return torch.empty(parameter.shape, dtype=parameter.dtype)


def materialise(
    model: torch.nn.Module,
    fill: Callable[[str, int, torch.Tensor], None],
    room: Callable[[torch.nn.Parameter], torch.Tensor] = _on_cpu,
) -> None:
    """Give a model all its weights; tied parameters stay tied.

    Args:
        fill: as `Recorded.fill`; `out` is (N,).
        room: returns where a parameter's values go: contiguous, of its shape.
    """
    made: dict[int, torch.nn.Parameter] = {}
    for name, old in list(model.named_parameters(remove_duplicate=False)):
        if id(old) not in made:
            values = room(old)
            fill(name, 0, values.view(-1))
            made[id(old)] = parameter_like(old, values)
        put(model, name, made[id(old)])


def record(build: Callable[[], torch.nn.Module], seed: int) -> Recorded:
    """Run `build` without memory for weights, and write down how it draws them.

    Python's, numpy's and torch's global random states are seeded meanwhile, and given back as they were.

    Raises:
        UserError: as `build`.
        Unrecordable: it looks at random values, fails without real ones, or leaves a parameter without any.
    """
    kinds: dict[type[torch.nn.Module], str] = {}
    while True:
        try:
            return _record(build, seed, kinds)
        except (UserError, MemoryError, OSError):
            raise
        except Exception as error:
            kind = culprit(error)
            if kind is None or kind in kinds:  # else modules of it are built alone
                if isinstance(error, Unrecordable):
                    raise
                raise Unrecordable(f"it cannot be built without weights: {_sentence(error)}") from error
            kinds[kind] = str(error) if isinstance(error, Unrecordable) else _sentence(error)


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _record(build: Callable[[], torch.nn.Module], seed: int, kinds: Mapping[type[torch.nn.Module], str]) -> Recorded:
    """Record a construction in which modules of some classes are built alone."""
    tape = Tape()

    def look(tensor: torch.Tensor) -> torch.Tensor:
        replay, view = Replay(tape, seed, {}), tape.view(tensor)
        if replay.drawn(view):
            raise Unrecordable("the construction depends on values that it draws")
        return replay.whole(view)

    with seeded(seed), Recording(tape, look), Builder(kinds, tape, seed):
        model = build()
    if type(model) in kinds:
        raise Unrecordable(kinds[type(model)])
    with torch.no_grad():
        return _recorded(model, tape, seed)


def _recorded(model: torch.nn.Module, tape: Tape, seed: int) -> Recorded:
    """Find out how each parameter is replayed, and give buffers and other tensors their values at once."""
    _shadow_real(model, tape)
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    views = {name: tape.view(tensor) for name, tensor in tensors if tensor.is_meta}
    names = {view.storage: name for name, view in reversed(views.items())}  # of several names the first
    replay = Replay(tape, seed, names)
    _make_real(model, tape, replay)
    views = {name: tape.view(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    steps = {name: replay.steps(view) for name, view in views.items()}
    paths, alone = {id(module): path for path, module in model.named_modules()}, {}
    for name in (name for name, found in steps.items() if found is None):
        replay.whole(views[name])  # fails here rather than half-way through a training's start
        for line in replay.needed(views[name].storage)[0]:
            if isinstance(line.op, Built):
                alone[paths.get(id(line.op.module), name)] = line.op
    replay.let_go()
    return Recorded(model, replay, views, steps, alone)


def _shadow_real(model: torch.nn.Module, tape: Tape) -> None:
    """Turn parameters that have values (of `torch.tensor`, say) into recorded ones with these as constants."""
    made: dict[int, torch.nn.Parameter] = {}
    for name, old in list(model.named_parameters(remove_duplicate=False)):
        if not old.is_meta:
            if old.isnan().any():
                raise Unrecordable(f"{name}: nothing is ever written to some of its elements")
            if id(old) not in made:
                made[id(old)] = parameter_like(old, tape.shadow(old))
            put(model, name, made[id(old)])


def _make_real(model: torch.nn.Module, tape: Tape, replay: Replay) -> None:
    """Give buffers, and tensors that modules keep besides, their values; one that several share stays shared."""
    made: dict[int, torch.Tensor] = {}

    def real(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = replay.whole(tape.view(tensor))
        return made[id(tensor)]

    for name, buffer in list(model.named_buffers(remove_duplicate=False)):
        if buffer.is_meta:
            owner, leaf = place(model, name)
            owner._buffers[leaf] = real(buffer)
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.RNNBase):
            continue  # its list of parameters follows assignments
        for name, value in [item for item in vars(module).items() if item[0] not in REGISTERED]:
            found = [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor) and leaf.is_meta]
            if any(isinstance(tensor, torch.nn.Parameter) for tensor in found):
                raise Unrecordable(f"{path or 'the model'} keeps parameters in its {name}, where they are not found")
            if found:
                vars(module)[name] = tree_map_only(torch.Tensor, lambda t: real(t) if t.is_meta else t, value)
