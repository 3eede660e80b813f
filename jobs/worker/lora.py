"""Low-rank adapters: put on before training, and what they add to which weight after it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch

from cluster.errors import UserError
from jobs.spec import LoraSpec
from jobs.worker.quantize import counted


def add_lora(model: torch.nn.Module, lora: LoraSpec) -> torch.nn.Module:
    """Freeze the model and add trainable low-rank adapters; the head of a classifier is trained whole.

    Raises:
        UserError: a name in `target_modules` is that of no layer, or of one that takes no adapter.
    """
    import peft

    linear = _linear(model)
    settings = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        modules_to_save=_heads(model, lora) or None,
        bias="none",
    )
    try:
        adapted = peft.get_peft_model(model, settings)
    except ValueError as error:
        raise UserError(
            f"model.lora.target_modules: {_first_sentence(error)}; linear layers of {type(model).__name__}: "
            f"{', '.join(linear)}"
        ) from error
    if unmatched := _unmatched(adapted, lora):
        raise UserError(
            f"model.lora.target_modules: {type(model).__name__} has no layer named {', '.join(unmatched)}; its linear "
            f"layers: {', '.join(linear)}"
        )
    return adapted


def name_before(name: str) -> str:
    """Return the name that a parameter or a buffer of an adapted model had before, if it had one. Pure."""
    for added in ("base_model.model.", ".base_layer", ".original_module", ".modules_to_save.default"):
        name = name.replace(added, "", 1) if added.endswith("model.") else name.replace(added, "")
    return name


def described(adapted: torch.nn.Module) -> str:
    """Say which layers of a peft model have adapters, and how much of it is trained."""
    layers = [*adapted.base_model.targeted_module_names, *adapted.base_model.targeted_parameter_names]  # type: ignore
    counts = Counter(str(name).rpartition(".")[2] for name in layers)
    trained, whole = adapted.get_nb_trainable_parameters()  # type: ignore[operator]
    whole_too = adapted.peft_config["default"].modules_to_save or ()  # type: ignore[union-attr, index, operator]
    beside = f", {', '.join(sorted(whole_too))} whole" if whole_too else ""
    return (
        f"adapters on {len(layers)} layers ({counted(counts)}){beside}: {trained:,} of {whole:,} parameters are trained"
    )


def _unmatched(adapted: torch.nn.Module, lora: LoraSpec) -> list[str]:
    """Return the names that no layer has; peft passes them over where another name is found.

    Names that peft has translated (of experts, which share a parameter in transformers) are no longer among its own.
    """
    if isinstance(lora.target_modules, str):
        return []
    wanted = set(adapted.peft_config["default"].target_modules or ())  # type: ignore[union-attr, index, operator]
    found = [str(name) for name in adapted.base_model.targeted_module_names]  # type: ignore[union-attr, operator]
    return [
        name
        for name in lora.target_modules
        if name in wanted and not any(at == name or at.endswith(f".{name}") for at in found)
    ]


def _heads(model: torch.nn.Module, lora: LoraSpec) -> list[str]:
    """Return the modules outside the base model of a classifier that no adapter is asked for.

    They may be new, and random; frozen as the rest they would stay so.
    """
    prefix = getattr(model, "base_model_prefix", "")
    if not prefix or not type(model).__name__.endswith("Classification"):
        return []
    named = () if isinstance(lora.target_modules, str) else lora.target_modules
    heads = [name for name, child in model.named_children() if name != prefix and any(True for _ in child.parameters())]
    return [name for name in heads if name not in named]


def _linear(model: torch.nn.Module) -> list[str]:
    """Return the last parts of the names of a model's linear layers, in their order."""
    from transformers.pytorch_utils import Conv1D

    layers = (name for name, each in model.named_modules() if isinstance(each, (torch.nn.Linear, Conv1D)))
    return list(dict.fromkeys(name.rpartition(".")[2] for name in layers))


def _first_sentence(error: Exception) -> str:
    """Return what a peft error says, without the listing of a whole module that it may hold."""
    lines = str(error).splitlines()
    return lines[0] if len(lines) == 1 else f"{lines[0].removesuffix('(')} takes no adapter"


@dataclass(frozen=True)
class Adapter:
    """What is added to the weight of a linear layer: scaling · up · down, transposed where the layer's weight is."""

    down: torch.Tensor
    """A, [rank, in]."""
    up: torch.Tensor
    """B, [out, rank]."""
    scaling: float
    transposed: bool
    """The layer's weight is [in, out], as gpt2 has it."""

    def added(self, rows: slice) -> torch.Tensor:
        """Return what is added to some rows of the weight, (rows, columns) fp32; A and B have to be whole."""
        up, down = self.up.detach().float(), self.down.detach().float()
        return (down.T[rows] @ up.T if self.transposed else up[rows] @ down) * self.scaling


def adapters(model: torch.nn.Module) -> dict[str, Adapter] | str:
    """Return what is added to which parameter, by its name, or why that is not a sum for each parameter alone."""
    from peft.tuners import lora as layers
    from peft.tuners.tuners_utils import BaseTunerLayer

    found: dict[str, Adapter] = {}
    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = owners.setdefault(id(parameter), name)
        if owner != name and ".base_layer." in name + owner:
            return f"{name} and {owner} are one weight, and of these layers one is adapted"
    for name, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        if type(layer) is not layers.Linear:
            return f"{name} has an adapter that is no product of two matrices"
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        scaling, transposed = float(layer.scaling["default"]), bool(layer.fan_in_fan_out)
        found[f"{name}.base_layer.weight"] = Adapter(down, up, scaling, transposed)
    return found
