"""Log-mel spectrograms in torch alone, on any device.

Windows of 25 ms every 10 ms, Hann, power, triangular filters on the HTK mel scale, natural logarithm. What lies more
than 9 nats (39 dB) below the loudest cell is raised to that: it is the room, not the voice. Then the recording's mean
is taken off, and all is divided by its deviation, so that its level does not count and nothing has to be learned. The
mean of each filter by itself stays: of a word as short as a digit, it says which one.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

WINDOW_S, HOP_S = 0.025, 0.010
FLOOR = 1e-8
"""Least power: the logarithm of digital silence is finite."""
RANGE = 9.0
"""From the loudest cell of a recording down, in nats."""


def hop(rate: int) -> int:
    """Return the samples from one frame to the next."""
    return round(rate * HOP_S)


def frames(samples: torch.Tensor, rate: int) -> torch.Tensor:
    """Return how many frames recordings of so many samples (B,) int64 have, (B,) int64."""
    return samples // hop(rate) + 1


def log_mel(waveform: torch.Tensor, samples: torch.Tensor, rate: int, bins: int) -> torch.Tensor:
    """Return spectrograms (B, F, bins) fp32, 0 behind each recording's end.

    Args:
        waveform: (B, T) fp32, of -1 to 1, 0 behind the end.
        samples: (B,) int64, how long each is.
    """
    window, filters = (torch.from_numpy(each).to(waveform.device) for each in _constants(rate, bins))
    width = len(window)
    padded = torch.nn.functional.pad(waveform.float(), (width // 2, width - width // 2))
    pieces = padded.unfold(1, width, hop(rate)) * window
    spectrum = torch.view_as_real(torch.fft.rfft(pieces, n=2 * (len(filters) - 1)))
    powers = (spectrum.square().sum(-1) @ filters).clamp(min=FLOOR).log()
    seen = within(frames(samples, rate), powers.shape[1]).unsqueeze(-1)
    return normalised(powers, seen)


def within(lengths: torch.Tensor, most: int) -> torch.Tensor:
    """Return which of `most` places lie within lengths (B,): (B, most) bool."""
    return torch.arange(most, device=lengths.device) < lengths.unsqueeze(1)


def normalised(powers: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Bring log powers (B, F, M) to mean 0 and deviation 1 within their range; `seen` (B, F, 1) is what counts."""
    loudest = powers.masked_fill(~seen, -torch.inf).amax((1, 2), keepdim=True)
    powers = powers.clamp(min=loudest - RANGE)
    count = seen.sum(1, keepdim=True) * powers.shape[2]
    centred = (powers - (powers * seen).sum((1, 2), keepdim=True) / count) * seen
    return centred / (centred.square().sum((1, 2), keepdim=True) / count + 1e-5).sqrt()


@lru_cache(maxsize=8)
def _constants(rate: int, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the window (W,) and the filters (S, bins), float32; W rounded up to a power of two is 2 (S - 1)."""
    width = round(rate * WINDOW_S)
    size = 1 << (width - 1).bit_length()
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(width) / width)
    return hann.astype(np.float32), _filters(rate, size // 2 + 1, bins).astype(np.float32)


def _filters(rate: int, spectrum: int, bins: int) -> np.ndarray:
    """Return triangles (spectrum, bins) between 20 Hz and half the rate, evenly spaced in mel."""
    mel = np.linspace(*(2595 * np.log10(1 + np.array([20, rate / 2]) / 700)), bins + 2)
    edges = 700 * (10 ** (mel / 2595) - 1)
    frequencies = np.linspace(0, rate / 2, spectrum)[:, None]
    rising = (frequencies - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequencies) / (edges[2:] - edges[1:-1])
    return np.maximum(0, np.minimum(rising, falling))
