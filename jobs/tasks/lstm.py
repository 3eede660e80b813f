"""A recurrent language model in the Hugging Face layout, so that it saves, loads and serves like any other.

An embedding, a stack of LSTM layers (Hochreiter and Schmidhuber 1997) with dropout on what is not recurrent (Zaremba et
al. 2014, arXiv:1409.2329), and a linear head that may share the embedding's weight. Its texts have no longest length:
what it knows of the tokens before is a state of one size.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, initialization
from transformers.modeling_outputs import CausalLMOutput

from jobs.tasks.own_model import OwnModel


class LstmConfig(PretrainedConfig):
    """hidden_size: the width of the embedding and of each layer; dropout: before, between and behind the layers."""

    model_type = "lstm"

    def __init__(
        self,
        vocab_size: int = 1024,
        hidden_size: int = 256,
        num_hidden_layers: int = 2,
        dropout: float = 0.1,
        initializer_range: float = 0.1,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.dropout = dropout
        self.initializer_range = initializer_range
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


class LstmForCausalLM(OwnModel, GenerationMixin):
    """input_ids (B, S) → logits (B, S, V), each row from an empty state: nothing is told of pieces within a row."""

    config_class = LstmConfig
    main_input_name = "input_ids"
    base_model_prefix = ""
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "embedding.weight"}

    def __init__(self, config: LstmConfig) -> None:
        super().__init__(config)
        layers, width = config.num_hidden_layers, config.hidden_size
        self.embedding = torch.nn.Embedding(config.vocab_size, width)
        self.dropout = torch.nn.Dropout(config.dropout)
        between = config.dropout if layers > 1 else 0.0
        self.lstm = torch.nn.LSTM(width, width, layers, batch_first=True, dropout=between)
        self.lm_head = torch.nn.Linear(width, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> CausalLMOutput:
        """Predict the next token of each place: logits (B, S, V).

        Args:
            input_ids: (B, S) int64.
            use_cache: what transformers' models are asked for; a state goes from call to call in `recur`.
        """
        hidden, _ = self.lstm(self.dropout(self.embedding(input_ids)))
        return CausalLMOutput(logits=self.lm_head(self.dropout(hidden)))

    @property
    def state_shape(self) -> tuple[int, ...]:
        """The shape of a text's state: what each layer shows and what its cells hold, (2, layers, hidden)."""
        return 2, self.config.num_hidden_layers, self.config.hidden_size

    def recur(
        self, input_ids: torch.Tensor, lengths: torch.Tensor, state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Read on in B texts, each from its own state; in evaluation mode.

        Args:
            input_ids: (B, T) int64, padded at the end.
            lengths: (B,) int64, on the CPU: how many of a row's tokens are the text's, 1 to T.
            state: (B, 2, layers, hidden); zeros where a text begins.

        Returns:
            What the head reads, (B, T, hidden), and the states behind each text's last token, shaped as `state`.
        """
        before = tuple(part.transpose(0, 1).contiguous() for part in state.unbind(1))
        embedded = self.embedding(input_ids)
        if input_ids.shape[1] == 1:
            hidden, after = self.lstm(embedded, before)
        else:
            packed = pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
            packed, after = self.lstm(packed, before)
            hidden, _ = pad_packed_sequence(packed, batch_first=True, total_length=input_ids.shape[1])
        return hidden, torch.stack([part.transpose(0, 1) for part in after], dim=1)

    def get_input_embeddings(self) -> torch.nn.Embedding:
        """Return the embedding."""
        return self.embedding

    def get_output_embeddings(self) -> torch.nn.Linear:  # type: ignore[override]  # other networks of ours have none
        """Return the head."""
        return self.lm_head

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Draw the layers as PyTorch does; forget gates begin open (Jozefowicz et al. 2015), other biases at 0."""
        super()._init_weights(module)
        if not isinstance(module, torch.nn.LSTM):
            return
        width = module.hidden_size
        for name, parameter in module.named_parameters():
            if "weight" in name:
                initialization.uniform_(parameter, -(width**-0.5), width**-0.5)
                continue
            values = torch.zeros(4 * width)
            values[width : 2 * width] = 1.0 if "_ih_" in name else 0.0  # the gates are input, forget, cell, output
            initialization.copy_(parameter, values)


def register() -> None:
    """Make `lstm` known to transformers' Auto classes. Safe to call again."""
    AutoConfig.register(LstmConfig.model_type, LstmConfig, exist_ok=True)
    AutoModelForCausalLM.register(LstmConfig, LstmForCausalLM, exist_ok=True)
