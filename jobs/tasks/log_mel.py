"""Log-mel spectrograms in torch: the Fourier transform as a product with a matrix, so that it runs on any device.

Windows of 25 ms every 10 ms, Hann, power, triangular filters on the HTK mel scale, natural logarithm; then the mean of
each filter over the recording is taken off, and all is divided by the recording's deviation. So neither the level nor
the colour of a microphone counts, and nothing has to be learned.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

WINDOW_S, HOP_S = 0.025, 0.010
FLOOR = 1e-8
"""Least power: the logarithm of digital silence is finite."""


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
    transform, filters = (torch.from_numpy(each).to(waveform.device) for each in _matrices(rate, bins))
    window = transform.shape[0]
    padded = torch.nn.functional.pad(waveform.float(), (window // 2, window - window // 2))
    pieces = padded.unfold(1, window, hop(rate))
    real, imaginary = (pieces @ transform).chunk(2, dim=-1)
    powers = ((real.square() + imaginary.square()) @ filters).clamp(min=FLOOR).log()
    seen = within(frames(samples, rate), powers.shape[1]).unsqueeze(-1)
    return normalised(powers, seen)


def within(lengths: torch.Tensor, most: int) -> torch.Tensor:
    """Return which of `most` places lie within lengths (B,): (B, most) bool."""
    return torch.arange(most, device=lengths.device) < lengths.unsqueeze(1)


def normalised(powers: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Take each filter's mean off (B, F, M), and divide by the deviation of all; `seen` (B, F, 1) is what counts."""
    count = seen.sum(1, keepdim=True)
    centred = (powers - (powers * seen).sum(1, keepdim=True) / count) * seen
    variance = centred.square().sum((1, 2), keepdim=True) / (count * powers.shape[2])
    return centred / (variance + 1e-5).sqrt()


@lru_cache(maxsize=8)
def _matrices(rate: int, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the windowed transform (W, 2 S), cosines beside sines, and the filters (S, bins), float32."""
    window = round(rate * WINDOW_S)
    size = 1 << (window - 1).bit_length()
    spectrum = size // 2 + 1
    angles = 2 * np.pi * np.outer(np.arange(window), np.arange(spectrum)) / size
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    transform = hann[:, None] * np.concatenate([np.cos(angles), np.sin(angles)], 1)
    return transform.astype(np.float32), _filters(rate, spectrum, bins).astype(np.float32)


def _filters(rate: int, spectrum: int, bins: int) -> np.ndarray:
    """Return triangles (spectrum, bins) between 20 Hz and half the rate, evenly spaced in mel."""
    mel = np.linspace(*(2595 * np.log10(1 + np.array([20, rate / 2]) / 700)), bins + 2)
    edges = 700 * (10 ** (mel / 2595) - 1)
    frequencies = np.linspace(0, rate / 2, spectrum)[:, None]
    rising = (frequencies - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequencies) / (edges[2:] - edges[1:-1])
    return np.maximum(0, np.minimum(rising, falling))
