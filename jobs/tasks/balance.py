"""The loss that keeps a mixture's experts equally busy, where the model's config asks for it.

transformers adds it only when it computes the loss itself, from labels; Tandem computes its own from the logits, over
the targets of the global batch, so it is added here: coefficient * balancing loss of the micro-batch, weighted by the
micro-batch's targets. Source: W. Fedus et al., "Switch Transformers", 2021, equations 4 to 6.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jobs.tasks import TaskError

if TYPE_CHECKING:
    import torch

_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")
"""What configs call it."""
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def coefficient(config: Any) -> float | None:
    """Return the weight that a transformers config gives to its balancing loss; None where it has no such loss."""
    config = config.get_text_config()
    found = [getattr(config, name, None) for name in _COEFFICIENTS]
    return next((float(value) for value in found if value is not None), None)


def is_wanted(config: Any) -> bool:
    """Whether the config asks for the balancing loss, by the switch that transformers has for it."""
    return bool(getattr(config.get_text_config(), "output_router_logits", False))


def remark(config: Any) -> str | None:
    """Return what to say of how a mixture of experts is kept in balance, or is not; None of any other model."""
    text = config.get_text_config()
    weight = coefficient(config)
    if not any((getattr(text, name, None) or 0) > 1 for name in _EXPERTS) or not weight:
        return None
    if is_wanted(config):
        return (
            f"the training loss includes {weight:g} times a loss that keeps the experts equally busy, as the config "
            "says (output_router_logits); held-out losses do not"
        )
    return (
        "the experts are trained without a loss that keeps them equally busy, as the config says (model.config: "
        "{output_router_logits: true} adds it)"
    )


def added(config: Any, output: Any) -> torch.Tensor | float:
    """Return what a forward pass adds to the mean loss, a scalar: coefficient * balancing loss; 0 where none is wanted.

    Raises:
        TaskError: the config asks for it, and the model computes none or has no coefficient for it.
    """
    if not is_wanted(config):
        return 0.0
    loss, weight = getattr(output, "aux_loss", None), coefficient(config)
    if loss is None or weight is None:
        raise TaskError(
            "model.config: output_router_logits is true, but this architecture computes no balancing loss for its "
            "experts: leave it out"
        )
    return weight * loss
