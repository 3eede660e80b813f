"""Speech models of transformers that are trained by CTC (wav2vec2, hubert, wavlm, …): checked, made, loaded, asked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.tasks import TaskError
from jobs.tasks.architectures import check_builds, close, config_for
from jobs.tasks.transcripts import of_hub

if TYPE_CHECKING:
    import torch

TABLE = "MODEL_FOR_CTC_MAPPING_NAMES"
"""The name of transformers' own table of the architectures that are trained by CTC."""
WAVEFORM = ("data2vec-audio", "hubert", "unispeech", "unispeech-sat", "wav2vec2", "wav2vec2-conformer", "wavlm")
"""Those of them that take samples as they are; the others want features that are made by code of their own."""
GENERATING = ("whisper", "speech_to_text", "speecht5", "moonshine", "speech-encoder-decoder", "kyutai_speech_to_text")
FRAME_S = 0.040
"""Longest frame of an answer: what a transcript needs of a recording is counted in these."""


def check(architecture: str) -> None:
    """Raise TaskError for an architecture that is not trained by CTC on samples."""
    if architecture in GENERATING:
        raise TaskError(
            f"model.architecture: {architecture!r} writes its answer token by token, and this task learns by CTC: "
            f"take {', '.join(WAVEFORM)}, or a network of ours"
        )
    if architecture not in WAVEFORM:
        raise TaskError(
            f"model.architecture: {architecture!r} is no speech model that is read here"
            f"{close(architecture, WAVEFORM)}; of transformers {', '.join(WAVEFORM)}"
        )


def check_model(architecture: str, config: Mapping[str, Any]) -> None:
    """Raise TaskError for what `build` would refuse."""
    from transformers import AutoModelForCTC

    check(architecture)
    whole = config_for(architecture, dict(config), TABLE, "CTC")
    check_builds(AutoModelForCTC, architecture, whole)


def check_stride(config: Any, rate: int) -> None:
    """Raise TaskError for a model whose frames are so long that no transcript is sure to fit into them."""
    stride = _product(config.conv_stride)
    if getattr(config, "add_adapter", False):
        stride *= config.adapter_stride**config.num_adapter_layers
    if stride > FRAME_S * rate:
        raise TaskError(
            f"the model makes one frame of {stride} samples, {1000 * stride / rate:.0f} ms at {rate} samples per "
            f"second; at most {1000 * FRAME_S:.0f} ms"
        )


def build(architecture: str, config: Mapping[str, Any], known: Mapping[str, Any], rate: int) -> torch.nn.Module:
    """Make a model with fresh weights in fp32; `known` are the entries that follow from the data."""
    import torch
    from transformers import AutoModelForCTC

    check(architecture)
    whole = config_for(architecture, {**config, **known}, TABLE, "CTC")
    check_stride(whole, rate)
    model: torch.nn.Module = AutoModelForCTC.from_config(whole, dtype=torch.float32)
    return model


def frames(config: Any, samples: torch.Tensor) -> torch.Tensor:
    """Return how many frames the answers to recordings of so many samples (B,) int64 have, (B,) int64."""
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        samples = (samples - kernel).div(stride, rounding_mode="floor") + 1
    if getattr(config, "add_adapter", False):
        for _ in range(config.num_adapter_layers):
            samples = (samples - 1).div(config.adapter_stride, rounding_mode="floor") + 1
    return samples.clamp(min=1)


def masks(config: Any) -> bool:
    """Tell whether a model was trained with what is padding masked; its makers say so where it normalises by layer."""
    return getattr(config, "feat_extract_norm", "layer") == "layer"


def said_of(config: Any) -> list[str]:
    """Say what of a model's answers depends on other recordings."""
    if masks(config):
        return []
    return ["the model normalises over time, padding included: an answer depends a little on what it is batched with"]


def least(config: Any) -> int:
    """Return the fewest samples that give a frame."""
    needed = 1
    for kernel, stride in reversed(list(zip(config.conv_kernel, config.conv_stride, strict=True))):
        needed = (needed - 1) * stride + kernel
    return needed


def logits(
    model: Any, config: Any, waveform: torch.Tensor, samples: torch.Tensor, normalise: bool = True
) -> torch.Tensor:
    """Return logits (B, F, symbols) of recordings (B, T) fp32, each brought to mean 0 and deviation 1 first, or not."""
    import torch

    waveform = torch.nn.functional.pad(waveform, (0, max(0, least(config) - waveform.shape[1])))
    seen = torch.arange(waveform.shape[1], device=waveform.device) < samples.unsqueeze(1)
    count = samples.unsqueeze(1)
    centred = (waveform - waveform.sum(1, keepdim=True) / count) * seen
    scaled = centred / (centred.square().sum(1, keepdim=True) / count + 1e-7).sqrt()
    values = scaled if normalise else waveform * seen
    mask = seen.long() if masks(config) else None
    found: torch.Tensor = model(input_values=values.to(_dtype(model)), attention_mask=mask).logits
    return found


def symbols(parent: Path) -> tuple[list[str], int] | None:
    """Return the symbols by number of a model of the hub, and the blank's number; None where it has no vocab.json.

    Raises:
        TaskError: they cannot be read.
    """
    places = _file(parent, "vocab.json"), _file(parent, "config.json")
    if places[0] is None or places[1] is None:
        return None
    try:
        vocabulary, config = (json.loads(place.read_text(encoding="utf-8")) for place in places if place)
    except (OSError, ValueError) as error:
        raise TaskError(f"cannot read the vocabulary in {str(parent)!r}: {error}") from error
    blank = config.get("pad_token_id", 0)
    if not isinstance(vocabulary, dict) or not all(isinstance(number, int) for number in vocabulary.values()):
        raise TaskError(f"{str(parent / 'vocab.json')!r} is no mapping of symbols to numbers of one language")
    return of_hub(vocabulary, blank), blank


def hearing(parent: Path) -> tuple[int, bool]:
    """Return the samples per second that a model of the hub was trained with, and whether they were normalised.

    16,000 and true where it does not say.
    """
    place = _file(parent, "preprocessor_config.json")
    try:
        settings = json.loads(place.read_text(encoding="utf-8")) if place else {}
        return int(settings.get("sampling_rate", 16_000)), bool(settings.get("do_normalize", True))
    except (OSError, ValueError) as error:
        raise TaskError(f"cannot read preprocessor_config.json of {str(parent)!r}: {error}") from error


def _file(parent: Path, name: str) -> Path | None:
    """Return a file of a model directory, or of a model of the hub; None where it has none of that name."""
    if parent.is_dir():
        return parent / name if (parent / name).is_file() else None
    from transformers.utils import cached_file

    try:
        found = cached_file(str(parent), name)
    except OSError:  # there is no such file, or no way to it: whoever loads the weights says that
        return None
    return Path(found) if found else None


def _dtype(model: Any) -> torch.dtype:
    import torch

    dtype: torch.dtype = next((p.dtype for p in model.parameters() if p.dtype.is_floating_point), torch.float32)
    return dtype


def _product(numbers: Any) -> int:
    import math

    return math.prod(numbers)
