"""Networks for tables: `mlp`, residual blocks over numbers and embedded categories, and `ft-transformer`.

`mlp` has beside its blocks a straight linear way from the inputs to the answer (Cheng et al. 2016, arXiv:1606.07792),
so that what is linear need not be learned by the blocks. FT-Transformer: Gorishniy et al. 2021 (arXiv:2106.11959).
Both may see numbers through periodic functions whose frequencies are learned (Gorishniy et al. 2022, arXiv:2203.05556).

A missing number is 0 with a mark beside it, for which a weight is learned; a missing category and one that is unknown
have vectors of their own. The unknown one is learned from categories that are hidden at random while training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional
from transformers import PretrainedConfig
from transformers.modeling_outputs import SequenceClassifierOutput

from jobs.tasks.own_model import OwnModel

UNKNOWN = 0
"""The number of a category that training has not seen (jobs/tasks/table_columns.py)."""


class MlpConfig(PretrainedConfig):
    """hidden_size and layers: of the residual blocks. embedding_size: of a category's vector. frequencies: of the
    periodic functions of each number, 0 for the plain number; numeric_size: what these become; frequency_scale: the
    deviation with which they are drawn. hide_categories: the share that is hidden while training."""

    model_type = "mlp"

    def __init__(
        self,
        numbers: int = 1,
        categories: Sequence[int] = (),
        outputs: int = 1,
        hidden_size: int = 128,
        layers: int = 2,
        dropout: float = 0.1,
        embedding_size: int = 16,
        frequencies: int = 8,
        frequency_scale: float = 0.1,
        numeric_size: int = 8,
        hide_categories: float = 0.02,
        **kwargs: Any,
    ) -> None:
        self.numbers, self.categories, self.outputs = numbers, list(categories), outputs
        self.hidden_size, self.layers, self.dropout = hidden_size, layers, dropout
        self.embedding_size, self.hide_categories = embedding_size, hide_categories
        self.frequencies, self.frequency_scale, self.numeric_size = frequencies, frequency_scale, numeric_size
        super().__init__(**kwargs)


class FtTransformerConfig(PretrainedConfig):
    """hidden_size: of a column's token. frequencies and hide_categories: as of `mlp`."""

    model_type = "ft-transformer"

    def __init__(
        self,
        numbers: int = 1,
        categories: Sequence[int] = (),
        outputs: int = 1,
        hidden_size: int = 64,
        layers: int = 2,
        heads: int = 4,
        intermediate_size: int = 128,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        frequencies: int = 0,
        frequency_scale: float = 0.1,
        hide_categories: float = 0.02,
        **kwargs: Any,
    ) -> None:
        self.numbers, self.categories, self.outputs = numbers, list(categories), outputs
        self.hidden_size, self.layers, self.heads = hidden_size, layers, heads
        self.intermediate_size, self.dropout, self.attention_dropout = intermediate_size, dropout, attention_dropout
        self.frequencies, self.frequency_scale, self.hide_categories = frequencies, frequency_scale, hide_categories
        if hidden_size % heads:
            raise ValueError(f"hidden_size {hidden_size} is no multiple of heads {heads}")
        super().__init__(**kwargs)


class Periodic(torch.nn.Module):
    """Numbers (B, C) → ReLU of a linear map of their sines and cosines, for each number its own, (B, C, E)."""

    def __init__(self, numbers: int, frequencies: int, scale: float, size: int) -> None:
        super().__init__()
        self.scale = scale
        self.frequency = torch.nn.Parameter(torch.empty(numbers, frequencies))
        self.weight = torch.nn.Parameter(torch.empty(numbers, 2 * frequencies, size))
        self.offset = torch.nn.Parameter(torch.empty(numbers, size))

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return (B, C, E) of numbers (B, C)."""
        angles = 2 * math.pi * self.frequency * numbers[..., None]
        waves = torch.cat([angles.cos(), angles.sin()], -1)
        return functional.relu(torch.einsum("bcf,cfe->bce", waves, self.weight) + self.offset)

    def draw(self) -> None:
        """Draw fresh weights."""
        torch.nn.init.normal_(self.frequency, std=self.scale)
        torch.nn.init.normal_(self.weight, std=1 / math.sqrt(self.weight.shape[1]))
        torch.nn.init.zeros_(self.offset)


class Categories(torch.nn.Module):
    """Categories (B, K) → a vector for each, (B, K, E), out of one table; some are hidden while training."""

    def __init__(self, sizes: Sequence[int], width: int, hidden: float) -> None:
        super().__init__()
        self.hidden = hidden
        self.starts = [sum(sizes[:at]) for at in range(len(sizes))]
        self.table = torch.nn.Embedding(sum(sizes), width)

    def forward(self, categories: torch.Tensor) -> torch.Tensor:
        """Return (B, K, E) of the numbers of categories (B, K) int64, each column counted from 0."""
        if self.training and self.hidden:
            drawn = torch.rand(categories.shape, device=categories.device) < self.hidden
            categories = categories.masked_fill(drawn, UNKNOWN)
        return self.table(categories + torch.tensor(self.starts).to(categories.device, non_blocking=True))


class Block(torch.nn.Module):
    """(B, H) → (B, H): x + f(x), f with a normalised input and two linear layers."""

    def __init__(self, size: int, dropout: float) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(size)
        self.widen = torch.nn.Linear(size, 2 * size)
        self.narrow = torch.nn.Linear(2 * size, size)
        self.dropout = torch.nn.Dropout(dropout)

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        """Return the next state (B, H)."""
        inner = self.dropout(functional.gelu(self.widen(self.norm(state))))
        return state + self.dropout(self.narrow(inner))


class TableModel(OwnModel):
    """What both networks share: fresh weights."""

    def get_input_embeddings(self) -> torch.nn.Module:
        """Return the first layer with a weight, as transformers asks for it where it quantises."""
        kinds = (torch.nn.Linear, torch.nn.Embedding)
        return next(module for module in self.modules() if isinstance(module, kinds))

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Draw linear layers by the number of their inputs: these networks are too small for BERT's 0.02."""
        if isinstance(module, Periodic | Tokens):
            module.draw()
        elif isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_features))
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
        elif isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight, std=0.1)


class Mlp(TableModel):
    """numbers and missing (B, C), categories (B, K) → logits (B, outputs)."""

    config_class = MlpConfig

    def __init__(self, config: MlpConfig) -> None:
        super().__init__(config)
        width = (2 * config.numbers) + config.embedding_size * len(config.categories)
        self.periodic = None
        if config.frequencies and config.numbers:
            self.periodic = Periodic(config.numbers, config.frequencies, config.frequency_scale, config.numeric_size)
            width += config.numbers * config.numeric_size
        self.embedded = None
        if config.categories:
            self.embedded = Categories(config.categories, config.embedding_size, config.hide_categories)
        self.first = torch.nn.Linear(width, config.hidden_size)
        self.blocks = torch.nn.ModuleList(Block(config.hidden_size, config.dropout) for _ in range(config.layers))
        self.norm = torch.nn.LayerNorm(config.hidden_size)
        self.dropout = torch.nn.Dropout(config.dropout)
        self.head = torch.nn.Linear(config.hidden_size, config.outputs)
        self.straight = torch.nn.Linear(width, config.outputs, bias=False)
        self.post_init()

    def forward(
        self,
        numbers: torch.Tensor | None = None,
        missing: torch.Tensor | None = None,
        categories: torch.Tensor | None = None,
        **_: Any,
    ) -> SequenceClassifierOutput:
        """Answer rows: scaled numbers and marks of the missing ones (B, C), numbers of categories (B, K) int64.

        Returns:
            logits (B, outputs).
        """
        parts = []
        if numbers is not None:
            parts += [numbers, torch.zeros_like(numbers) if missing is None else missing]
            if self.periodic is not None:
                parts.append(self.periodic(numbers).flatten(1))
        if categories is not None and self.embedded is not None:
            parts.append(self.embedded(categories).flatten(1))
        row = torch.cat(parts, 1)
        state = self.first(row)
        for block in self.blocks:
            state = block(state)
        state = self.dropout(functional.gelu(self.norm(state)))
        return SequenceClassifierOutput(logits=self.head(state) + self.straight(row))


class Tokens(torch.nn.Module):
    """Numbers (B, C) → a token for each (B, C, H): value · weight + bias, and a vector where it is missing."""

    def __init__(self, numbers: int, size: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(numbers, size))
        self.offset = torch.nn.Parameter(torch.empty(numbers, size))
        self.missing = torch.nn.Parameter(torch.empty(numbers, size))

    def forward(self, numbers: torch.Tensor, missing: torch.Tensor) -> torch.Tensor:
        """Return (B, C, H)."""
        return numbers[..., None] * self.weight + missing[..., None] * self.missing + self.offset

    def draw(self) -> None:
        """Draw fresh weights."""
        for parameter in (self.weight, self.offset, self.missing):
            torch.nn.init.normal_(parameter, std=1 / math.sqrt(parameter.shape[1]))


class Layer(torch.nn.Module):
    """(B, T, H) → (B, T, H): attention, then two linear layers with GELU, each behind a normalisation."""

    def __init__(self, config: FtTransformerConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.heads, self.attention_dropout = config.heads, config.attention_dropout
        self.before_attention, self.before_widen = torch.nn.LayerNorm(size), torch.nn.LayerNorm(size)
        self.attend, self.mix = torch.nn.Linear(size, 3 * size), torch.nn.Linear(size, size)
        self.widen = torch.nn.Linear(size, config.intermediate_size)
        self.narrow = torch.nn.Linear(config.intermediate_size, size)
        self.dropout = torch.nn.Dropout(config.dropout)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the next tokens (B, T, H)."""
        batch, length, size = tokens.shape
        parts = self.attend(self.before_attention(tokens)).view(batch, length, 3, self.heads, size // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        dropped = self.attention_dropout if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(query, key, value, dropout_p=dropped)
        tokens = tokens + self.dropout(self.mix(mixed.transpose(1, 2).reshape(batch, length, size)))
        return tokens + self.narrow(self.dropout(functional.gelu(self.widen(self.before_widen(tokens)))))


class FtTransformer(TableModel):
    """numbers and missing (B, C), categories (B, K) → logits (B, outputs), by attention between the columns."""

    config_class = FtTransformerConfig

    def __init__(self, config: FtTransformerConfig) -> None:
        super().__init__(config)
        size = config.hidden_size
        self.tokens = Tokens(config.numbers, size) if config.numbers else None
        self.periodic = None
        if config.frequencies and config.numbers:
            self.periodic = Periodic(config.numbers, config.frequencies, config.frequency_scale, size)
        self.embedded = None
        if config.categories:
            self.embedded = Categories(config.categories, size, config.hide_categories)
        self.answer = torch.nn.Embedding(1, size)
        self.layers = torch.nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = torch.nn.LayerNorm(size)
        self.head = torch.nn.Linear(size, config.outputs)
        self.post_init()

    def forward(
        self,
        numbers: torch.Tensor | None = None,
        missing: torch.Tensor | None = None,
        categories: torch.Tensor | None = None,
        **_: Any,
    ) -> SequenceClassifierOutput:
        """Answer rows, as `Mlp` does: logits (B, outputs)."""
        parts = []
        if numbers is not None and self.tokens is not None:
            marks = torch.zeros_like(numbers) if missing is None else missing
            tokens = self.tokens(numbers, marks)
            parts.append(tokens if self.periodic is None else tokens + self.periodic(numbers) * (1 - marks[..., None]))
        if categories is not None and self.embedded is not None:
            parts.append(self.embedded(categories))
        answer = self.answer.weight.expand(len(parts[0]), 1, -1)
        state = torch.cat([answer, *parts], 1)
        for layer in self.layers:
            state = layer(state)
        return SequenceClassifierOutput(logits=self.head(functional.gelu(self.norm(state[:, 0]))))
