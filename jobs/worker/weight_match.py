"""Whether a checkpoint's tensors are a model's parameters one to one, so that they can be read, or written, in slices.

On loading, transformers renames keys, puts the prefix of the base model before them or takes it away, merges experts,
and ties weights. What it would do is asked of transformers itself; where it is more than a name, or leaves a doubt, the
answer is a reason why the model has to be loaded, or saved, whole.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from jobs.worker.weight_files import DTYPES, FLOATS, WeightFiles


@dataclass(frozen=True)
class Match:
    """Where each tensor of a model is stored."""

    parameters: Mapping[str, str]
    """Name of a parameter, as `named_parameters` has it → key in the files."""
    buffers: Mapping[str, str]
    """Name of a persistent buffer → key in the files."""


def match(files: WeightFiles, model: torch.nn.Module) -> Match | str:
    """Return where the tensors of `model`, which may lie on the meta device, are stored, or why to load it whole."""
    if (files.directory / "adapter_config.json").is_file():
        return "there are adapters beside the weights"
    targets = loaded_as(files.entries, model)
    if isinstance(targets, str):
        return targets
    state = model.state_dict(keep_vars=True)
    keys: dict[int, list[str]] = defaultdict(list)
    for key, target in targets.items():
        entry, tensor = files.entries[key], state[target]
        if entry.shape != tuple(tensor.shape):
            return f"{key} is {entry.shape} in the files, and {target} {tuple(tensor.shape)} in the model"
        if entry.dtype not in (FLOATS if tensor.is_floating_point() else DTYPES.keys() - FLOATS):
            return f"{key} is of dtype {entry.dtype} in the files, and {target} of {tensor.dtype} in the model"
        keys[id(tensor)].append(key)
    for name, tensor in state.items():
        if id(tensor) not in keys:
            return f"{name} is not in the files"
    for first, *others in keys.values():
        for other in others:  # the config ties them; transformers does so only where the files agree
            if not files.equal(first, other):
                return f"{first} and {other} are one by the config, and two in the files"
    parameters = {name: keys[id(parameter)][0] for name, parameter in model.named_parameters()}
    buffers = {name: keys[id(buffer)][0] for name, buffer in model.named_buffers() if id(buffer) in keys}
    return Match(parameters, buffers)


def loaded_as(keys: Iterable[str], model: torch.nn.Module) -> dict[str, str] | str:
    """Return which tensor of the model's state transformers makes of each stored key alone, or why it does not."""
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
    found: dict[str, str] = {}
    taken: set[str] = set()
    for key in sorted(keys, key=dot_natural_key):  # in transformers' order, on which some renamings depend
        target, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if target not in state and key in state:
            target, pattern = rename_source_key(key, [], [], prefix, state)
        if pattern is not None:
            return f"transformers makes {target} of {key} and others"
        if target not in state:
            return f"the model has no place for {key}"
        if target in taken:
            return f"{key} and another are both loaded as {target}"
        found[key] = target
        taken.add(target)
    return found


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
