"""The model that a job starts from: drawn, or read; adapted; and looked at once before it learns.

Its construction is recorded, so that its first weights are known by the slice: drawn ones from the seed, a parent's
from its files by byte range. The engine fills them in, of the same numbers at every stage: at ZeRO stage 3 a process
has its parts alone, at the others the whole once, in what is computed in. What cannot be sliced is built or loaded
whole, in fp32, on each rank, and the job says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.filesize import decimal

from cluster.errors import UserError
from cluster.weights_cache import local
from jobs.checkpoint.resume import Fill
from jobs.spec import JobSpec
from jobs.tasks import Task, adapters, loading
from jobs.worker import apart, held, lora, weights
from jobs.worker.recorded import Recorded, Unrecordable, materialise, record
from jobs.worker.weight_files import WeightFiles
from jobs.worker.weight_match import match


class Unbuildable(UserError):
    """The model that the spec describes cannot be built or run, and will not be at a second try."""


@dataclass
class Start:
    """The model that a job starts from, in fp32."""

    model: torch.nn.Module
    """On the CPU; its parameters on the meta device where their values are known without it."""
    fill: Fill | None = None
    """Fills in any slice of a parameter, where that is known without the model; None: the model has its weights."""
    files: WeightFiles | None = None
    """What it reads them from."""
    said: list[str] = field(default_factory=list)
    """What is to be said of it."""
    alone: list[str] = field(default_factory=list)
    """What is to be said of what each rank makes whole for a moment, where it would have no more than its parts."""

    def materialise(self) -> None:
        """Give the model all its weights."""
        assert self.fill is not None
        materialise(self.model, self.fill)

    def close(self) -> None:
        """Let go of what it is made of or read from: the model has its weights."""
        self.fill = None
        if self.files is not None:
            self.files.close()


def begin(spec: JobSpec, task: Task, parent: Path | None, in_parts: bool = False, in_bf16: bool = False) -> Start:
    """Return what is trained, with adapters where the spec wants them.

    Args:
        in_parts: whether it will be divided by ZeRO stage 3, so that no rank need have it whole.
        in_bf16: whether its weights will be bf16, so that no rank need have them all in fp32.

    Raises:
        UserError: the weights cannot be loaded, or the model cannot be built.
    """
    begun, divided = _sliced(spec, task, parent), in_parts or in_bf16 or _is_held(spec)
    if isinstance(begun, str):
        what = "the whole model in memory" if in_parts else "the whole model in fp32"
        model = _whole(spec, task, parent)
        size = decimal(sum(parameter.nbytes for parameter in model.parameters()))
        begun = Start(model, alone=[f"every worker begins with {what}, {size}: {begun}"])
    begun.said = begun.alone if divided else []
    lora_said = _looked_at_adapters(spec, task, begun, parent)
    begun.model.train()
    begun.said = [*lora_said, *begun.said, *task.said]
    return begun


def begin_whole(spec: JobSpec, task: Task, parent: Path | None) -> Start:
    """Return the same with all its weights in memory, in fp32 on the CPU: for who has no engine."""
    begun = begin(spec, task, parent)
    if begun.fill is not None:
        begun.materialise()
    return begun


def _is_held(spec: JobSpec) -> bool:
    return spec.model.lora is not None and spec.model.lora.base != "whole"


def _looked_at_adapters(spec: JobSpec, task: Task, begun: Start, parent: Path | None) -> list[str]:
    """Check what the spec says of adapters, and hold their base in few bits where it asks for that; say so.

    Raises:
        UserError: what is trained could not be told apart from its base, or would be compared with another one.
    """
    wanted = spec.model.lora
    if wanted is None:
        return []
    said = [lora.described(begun.model)]
    if not wanted.merge:
        assert parent is not None
        apart.check(begun.model, parent)
    if wanted.base != "whole":
        if task.refers():
            raise UserError(
                f"model.lora.base: the reference answers come from the model as it is, and what is compared with them "
                f"would begin as another one, in {wanted.base}: leave base out"
            )
        said.append(held.hold(begun.model, begun.fill, wanted.base))
    return said


def look(spec: JobSpec, task: Task, model: torch.nn.Module, columns: Set[str]) -> list[str]:
    """Have the task look at the model once; return what is to be said. Collective where it is in parts.

    Args:
        columns: of the rows that it will see.

    Raises:
        UserError: the model cannot be run.
    """
    with described(spec):
        return task.prepare_model(model, columns)


def unadapted(spec: JobSpec, task: Task, parent: Path | None) -> torch.nn.Module:
    """Make the model without adapters whole, in fp32 on the CPU: drawn by the seed alone, or the parent's."""
    begun = _sliced(spec, task, parent, adapt=False)
    if isinstance(begun, str):
        return _whole(spec, task, parent, adapt=False).train()
    begun.materialise()
    begun.close()
    return begun.model.train()


def skeleton(spec: JobSpec, task: Task, parent: Path | None) -> torch.nn.Module | str:
    """Return the model without adapters on the meta device, or why it can be made whole only."""
    begun = _sliced(spec, task, parent, adapt=False)
    if isinstance(begun, str):
        return begun
    begun.close()
    return begun.model


def described_by(directory: Path, task: Task, files: Callable[[], WeightFiles] | None = None) -> Start | str:
    """Return the model of a directory on the meta device and what reads its weights, or why it can be read whole only.

    Args:
        files: opens the weights, where they are not in the directory.

    Raises:
        UserError: the task refuses it.
    """
    plain = _recorded(lambda: _without_weights(task, directory, {}), 0)
    if isinstance(plain, str):
        return plain
    return _of_files(plain.model, directory) if files is None else _of_weights(plain.model, files)


def _sliced(spec: JobSpec, task: Task, parent: Path | None, adapt: bool = True) -> Start | str:
    """Return the model on the meta device and what fills it, or why that cannot be."""
    assert spec.training is not None
    seed = spec.training.seed
    if parent is None:
        build = partial(_build, spec, task)
    else:
        build = partial(_without_weights, task, parent, spec.model.config)
    try:
        plain = _recorded(build, seed)
        if isinstance(plain, str):
            return plain
        begun = Start(plain.model, plain.fill, alone=plain.said) if parent is None else _of_files(plain.model, parent)
    except UserError as error:
        if parent is None:
            raise
        return str(error)  # what loads it whole says better what is wrong with the files
    if isinstance(begun, str) or spec.model.lora is None or not adapt:
        return begun
    adapters, names = spec.model.lora, {name for name, _ in _named(begun.model)}
    adapted = _recorded(lambda: lora.add_lora(build(), adapters), seed)
    return adapted if isinstance(adapted, str) else _adapted(begun, names, adapted)


def _adapted(plain: Start, names: set[str], recorded: Recorded) -> Start | str:
    """Return a model with adapters whose other weights are those of `plain`, known by `names` there."""
    before = {name: lora.name_before(name) for name, _ in _named(recorded.model)}
    if missing := names - set(before.values()):
        return f"with adapters, {min(missing)} is known by another name"
    known = {name: old for name, old in before.items() if old in names}
    buffers = {lora.name_before(name): buffer for name, buffer in recorded.model.named_buffers()}
    for name, buffer in plain.model.named_buffers():
        buffers[name].copy_(buffer)
    fill = plain.fill
    assert fill is not None

    def filled(name: str, start: int, out: torch.Tensor) -> None:
        if name in known:
            fill(known[name], start, out)
        else:
            recorded.fill(name, start, out)

    return Start(recorded.model, filled, plain.files, alone=plain.alone)


def _of_files(model: torch.nn.Module, directory: Path) -> Start | str:
    """Return a model without weights with what reads them from files, or why that cannot be; buffers are read."""
    base = adapters.base_of(directory)
    if base is not None:
        return _over_a_base(model, directory, base)
    return _of_weights(model, lambda: WeightFiles(local(directory)))


def _of_weights(model: torch.nn.Module, opened: Callable[[], WeightFiles]) -> Start | str:
    """Return the same of files that are opened so."""
    try:
        files = opened()
    except weights.Unreadable as error:
        return str(error)
    found = match(files, model)
    if isinstance(found, str):
        files.close()
        return found
    for name, source in found.buffers.items():
        buffer = model.get_buffer(name)
        values = torch.empty(buffer.numel(), dtype=buffer.dtype)
        found.read(files, source, 0, values)
        buffer.copy_(values.view(buffer.shape))
    sources = {name: found.parameters[first] for name, first in _first_names(model).items()}

    def fill(name: str, start: int, out: torch.Tensor) -> None:
        found.read(files, sources[name], start, out)

    return Start(model, fill, files, alone=found.said(model))


def _over_a_base(model: torch.nn.Module, directory: Path, base: Path) -> Start | str:
    """Return the same of a folder of adapters: what is read of the base, with them added."""
    begun = _of_files(model, base)
    if isinstance(begun, str):
        return begun
    assert begun.fill is not None
    fill = apart.laid_over(begun.fill, model, directory)
    if isinstance(fill, str):
        begun.close()
        return fill
    return Start(begun.model, fill, begun.files, alone=begun.alone)


def _named(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield parameters by each of their names."""
    return model.named_parameters(remove_duplicate=False)


def _first_names(model: torch.nn.Module) -> dict[str, str]:
    """Return of each parameter's names the one that `named_parameters` gives it."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    return {name: first[id(parameter)] for name, parameter in _named(model)}


def _recorded(build: Callable[[], torch.nn.Module], seed: int) -> Recorded | str:
    """Record a construction, or return why it cannot be."""
    try:
        return record(build, seed)
    except Unrecordable as why:
        return str(why)


def _whole(spec: JobSpec, task: Task, parent: Path | None, adapt: bool = True) -> torch.nn.Module:
    """Build or load the model as a whole."""
    assert spec.training is not None
    torch.manual_seed(spec.training.seed)
    if parent is None:
        with described(spec):
            model = _build(spec, task)
    else:
        with weights.readable(parent):
            model = task.load_model(parent, torch.float32, spec.model.config)
    if spec.model.lora is None or not adapt:
        return model
    with described(spec):
        torch.manual_seed(spec.training.seed)
        return lora.add_lora(model, spec.model.lora)


def _build(spec: JobSpec, task: Task) -> torch.nn.Module:
    assert spec.model.architecture is not None
    return task.build(spec.model.architecture, spec.model.config)


def _without_weights(task: Task, directory: Path, config: Mapping[str, Any]) -> torch.nn.Module:
    with loading.without_weights():
        return task.load_model(directory, torch.float32, config)


@contextmanager
def described(spec: JobSpec) -> Iterator[None]:
    """Turn what goes wrong while a model is built and first run into a sentence: the spec alone decides it.

    Raises:
        Unbuildable: it went wrong. Too little memory, and what the system fails at, are no such errors.
    """
    try:
        yield
    except Exception as error:
        if not is_the_specs(error):
            raise
        model = spec.model.architecture or spec.model.source
        given = f" with model.config {dict(spec.model.config)}" if spec.model.config else ""
        said = " ".join(str(error).split())[:300]
        raise Unbuildable(f"model: {model}{given} cannot be built and run: {type(error).__name__}: {said}") from error


def is_the_specs(error: Exception) -> bool:
    """Say whether building again would fail the same way. Pure."""
    passing = (UserError, MemoryError, OSError, Unrecordable)
    return not isinstance(error, passing) and "out of memory" not in str(error) and "CUDA" not in str(error)
