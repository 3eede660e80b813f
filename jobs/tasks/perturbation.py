"""Recordings as they might have been spoken otherwise: faster or slower, in noise, with parts of the spectrum missing.

All draws are torch's own, on the device of what is drawn for, so that a seeded step draws the same again.
"""

from __future__ import annotations

import torch


def at_other_speed(waveform: torch.Tensor, samples: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Play each recording faster or slower by a factor of its own, 1 - share to 1 + share; its pitch goes with it.

    Ko et al. 2015, Audio Augmentation for Speech Recognition; here by linear interpolation.

    Args:
        waveform: (B, T) fp32, 0 behind the end.
        samples: (B,) int64, how long each is.

    Returns:
        (B, T') fp32 and (B,) int64, the same of what was made.
    """
    factors = 1 + share * (2 * torch.rand(len(samples), device=waveform.device) - 1)
    lengths = (samples / factors).floor().long().clamp(min=1)
    at = torch.arange(int(lengths.max()), device=waveform.device) * factors.unsqueeze(1)
    below = at.floor().long()
    whole = torch.nn.functional.pad(waveform, (0, 2))
    limit = whole.shape[1] - 1
    first = whole.gather(1, below.clamp(max=limit))
    second = whole.gather(1, (below + 1).clamp(max=limit))
    played = first + (at - below) * (second - first)
    return played * (torch.arange(played.shape[1], device=waveform.device) < lengths.unsqueeze(1)), lengths


def in_noise(waveform: torch.Tensor, samples: torch.Tensor, most: float) -> torch.Tensor:
    """Add white noise to recordings (B, T), of a level of its own for each: 0 to `most` of the recording's own."""
    inside = torch.arange(waveform.shape[1], device=waveform.device) < samples.unsqueeze(1)
    level = (waveform.square().sum(1) / samples).sqrt() * most * torch.rand(len(samples), device=waveform.device)
    return waveform + torch.randn_like(waveform) * level.unsqueeze(1) * inside


def masked(
    spectrograms: torch.Tensor, frames: torch.Tensor, bands: int, band_width: int, spans: int, span_share: float
) -> torch.Tensor:
    """Blank out bands of frequency and spans of time: SpecAugment (Park et al. 2019, arXiv:1904.08779).

    Args:
        spectrograms: (B, F, M), of mean 0.
        frames: (B,) int64, how long each is.
        bands, band_width: so many bands, each of 0 to `band_width` filters.
        spans, span_share: so many spans, each of 0 to `span_share` of the recording's frames.
    """
    time, height = spectrograms.shape[1:]
    kept = torch.ones_like(spectrograms, dtype=torch.bool)
    for _ in range(bands):
        width = torch.full_like(frames, min(band_width, height))
        kept &= ~_drawn(width, torch.full_like(frames, height), height).unsqueeze(1)
    for _ in range(spans):
        kept &= ~_drawn((frames * span_share).long(), frames, time).unsqueeze(2)
    return spectrograms * kept


def _drawn(most: torch.Tensor, length: torch.Tensor, size: int) -> torch.Tensor:
    """Draw a stretch of 0 to `most` (B,) places for each row, somewhere within `length` (B,): (B, size) bool."""
    width = torch.rand(len(most), device=most.device) * (most + 1)
    width = width.floor()
    begin = (torch.rand(len(most), device=most.device) * (length - width + 1).clamp(min=0)).floor()
    at = torch.arange(size, device=most.device)
    return (at >= begin.unsqueeze(1)) & (at < (begin + width).unsqueeze(1))
