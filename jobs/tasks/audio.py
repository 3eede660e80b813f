"""Recordings as numbers: files decoded, channels averaged, rates changed; what cannot be heard whole is refused.

One reader for training and endpoints. Bytes are decoded, never a name that came with a request.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from jobs.tasks import TaskError, ogg_pages

FORMATS = ("WAV", "WAVEX", "RF64", "FLAC", "OGG", "MP3")
"""Kinds of files that are decoded, by libsndfile's names."""
RATES = (1_000, 384_000)
"""Samples per second that are taken: a rate beyond is a broken header."""
MOST_TERMS = 1_000
"""Of the fraction by which a rate is changed: that of all usual rates has fewer."""
MOST_CHANNELS = 16
MOST_CHUNKS = 256
"""Of a WAV, so many are looked through for its data."""
LARGEST = 32_767
STREAMED = (0, 0xFFFFFFFF)
"""Sizes that a WAV has which was written to a pipe: how long it is was not known."""


FOLDERS = ("", "clips", "wavs")
"""Where, from its table's folder, a file may lie."""


@dataclass(frozen=True)
class About:
    """What the header of a recording says."""

    rate: int
    channels: int
    frames: int

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.frames / self.rate


@dataclass(frozen=True)
class Sound:
    """A recording of one channel, at the rate that was asked for."""

    samples: np.ndarray
    """(T,) float32, -1 to 1."""
    resampled: bool = False
    averaged: bool = False


def beside(table: Path, name: str) -> Path | None:
    """Return the file that a row of a table names; None where there is none."""
    places = [table.parent / folder / name for folder in FOLDERS]
    places += [place.with_name(f"{place.name}.wav") for place in places]
    return next((place for place in places if place.is_file()), None)


def content_of(value: Any) -> bytes | tuple[np.ndarray, int]:
    """Return what an example's column holds of a recording: a file's bytes, or samples (T,) and their rate.

    Args:
        value: bytes, the path of a file, or what `datasets` writes: a mapping with `bytes`, `path`, or `array` and
            `sampling_rate`.

    Raises:
        TaskError: none of these, or the file cannot be read.
    """
    if isinstance(value, Mapping):
        if value.get("array") is not None:
            return _samples_of(value)
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str | Path) and str(value):
        try:
            return Path(value).read_bytes()
        except OSError as error:
            raise TaskError(f"cannot read the recording {str(value)!r}: {error.strerror}") from error
    if isinstance(value, bytes) and value:
        return value
    raise TaskError(f"this is no recording: {value!r:.60}; it is a file's bytes, its path, or samples with their rate")


def _samples_of(value: Mapping[str, Any]) -> tuple[np.ndarray, int]:
    rate, samples = value.get("sampling_rate"), np.asarray(value["array"])
    if not isinstance(rate, int | np.integer) or isinstance(rate, bool):
        raise TaskError(f"the samples' sampling_rate is {rate!r:.40}: it is a whole number of samples per second")
    if samples.ndim not in (1, 2) or samples.dtype.kind not in "fiu":
        raise TaskError(
            f"the samples have the shape {samples.shape} and are {samples.dtype}: they are numbers, (T,) or "
            "(T, channels)"
        )
    return samples.astype(np.float32), int(rate)


def about(content: bytes | tuple[np.ndarray, int]) -> About:
    """Return what a recording's header says, without decoding it; of samples (T,) or (T, channels), what they are.

    Raises:
        TaskError: it is no sound file of a kind that is read, is cut off, or holds nothing.
    """
    if isinstance(content, tuple):
        samples, rate = content
        channels = samples.shape[1] if samples.ndim == 2 else 1
        return _checked(About(rate, channels, len(samples)))
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            if file.format not in FORMATS:
                raise TaskError(f"a {file.format} file; recordings are read as {', '.join(FORMATS)}")
            found = About(file.samplerate, file.channels, file.frames)
    except (soundfile.LibsndfileError, RuntimeError, TypeError) as error:
        raise TaskError(f"no sound file that can be read: {_said(error)}") from error
    if _cut_off(content):
        raise TaskError("the sound file is cut off: its header names more samples than there are")
    if content[:4] == b"OggS" and (wrong := ogg_pages.fault(content)) is not None:
        raise TaskError(wrong)
    return _checked(found)


def sound(content: bytes | tuple[np.ndarray, int], rate: int, most_s: float | None = None) -> Sound:
    """Decode a recording to one channel, (T,) float32, at `rate` samples per second.

    Args:
        most_s: longer ones are refused before they are decoded: a small file can hold hours of silence.

    Raises:
        TaskError: it cannot be decoded whole, is too long, or holds numbers that are not finite.
    """
    said = about(content)
    if most_s is not None and said.seconds > most_s + 1e-3:
        raise TaskError(f"the recording is {said.seconds:.2f} s long, and at most {most_s:.2f} s are taken")
    samples = _decoded(content, said)
    if not np.isfinite(samples).all():
        raise TaskError("the recording holds samples that are not finite")
    samples = samples.mean(1) if samples.ndim == 2 else samples
    samples = samples / max(1.0, float(np.abs(samples).max()))
    return Sound(_at(samples, said.rate, rate).astype(np.float32), said.rate != rate, said.channels > 1)


def heard(content: bytes | tuple[np.ndarray, int], rate: int, most_s: float | None = None) -> Sound:
    """Return what `sound` does, (T,) float32, in the 16 bits in which it is learned, wherever a recording comes in.

    Raises:
        TaskError: as there.
    """
    found = sound(content, rate, most_s)
    return replace(found, samples=whole(found.samples).astype(np.float32) / LARGEST)


def whole(samples: np.ndarray) -> np.ndarray:
    """Return samples (T,) float32 of -1 to 1 as int16."""
    return np.round(np.clip(samples, -1, 1) * LARGEST).astype(np.int16)


def _decoded(content: bytes | tuple[np.ndarray, int], said: About) -> np.ndarray:
    if isinstance(content, tuple):
        return np.asarray(content[0], np.float32)
    import soundfile

    try:
        samples, _ = soundfile.read(io.BytesIO(content), frames=said.frames, dtype="float32")
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise TaskError(f"the sound file is broken: {_said(error)}") from error
    if len(samples) < said.frames:
        raise TaskError(f"the sound file is cut off: {len(samples)} of the {said.frames} samples that its header names")
    return np.asarray(samples)


def _at(samples: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    if rate == wanted:
        return samples
    from scipy.signal import resample_poly

    # Filters grow with the fraction's terms: of odd rates the closest that is cheap is off by less than 1 in 10,000.
    ratio = Fraction(wanted, rate).limit_denominator(MOST_TERMS)
    return np.clip(resample_poly(samples, ratio.numerator, ratio.denominator), -1, 1)


def _checked(found: About) -> About:
    if not RATES[0] <= found.rate <= RATES[1]:
        raise TaskError(f"a recording of {found.rate} samples per second; {RATES[0]} to {RATES[1]} are taken")
    if found.channels > MOST_CHANNELS:
        raise TaskError(f"a recording of {found.channels} channels; at most {MOST_CHANNELS} are taken")
    if not found.frames:
        raise TaskError("the recording holds no sound, or is cut off")
    return found


def _cut_off(content: bytes) -> bool:
    """Tell whether a WAV's data are fewer bytes than its header says: libsndfile reads what is there, and says nothing.

    One that was written to a pipe says no length, and ends where it ends.
    """
    at = 12
    for _ in range(MOST_CHUNKS if content[:4] == b"RIFF" else 0):
        size = int.from_bytes(content[at + 4 : at + 8], "little")
        if at + 8 > len(content) or content[at : at + 4] == b"data":
            return at + 8 <= len(content) and size not in STREAMED and at + 8 + size > len(content)
        at += 8 + size + size % 2
    return False


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
