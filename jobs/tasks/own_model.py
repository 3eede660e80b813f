"""The base of networks of ours: a transformers model in everything that saving, loading and quantising ask for."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel


class OwnModel(PreTrainedModel):
    """Derive from it, with `config_class` (whose `model_type` is the architecture's name), `__init__` and `forward`.

    `__init__` ends with `self.post_init()`. Normalise without running statistics (LayerNorm, GroupNorm), so that a
    result depends neither on the batch nor on the number of workers.
    """

    main_input_name = "inputs"
    _supports_sdpa = True

    def get_input_embeddings(self) -> torch.nn.Module:
        """Return the first layer with a weight, as transformers asks for it where it quantises."""
        return next(module for module in self.modules() if isinstance(getattr(module, "weight", None), torch.Tensor))

    def get_output_embeddings(self) -> None:
        """Return none: nothing is tied."""
        return None

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Draw linear layers and embeddings as BERT does (`initializer_range`, 0.02), convolutions by He."""
        deviation = float(getattr(self.config, "initializer_range", 0.02))
        if isinstance(module, torch.nn.Conv1d | torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            torch.nn.init.normal_(module.weight, std=deviation)
        bias: Any = getattr(module, "bias", None)
        if isinstance(module, torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Linear) and bias is not None:
            torch.nn.init.zeros_(bias)
        if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()
