"""Networks that hear: recordings in, a distribution over symbols for every 40 ms out, to be trained by CTC.

`conv-transformer`: two convolutions that keep every fourth frame, then transformer blocks with a depthwise convolution
in each. `crnn`: the same convolutions, then bidirectional recurrent layers (GRU). What stands behind a recording's end
is 0 between all layers, so that an answer does not depend on what it is batched with.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.modeling_outputs import CausalLMOutput

from jobs.tasks import log_mel, perturbation
from jobs.tasks.own_model import OwnModel

STRIDE = 4
"""Frames of the spectrogram to one of the answer."""


class _Config(PretrainedConfig):
    """What both networks' configs have."""

    def __init__(
        self,
        vocab_size: int = 32,
        sample_rate: int = 16_000,
        num_mel_bins: int = 40,
        hidden_size: int = 144,
        num_hidden_layers: int = 4,
        dropout: float = 0.1,
        mask_bands: int = 2,
        mask_band_width: int = 8,
        mask_spans: int = 2,
        mask_span_share: float = 0.15,
        **kwargs: Any,
    ) -> None:
        self.vocab_size, self.sample_rate, self.num_mel_bins = vocab_size, sample_rate, num_mel_bins
        self.hidden_size, self.num_hidden_layers, self.dropout = hidden_size, num_hidden_layers, dropout
        self.mask_bands, self.mask_band_width = mask_bands, mask_band_width
        self.mask_spans, self.mask_span_share = mask_spans, mask_span_share
        super().__init__(**kwargs)


class ConvTransformerConfig(_Config):
    """Beside what both have: heads of attention, width of the feed-forward layers, kernel of the convolutions."""

    model_type = "conv-transformer"

    def __init__(
        self, num_attention_heads: int = 4, intermediate_size: int = 576, conv_kernel: int = 7, **kwargs: Any
    ) -> None:
        self.num_attention_heads, self.intermediate_size = num_attention_heads, intermediate_size
        self.conv_kernel = conv_kernel
        super().__init__(**kwargs)


class CrnnConfig(_Config):
    """hidden_size: of both directions together."""

    model_type = "crnn"

    def __init__(self, hidden_size: int = 192, num_hidden_layers: int = 2, **kwargs: Any) -> None:
        super().__init__(hidden_size=hidden_size, num_hidden_layers=num_hidden_layers, **kwargs)


class _Hearing(OwnModel):
    """What both networks share: the spectrogram, the convolutions, and the symbols."""

    main_input_name = "input_values"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.first = torch.nn.Conv1d(config.num_mel_bins, width, 3, stride=2, padding=1)
        self.second = torch.nn.Conv1d(width, width, 3, stride=2, padding=1)
        self.norm = torch.nn.LayerNorm(width)
        self.dropout = torch.nn.Dropout(config.dropout)

    def frames(self, samples: torch.Tensor) -> torch.Tensor:
        """Return how many frames the answers to recordings of so many samples (B,) have, (B,) int64."""
        return -(-log_mel.frames(samples, self.config.sample_rate) // STRIDE)

    def heard(self, input_values: torch.Tensor, samples: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the convolutions make of recordings, (B, F, H), and which frames are within them, (B, F) bool."""
        config, dtype = self.config, self.first.weight.dtype
        mel = log_mel.log_mel(input_values, samples, config.sample_rate, config.num_mel_bins)
        count = log_mel.frames(samples, config.sample_rate)
        if self.training:
            masks = config.mask_bands, config.mask_band_width, config.mask_spans, config.mask_span_share
            mel = perturbation.masked(mel, count, *masks)
        states = mel.to(dtype).transpose(1, 2)
        for convolution in (self.first, self.second):
            count = -(-count // 2)
            states = torch.nn.functional.gelu(convolution(states))
            states = states * log_mel.within(count, states.shape[2]).unsqueeze(1)
        return self.dropout(self.norm(states.transpose(1, 2))), log_mel.within(count, states.shape[2])


class ConvTransformer(_Hearing):
    """input_values (B, T) fp32, samples (B,) int64 → logits (B, F, symbols)."""

    config_class = ConvTransformerConfig

    def __init__(self, config: ConvTransformerConfig) -> None:
        super().__init__(config)
        if config.hidden_size % (2 * config.num_attention_heads):
            raise ValueError(
                f"hidden_size {config.hidden_size} is no multiple of twice num_attention_heads "
                f"({config.num_attention_heads})"
            )
        if config.conv_kernel % 2 == 0:
            raise ValueError(f"conv_kernel {config.conv_kernel} must be odd")
        self.blocks = torch.nn.ModuleList(_Block(config) for _ in range(config.num_hidden_layers))
        self.last_norm = torch.nn.LayerNorm(config.hidden_size)
        self.head = torch.nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(self, input_values: torch.Tensor, samples: torch.Tensor, **_: Any) -> CausalLMOutput:
        """Return logits (B, F, symbols) of recordings, `frames(samples)` of them to be used."""
        states, seen = self.heard(input_values, samples)
        states = states + _positions(states)
        for block in self.blocks:
            states = block(states, seen)
        return CausalLMOutput(logits=self.head(self.last_norm(states)))


class _Block(torch.nn.Module):
    """Attention, a depthwise convolution and a feed-forward layer, each normalised before and added."""

    def __init__(self, config: ConvTransformerConfig) -> None:
        super().__init__()
        width, kernel = config.hidden_size, config.conv_kernel
        self.heads, self.rate = config.num_attention_heads, config.dropout
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(width) for _ in range(3))
        self.qkv = torch.nn.Linear(width, 3 * width)
        self.out = torch.nn.Linear(width, width)
        self.local = torch.nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.up = torch.nn.Linear(width, config.intermediate_size)
        self.down = torch.nn.Linear(config.intermediate_size, width)
        self.dropout = torch.nn.Dropout(config.dropout)

    def forward(self, states: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Transform states (B, F, H); `seen` (B, F) says which frames are within a recording."""
        states = states + self.dropout(self.out(self._attended(self.norms[0](states), seen)))
        inside = (self.norms[1](states) * seen.unsqueeze(-1)).transpose(1, 2)
        states = states + self.dropout(torch.nn.functional.gelu(self.local(inside)).transpose(1, 2))
        hidden = torch.nn.functional.gelu(self.up(self.norms[2](states)))
        return states + self.dropout(self.down(hidden))

    def _attended(self, states: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        batch, time, width = states.shape
        parts = self.qkv(states).view(batch, time, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mask = seen[:, None, None, :]
        rate = self.rate if self.training else 0.0
        attended = torch.nn.functional.scaled_dot_product_attention(*parts, attn_mask=mask, dropout_p=rate)
        return attended.transpose(1, 2).reshape(batch, time, width)


class Crnn(_Hearing):
    """input_values (B, T) fp32, samples (B,) int64 → logits (B, F, symbols)."""

    config_class = CrnnConfig

    def __init__(self, config: CrnnConfig) -> None:
        super().__init__(config)
        if config.hidden_size % 2:
            raise ValueError(f"hidden_size {config.hidden_size} must be even: each direction has half of it")
        self.layers = torch.nn.ModuleList(
            torch.nn.GRU(config.hidden_size, config.hidden_size // 2, batch_first=True, bidirectional=True)
            for _ in range(config.num_hidden_layers)
        )
        self.head = torch.nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(self, input_values: torch.Tensor, samples: torch.Tensor, **_: Any) -> CausalLMOutput:
        """Return logits (B, F, symbols) of recordings, `frames(samples)` of them to be used."""
        states, seen = self.heard(input_values, samples)
        lengths, total = seen.sum(1).cpu(), states.shape[1]
        for layer in self.layers:
            packed = torch.nn.utils.rnn.pack_padded_sequence(states, lengths, batch_first=True, enforce_sorted=False)
            states, _ends = torch.nn.utils.rnn.pad_packed_sequence(
                layer(packed)[0], batch_first=True, total_length=total
            )
            states = self.dropout(states)
        return CausalLMOutput(logits=self.head(states))


def _positions(states: torch.Tensor) -> torch.Tensor:
    """Return sines and cosines (F, H) that tell the frames of states (B, F, H) apart."""
    time, width = states.shape[1:]
    rates = torch.exp(torch.arange(0, width, 2, device=states.device) * (-math.log(10_000.0) / width))
    angles = torch.arange(time, device=states.device).unsqueeze(1) * rates
    return torch.cat([angles.sin(), angles.cos()], 1).to(states.dtype)
