"""Where the training state lies at each ZeRO stage: one layout for each optimizer of DeepSpeed's that is known.

    stage 0       torch's own AdamW, or ours with Muon: every rank holds every parameter whole
    stage 1, 2    the parameters of a group behind each other, in equal parts over the ranks: one part a rank
    stage 3       every parameter in equal parts over the ranks, the last of them padded

A layout is chosen by the stage that the engine reports and the exact class of its optimizer. A subclass may keep its
state elsewhere (MiCS divides over fewer ranks, ZenFlow keeps some of it back), so it is unknown and refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cluster.errors import UserError
from jobs.worker import deepspeed_internals
from jobs.worker.deepspeed_internals import Place


@dataclass(frozen=True)
class Layout:
    """How one optimizer keeps the fp32 weights, and with them AdamW's moments."""

    place: Callable[[torch.nn.Parameter, Any, int], Place | None]
    """(parameter, optimizer, rank) → what this rank holds of the parameter, if anything."""
    numel: Callable[[torch.nn.Parameter], int]
    """Elements of the whole parameter."""
    tensor: Callable[[torch.nn.Parameter, Any], torch.Tensor]
    """(a parameter of Muon's, optimizer) → the optimizer's tensor for it, also where this rank has none of it."""
    partitioned: bool = True
    """False: every rank holds all of it."""


def _whole(parameter: torch.nn.Parameter, optimizer: Any, rank: int) -> Place:
    return Place(parameter, 0, 0, parameter.numel())


def _bf16_part(parameter: torch.nn.Parameter, optimizer: Any, rank: int) -> Place | None:
    return deepspeed_internals.place_in_group(parameter, deepspeed_internals.bf16_partitions(optimizer))


def _fp32_part(parameter: torch.nn.Parameter, optimizer: Any, rank: int) -> Place | None:
    return deepspeed_internals.place_in_group(parameter, deepspeed_internals.fp32_partitions(optimizer))


def _itself(parameter: torch.nn.Parameter, optimizer: Any) -> torch.Tensor:
    return parameter


def _first_bf16(parameter: torch.nn.Parameter, optimizer: Any) -> torch.Tensor:
    """Return the partition of Muon's group: the first one (jobs/worker/optimizers.py)."""
    return deepspeed_internals.bf16_partitions(optimizer)[0]


def _first_fp32(parameter: torch.nn.Parameter, optimizer: Any) -> torch.Tensor:
    return deepspeed_internals.fp32_partitions(optimizer)[0]


LAYOUTS: Mapping[tuple[int, str], Layout] = {
    (0, "AdamW"): Layout(_whole, torch.nn.Parameter.numel, _itself, partitioned=False),
    (0, "MuonAndAdamW"): Layout(_whole, torch.nn.Parameter.numel, _itself, partitioned=False),
    (1, "BF16_Optimizer"): Layout(_bf16_part, torch.nn.Parameter.numel, _first_bf16),
    (1, "DeepSpeedZeroOptimizer"): Layout(_fp32_part, torch.nn.Parameter.numel, _first_fp32),
    (2, "DeepSpeedZeroOptimizer"): Layout(_fp32_part, torch.nn.Parameter.numel, _first_fp32),
    (3, "DeepSpeedZeroOptimizer_Stage3"): Layout(
        deepspeed_internals.place_in_parts, deepspeed_internals.whole_numel, deepspeed_internals.flat_of_parts
    ),
}
"""By ZeRO stage and class of DeepSpeed's optimizer. Stage 1 has two: in bf16 with fp32 gradient sums, and otherwise."""


def choose(stage: int, optimizer: Any) -> Layout:
    """Return the layout of an engine's state.

    Raises:
        UserError: none is known, so that no checkpoint of it could be trusted.
    """
    found = type(optimizer).__name__
    if (stage, found) not in LAYOUTS:
        known = "; ".join(f"stage {known_stage} with {name}" for known_stage, name in LAYOUTS)
        raise UserError(
            f"training.deepspeed: ZeRO stage {stage} with DeepSpeed's {found} is no layout that Tandem can save "
            f"(known: {known}); remove what asks for it from your DeepSpeed JSON, or choose another stage"
        )
    return LAYOUTS[stage, found]


def trainable(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield the parameters that are trained, by name; one that has two names comes once."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def view(place: Place, flat: torch.Tensor) -> torch.Tensor:
    """Return the elements of a place in `flat`: the optimizer's tensor itself or a state of the same shape. 1-D."""
    return flat.detach().view(-1)[place.offset : place.offset + place.numel]


def check_sums(held: Mapping[str, int], expected: Mapping[str, int], where: str) -> None:
    """Compare the elements that all ranks hold together with the model's, by parameter.

    Raises:
        UserError: they differ, so a checkpoint would not be the model. `where`: stage and optimizer, for the message.
    """
    wrong = [
        f"{name} has {held.get(name, 0)} of {numel}" for name, numel in expected.items() if held.get(name) != numel
    ]
    if wrong:
        raise UserError(
            f"training.deepspeed: {where} does not hold the model: of its elements, {'; '.join(wrong[:3])}"
            f"{f' (and {len(wrong) - 3} more)' if len(wrong) > 3 else ''}; its checkpoints would not be the model, so "
            "choose another stage, or remove from your DeepSpeed JSON what moves the state elsewhere"
        )
