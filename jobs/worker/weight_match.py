"""Where a checkpoint holds a model's tensors, so that they can be read, or written, in slices.

On loading, transformers renames keys, puts the prefix of the base model before them or takes it away, merges experts,
and ties weights. What it would do is asked of transformers itself; where it leaves a doubt, the answer is a reason why
the model has to be loaded, or saved, whole.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.filesize import decimal

from jobs.worker.weight_conversion import Conversion, Converted, Runs, Shapes, stored
from jobs.worker.weight_files import DTYPES, FLOATS, WeightFiles

Source = Runs | Converted


@dataclass
class Match:
    """Where each tensor of a model is stored."""

    parameters: Mapping[str, Source]
    """By its name, as `named_parameters` has it."""
    buffers: Mapping[str, Source]
    """By the name of a persistent buffer."""
    _last: tuple[Conversion, dict[str, torch.Tensor]] | None = field(default=None, repr=False)

    @property
    def whole(self) -> list[str]:
        """The parameters of which any slice costs all elements for a moment."""
        return [name for name, source in self.parameters.items() if isinstance(source, Converted)]

    def said(self, model: torch.nn.Module) -> list[str]:
        """What is to be said of that, of the model that was matched."""
        if not self.whole:
            return []
        largest = max((model.get_parameter(name) for name in self.whole), key=lambda parameter: parameter.numel())
        name = next(name for name, parameter in model.named_parameters() if parameter is largest)
        count = f"{len(self.whole)} parameter{'s' * (len(self.whole) > 1)}"
        return [
            f"every worker reads {count} whole, one conversion at a time, and keeps its part: transformers does more "
            f"with them than to put rows in order; {name} has {decimal(largest.numel() * 4)} in fp32"
        ]

    def read(self, files: WeightFiles, source: Source, start: int, out: torch.Tensor) -> None:
        """Fill `out` [n], of any float type, with n elements of a tensor, flattened, from `start` on."""
        if isinstance(source, Runs):
            source.read(files, start, out)
            return
        if self._last is None or self._last[0] is not source.conversion:
            self._last = None  # let go before the next is made
            self._last = source.conversion, source.conversion.made(files)
        out.copy_(self._last[1][source.name].reshape(-1)[start : start + out.numel()])


def match(files: WeightFiles, model: torch.nn.Module) -> Match | str:
    """Return where the tensors of `model`, which may lie on the meta device, are stored, or why to load it whole."""
    if (files.directory / "adapter_config.json").is_file():
        return "there are adapters beside the weights"
    origins = _origins(files.entries, model)
    if isinstance(origins, str):
        return origins
    state = model.state_dict(keep_vars=True)
    found: dict[int, list[Source]] = defaultdict(list)
    for target, origin in origins.items():
        sources = _sources(files, target, origin, state)
        if isinstance(sources, str):
            return sources
        for name, source in sources.items():
            found[id(state[name])].append(source)
    for name, tensor in state.items():
        if id(tensor) not in found:
            return f"{name} is not in the files"
    for sources_of_one in found.values():
        if said := _differ(files, sources_of_one):
            return said
    parameters = {name: found[id(parameter)][0] for name, parameter in model.named_parameters()}
    buffers = {name: found[id(buffer)][0] for name, buffer in model.named_buffers() if id(buffer) in found}
    return Match(parameters, buffers)


def _sources(
    files: WeightFiles, target: str, origin: str | Conversion, state: Mapping[str, torch.Tensor]
) -> dict[str, Source] | str:
    """Return where what is made of some stored tensors lies, by name, or why that is not what the model has."""
    keys = [origin] if isinstance(origin, str) else [key for keys in origin.keys.values() for key in keys]
    shapes = {key: files.entries[key].shape for key in keys}
    made = {target: shapes[origin]} if isinstance(origin, str) else origin.shapes(shapes)
    if isinstance(made, str):
        return made
    for name, shape in made.items():
        if name not in state:
            return f"the model has no place for {name}"
        if shape != tuple(state[name].shape):
            return f"{_of(keys)} {shape} in the files, and {name} {tuple(state[name].shape)} in the model"
        for key in keys:
            dtype = files.entries[key].dtype
            if dtype not in (FLOATS if state[name].is_floating_point() else DTYPES.keys() - FLOATS):
                return f"{key} is of dtype {dtype} in the files, and {name} of {state[name].dtype} in the model"
    if isinstance(origin, str):
        return {target: stored(origin, files.entries[origin].numel)}
    runs = origin.runs(shapes)
    return {**runs} if runs is not None else {name: Converted(origin, name) for name in made}


def _of(keys: list[str]) -> str:
    return f"{keys[0]} is" if len(keys) == 1 else f"{keys[0]} and {len(keys) - 1} more are"


def _differ(files: WeightFiles, sources: list[Source]) -> str | None:
    """Say which of a tensor's sources are not the same; transformers ties weights only where the files agree."""
    first, *others = sources
    for other in others:
        if not (isinstance(first, Runs) and isinstance(other, Runs) and len(first.keys) == len(other.keys) == 1):
            return "what the config ties is converted, and twice in the files"
        if not files.equal(first.keys[0], other.keys[0]):
            return f"{first.keys[0]} and {other.keys[0]} are one by the config, and two in the files"
    return None


def loaded_as(keys: Iterable[str], model: torch.nn.Module) -> dict[str, str] | str:
    """Return which tensor of the model's state transformers makes of each stored key alone, or why it does not."""
    found = _origins(keys, model)
    if isinstance(found, str):
        return found
    for target, origin in found.items():
        if isinstance(origin, Conversion):
            return f"transformers makes {target} of {next(iter(origin.keys.values()))[0]} and others"
    return {origin: target for target, origin in found.items() if isinstance(origin, str)}


def _origins(keys: Iterable[str], model: torch.nn.Module) -> dict[str, str | Conversion] | str:
    """Return what transformers makes each tensor of the model's state of, or why that is not known.

    Of tensors that a conversion makes together the first is told alone.
    """
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    if not isinstance(model, PreTrainedModel):
        return f"{type(model).__name__} is no model of transformers"
    if getattr(model.config, "quantization_config", None) is not None:
        return "its weights are quantised"
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    if len(renamings) + len(converters) < len(transforms):
        return "transformers changes its weights in a way that is not known"
    state, prefix = model.state_dict(), model.base_model_prefix
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    found: dict[str, dict[str | None, list[str]]] = {}
    for key in sorted(keys, key=dot_natural_key):  # in transformers' order, on which renamings and merges depend
        target, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if target not in state and key in state:
            target, pattern = rename_source_key(key, [], [], prefix, state)
        if target not in state:
            return f"the model has no place for {key}"
        found.setdefault(target, {}).setdefault(pattern, []).append(key)
    origins: dict[str, str | Conversion] = {}
    shapes = Shapes(model.config, state)
    for target, by in found.items():
        alone, several = by.get(None, []), {pattern: each for pattern, each in by.items() if pattern is not None}
        if len(alone) + bool(several) > 1 or len({id(by_pattern[pattern]) for pattern in several}) > 1:
            return f"{next(iter(by.values()))[0]} and another are both loaded as {target}"
        origins[target] = alone[0] if alone else Conversion(shapes, target, several, by_pattern[next(iter(several))])
    return origins


def saved_as(model: torch.nn.Module) -> dict[str, str] | str:
    """Return under which key each tensor of the model's state is stored, as `save_pretrained` does, or why it is not.

    A tensor that has several names is stored once. What is returned loads back: that is asked of `loaded_as`.
    """
    from transformers import PreTrainedModel
    from transformers.core_model_loading import revert_weight_conversion

    if not isinstance(model, PreTrainedModel):
        return f"{type(model).__name__} is no model of transformers"
    state = dict(_once(model))
    stand_ins = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in state.items()}
    try:
        reverted: Mapping[str, Any] = revert_weight_conversion(model, dict(stand_ins))
    except Exception as error:  # whatever a conversion does to what it does not expect
        return f"transformers converts it on saving: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    names = {id(tensor): name for name, tensor in stand_ins.items()}
    if len(reverted) != len(state) or any(id(tensor) not in names for tensor in reverted.values()):
        return "transformers converts its weights on saving"
    keys = {names[id(tensor)]: key for key, tensor in reverted.items()}
    back = loaded_as(keys.values(), model)
    if isinstance(back, str):
        return back
    wrong = next((name for name, key in keys.items() if back[key] != name), None)
    return f"{keys[wrong]} would be loaded as {back[keys[wrong]]}" if wrong else keys


def _once(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the state by name; of a tensor with several names the one that transformers ties the others to."""
    names: dict[int, list[str]] = defaultdict(list)
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        names[id(tensor)].append(name)
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    for found in names.values():
        name = next((name for name in found if name not in tied), found[0])
        yield name, state[name]
