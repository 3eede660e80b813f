"""Low-rank adapters: put on before training, added into the weights after it."""

from __future__ import annotations

import torch

from cluster.errors import UserError
from jobs.spec import LoraSpec


def add_lora(model: torch.nn.Module, lora: LoraSpec) -> torch.nn.Module:
    """Freeze the model and add trainable low-rank adapters.

    Raises:
        UserError: no layer has one of the names in `target_modules`.
    """
    import peft

    settings = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=lora.target_modules, bias="none"
    )
    try:
        return peft.get_peft_model(model, settings)
    except ValueError as error:
        raise UserError(f"model.lora: {str(error).splitlines()[0]}") from error


def merge(adapted: torch.nn.Module) -> torch.nn.Module:
    """Add the adapters of a peft model into its weights, in place, and return the plain model.

    An adapter changes one layer. Where that layer shares its weight with another one (an embedding tied to the output
    head), the two part first: merged into the shared weight, the adapter would change both.
    """
    if untie(adapted):
        config = adapted.get_base_model().config  # type: ignore[operator]
        for each in (config, config.get_text_config()):
            each.tie_word_embeddings = False
    return adapted.merge_and_unload()  # type: ignore[operator]


def untie(adapted: torch.nn.Module) -> list[str]:
    """Give each adapted layer a weight of its own, where it shares one; return the names of those layers."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    parted = []
    for name, layer in adapted.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        base = layer.get_base_layer()
        weight: torch.nn.Parameter = base.weight
        others = (each for other in adapted.modules() if other is not base for each in other.parameters(recurse=False))
        if any(each is weight for each in others):
            base.weight = torch.nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
            parted.append(name)
    return parted
