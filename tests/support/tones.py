"""Speech for tests: each letter is a tone of its own, each voice shifts all of them, pauses lie between."""

from __future__ import annotations

import io
import wave
from pathlib import Path

import numpy as np

RATE = 8_000
PITCHES = {"a": 400.0, "b": 900.0, "c": 1_600.0, " ": 0.0}


def spoken(text: str, voice: float = 1.0, draw: np.random.Generator | None = None, rate: int = RATE) -> np.ndarray:
    """Return samples (T,) float32 of a text: 0.12 s a letter, 0.06 s of pause before each and at the end."""
    draw = draw or np.random.default_rng(0)
    pause = np.zeros(int(0.06 * rate))
    pieces = [pause]
    for letter in text:
        time = np.arange(int(0.12 * rate)) / rate
        pieces += [0.4 * np.sin(2 * np.pi * PITCHES[letter] * voice * time), pause]
    samples = np.concatenate(pieces)
    return (samples + 0.005 * draw.standard_normal(len(samples))).astype(np.float32)


def wav(samples: np.ndarray, rate: int = RATE) -> bytes:
    """Return samples (T,) or (T, channels) of -1 to 1 as a WAV file of 16 bits."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(np.round(np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    return file.getvalue()


def flac(samples: np.ndarray, rate: int = RATE) -> bytes:
    """Return samples (T,) as a FLAC file."""
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="FLAC")
    return file.getvalue()


def write(folder: Path, texts: list[str], voices: dict[str, float], takes: int = 1) -> None:
    """Write `{text}_{voice}_{take}.wav` files."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    for text in texts:
        for name, voice in voices.items():
            for take in range(takes):
                sound = spoken(text, voice * draw.uniform(0.97, 1.03), draw)
                (folder / f"{text}_{name}_{take}.wav").write_bytes(wav(sound))
