"""The optimizer that a spec asks for, and which parameters it treats how."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Set
from typing import Any

import torch

from cluster.errors import UserError
from jobs.spec import TrainingSpec
from jobs.worker.muon import MuonAndAdamW
from jobs.worker.quantize import counted


def make(
    model: torch.nn.Module, training: TrainingSpec, matrices: Set[str], compute: torch.dtype, device: torch.device
) -> torch.optim.AdamW:
    """Return the optimizer of a model's trained parameters.

    Args:
        matrices: names of those that Muon trains.
        compute: what it computes in.
        device: where it does.
    """
    groups = list(parameter_groups(model.named_parameters(), training.weight_decay, matrices))
    settings: dict[str, Any] = {
        "lr": training.learning_rate,
        "betas": training.betas,
        "eps": training.epsilon,
        "fused": True,
    }
    return MuonAndAdamW(groups, compute, device, **settings) if matrices else torch.optim.AdamW(groups, **settings)


def parameter_groups(
    named: Iterable[tuple[str, torch.nn.Parameter]], weight_decay: float, matrices: Set[str] = frozenset()
) -> Iterator[dict[str, Any]]:
    """Split trained parameters, of any shapes: Muon's matrices, others that decay, and those that do not.

    Biases and norms do not. Muon's are the first group, if there are any: jobs/worker/zero_layouts.py goes by that.
    """
    trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    rest = [parameter for name, parameter in trained if name not in matrices]
    for members, decay, by_muon in (
        ([parameter for name, parameter in trained if name in matrices], weight_decay, True),
        ([parameter for parameter in rest if len(shape_of(parameter)) >= 2], weight_decay, False),
        ([parameter for parameter in rest if len(shape_of(parameter)) < 2], 0.0, False),
    ):
        if members:
            yield {"params": members, "weight_decay": decay, **({"matrices": True} if by_muon else {})}


def shape_of(parameter: torch.Tensor) -> torch.Size:
    """Return the shape of a parameter, (…), also of one that is in parts."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def matrices_of(model: torch.nn.Module) -> frozenset[str]:
    """Return the names of the trained parameters that Muon is made for: the weights (O, I) of hidden layers.

    They are those of linear and recurrent layers and of attention; embeddings and the layers that give the output are
    not among them (Jordan et al. 2024), nor kernels of convolutions and experts in one tensor, which are no matrices.

    Raises:
        UserError: there are none.
    """
    outside = {id(p) for module in _at_the_ends(model) for p in module.parameters()}
    inside = {id(p) for module in _multiplying(model) for p in module.parameters(recurse=False)} - outside
    found = frozenset(
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and id(parameter) in inside
        and len(shape_of(parameter)) == 2
        and min(shape_of(parameter)) > 1
    )
    if not found:
        raise UserError(
            f"training.optimizer: muon trains the matrices of hidden layers, and {type(model).__name__} has none that "
            "are trained; take adamw"
        )
    return found


def said(model: torch.nn.Module, matrices: Set[str]) -> list[str]:
    """Say what Muon trains of a model, and what AdamW."""
    if not matrices:
        return []
    sizes = {name: shape_of(p).numel() for name, p in model.named_parameters() if p.requires_grad}
    by_muon = sum(size for name, size in sizes.items() if name in matrices)
    layers = Counter(name.removesuffix(".weight").rpartition(".")[2] for name in matrices)
    return [
        f"Muon trains {len(matrices)} matrices ({counted(layers)}) with {by_muon:,} elements; AdamW the other "
        f"{len(sizes) - len(matrices)} parameters with {sum(sizes.values()) - by_muon:,}"
    ]


def _multiplying(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Yield the layers that multiply by a matrix."""
    from transformers.pytorch_utils import Conv1D

    kinds = (torch.nn.Linear, Conv1D, torch.nn.RNNBase, torch.nn.MultiheadAttention)
    return (module for module in model.modules() if isinstance(module, kinds))


def _at_the_ends(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Yield embeddings, and what makes the output: all outside the base model, or else the last linear layer."""
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, torch.nn.Embedding | torch.nn.EmbeddingBag):
            yield module
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if isinstance(inner, PreTrainedModel):
        base, head = inner.base_model, inner.get_output_embeddings()
        if base is not inner:
            yield from (child for child in inner.children() if child is not base)
        if isinstance(head, torch.nn.Module):
            yield head
        return
    linear = [module for module in inner.modules() if isinstance(module, torch.nn.Linear)]
    yield from linear[-1:]
