"""Task `speech-recognition`: what was said in a recording, learned by CTC over characters.

Networks: `conv-transformer` and `crnn`, ours, or a model of transformers that is trained by CTC on samples.

Rows: samples (N, T) int16, padded with 0; length (N,) int32, how many samples there are; label (N, L) int16, the
transcript's symbols, and label_length (N,) int32; targets (N,) int32, the symbols that count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from jobs.tasks import Batch, Better, TaskError, audio, ctc, speech_hub, transcripts
from jobs.tasks.finite import finite
from jobs.tasks.speech_rows import SpeechRows, stacked

if TYPE_CHECKING:
    import torch


class SpeechRecognition(SpeechRows):
    """Writes down what is said in a recording, character by character.

    It knows the characters of the transcripts it learned from, and neither words nor languages; it says nothing of who
    speaks, and takes no recordings longer than `max_seconds`. Voices, rooms and microphones that are unlike those of
    its training data cost accuracy: measure it on a speaker who was kept aside.
    """

    name: ClassVar[str] = "speech-recognition"
    networks: ClassVar[Mapping[str, str]] = {
        "conv-transformer": "jobs.tasks.speech_networks:ConvTransformer",
        "crnn": "jobs.tasks.speech_networks:Crnn",
    }
    version: ClassVar[int] = 2
    unit: ClassVar[str] = "characters"
    metrics: ClassVar[Mapping[str, Better]] = {"loss": "min", "wer": "min", "cer": "min"}
    gathered: ClassVar[tuple[str, ...]] = ("picture", "heard", "said")
    transcribes: ClassVar[bool] = True
    """`predict` takes recordings and answers with `text`: `/v1/audio/transcriptions` may call it."""

    # -- model ------------------------------------------------------------------------------------------------------

    def known(self) -> dict[str, Any]:
        """Return the number of symbols and of samples per second."""
        return {"vocab_size": len(self.symbols), "sample_rate": self.rate}

    def placeholders(self) -> dict[str, Any]:
        """Return few symbols and samples."""
        return {"vocab_size": 4, "sample_rate": 8_000}

    def check_model(self, architecture: str, config: Mapping[str, Any]) -> None:
        """Raise TaskError for an unknown architecture, an entry that its config has not, or what makes no model."""
        if architecture in self.networks:
            super().check_model(architecture, config)
        else:
            speech_hub.check_model(architecture, config)

    def check_parent(self, directory: Path, config: Mapping[str, Any]) -> None:
        """Raise TaskError for a model that does not hear, or an entry that its config has not."""
        from jobs.tasks import loading

        kind = _model_type(directory)
        if kind in self.networks:
            super().check_parent(directory, config)
            return
        speech_hub.check(kind)
        loading.check_parent(directory, config, speech_hub.TABLE, "CTC")

    def build(self, architecture: str, config: Mapping[str, Any]) -> torch.nn.Module:
        """Make `conv-transformer` or `crnn` (ours), or a model of transformers, in fp32."""
        if architecture in self.networks:
            return super().build(architecture, config)
        known = {"vocab_size": len(self.symbols), "pad_token_id": self.blank, "ctc_zero_infinity": True}
        return speech_hub.build(architecture, config, known, self.rate)

    def load_model(
        self, directory: Path, dtype: torch.dtype | None = None, config: Mapping[str, Any] | None = None
    ) -> torch.nn.Module:
        """Load a model directory, in evaluation mode; a model of the hub may lack the layer that spells."""
        from transformers import AutoModelForCTC

        from jobs.tasks import loading

        if _model_type(directory) in self.networks:
            return super().load_model(directory, dtype, config)
        entries = {"vocab_size": len(self.symbols), "pad_token_id": self.blank} if self.symbols else {}
        model, self.said = loading.load(
            AutoModelForCTC, directory, dtype, {**entries, **(config or {})}, may_lack_head=True
        )
        if self.rate:
            speech_hub.check_stride(model.config, self.rate)
        self.said = [*self.said, *speech_hub.said_of(model.config)]
        found: torch.nn.Module = model
        return found

    # -- learning ---------------------------------------------------------------------------------------------------

    def loss(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum CTC's loss, a scalar fp32 in nats, and the characters, int64; one that trains hears perturbed recordings.

        Args:
            batch: as `collate` makes it.
        """
        lengths = batch["label_lengths"]
        heard = self._perturbed(batch) if model.training else (batch["waveform"], batch["samples"])
        scores, frames = self._heard(model, *heard)
        return ctc.loss(scores, frames, batch["labels"], lengths, self.blank), lengths.sum()

    def measure(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """Sum loss, characters, and the edits of words and characters, scalars (); keep a picture of each recording."""
        import torch

        scores, frames = self._heard(model, batch["waveform"], batch["samples"])
        lengths, paths = batch["label_lengths"], ctc.best_paths(scores, frames)
        labels = [row[:n].tolist() for row, n in zip(batch["labels"].cpu(), lengths.tolist(), strict=True)]
        references = [self._said(label) for label in labels]
        counts = transcripts.edits(references, [self._spelled(path) for path in paths])
        return {
            "loss": ctc.loss(scores, frames, batch["labels"], lengths, self.blank),
            "targets": lengths.sum(),
            **{name: torch.tensor(count) for name, count in counts.items()},
            **self._pictured(batch, paths, labels),
        }

    def summarise(self, sums: Mapping[str, Any]) -> dict[str, float]:
        """Return loss (nats per character), and the error rates of words and of characters."""
        return {
            "loss": sums["loss"] / max(sums["targets"], 1),
            "wer": sums["word_edits"] / max(sums["words"], 1),
            "cer": sums["character_edits"] / max(sums["characters"], 1),
        }

    def figures(self, sums: Mapping[str, Any]) -> dict[str, bytes]:
        """Draw spectrograms of some recordings, with what was heard and when."""
        from jobs.tasks import speech_pictures

        if not len(sums.get("picture", ())):
            return {}
        drawn = speech_pictures.drawn(sums["picture"], sums["heard"], sums["said"], self.symbols)
        return {"recordings.png": drawn}

    # -- use --------------------------------------------------------------------------------------------------------

    def instance(self, example: Mapping[str, Any]) -> Any:
        """Return the recording, as `predict` takes it: a file's bytes, or its samples at the model's rate."""
        content = audio.content_of(self._audio(example))
        return content if isinstance(content, bytes) else audio.heard(content, self.rate, self.longest_s).samples

    def predict(self, model: torch.nn.Module, instances: Sequence[Any]) -> list[dict[str, Any]]:
        """Write down what is said in recordings: the bytes of files, or samples (T,) at the model's rate.

        Raises:
            TaskError: anything else, or a recording that is too long; a str is never opened.
        """
        import torch

        sounds = [self._sent(instance) for instance in instances]
        waveform = torch.from_numpy(stacked(sounds, max(map(len, sounds)), np.float32))
        with torch.inference_mode():
            scores, frames = self._heard(model, waveform, torch.tensor([len(each) for each in sounds]))
            finite(scores)
            paths, sure = ctc.best_paths(scores, frames), ctc.confidences(scores, frames)
        return [
            {"text": self._spelled(path), "seconds": len(sound) / self.rate, "confidence": confidence}
            for path, sound, confidence in zip(paths, sounds, sure, strict=True)
        ]

    def inputs(self) -> list[dict[str, Any]]:
        """Describe the recording: samples, in whose place files may be sent."""
        said = {"content_types": ["np", "base64"], "sample_rate": self.rate, "max_seconds": self.longest_s}
        return [{"name": "audio", "datatype": "FP32", "shape": [-1, -1], "parameters": said}]

    def outputs(self) -> list[dict[str, Any]]:
        """Describe text, seconds and confidence."""
        names = {"text": "BYTES", "seconds": "FP32", "confidence": "FP32"}
        described = [{"name": name, "datatype": datatype, "shape": [-1]} for name, datatype in names.items()]
        return [] if self.answers_otherwise(SpeechRecognition) else described

    # -- inside -----------------------------------------------------------------------------------------------------

    def _perturbed(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return recordings (B, T') and their lengths (B,), at another speed and in noise."""
        from jobs.tasks import perturbation

        waveform, samples = batch["waveform"], batch["samples"]
        if self.options.speed:
            waveform, samples = perturbation.at_other_speed(waveform, samples, self.options.speed)
        if self.options.noise:
            waveform = perturbation.in_noise(waveform, samples, self.options.noise)
        return waveform, samples

    def _heard(
        self, model: torch.nn.Module, waveform: torch.Tensor, samples: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log-probabilities (B, F, symbols) fp32, and how many of the frames each recording has, (B,) int64."""
        import torch

        inner: Any = getattr(model, "module", model)
        device = next(model.parameters()).device
        waveform, samples = waveform.to(device), samples.to(device)
        if inner.config.model_type in self.networks:
            logits, frames = model(input_values=waveform, samples=samples).logits, inner.frames(samples)
        else:
            if model.training:  # transformers draws its masks from numpy: seeded by what torch draws for this step
                np.random.seed(int(torch.randint(2**31, ()).item()))
            logits = speech_hub.logits(model, inner.config, waveform, samples, self.normalise)
            frames = speech_hub.frames(inner.config, samples)
        return logits.float().log_softmax(-1), frames.clamp(max=logits.shape[1])

    def _spelled(self, path: Sequence[int]) -> str:
        """Return the text of a best path."""
        quiet = [0 if number == self.blank else number + 1 for number in path]
        return transcripts.text_of(quiet, ["", *self.symbols])

    def _said(self, label: Sequence[int]) -> str:
        """Return the transcript of a label; a character that is not known is one that no answer has."""
        text = " ".join("".join(self.symbols[number] for number in label).split())
        return text.replace(transcripts.UNKNOWN, transcripts.NEVER)

    def _pictured(
        self, batch: Batch, paths: Sequence[list[int]], labels: Sequence[list[int]]
    ) -> dict[str, torch.Tensor]:
        """Return a small picture of each recording, where its symbols were heard, and what was said."""
        import torch

        from jobs.tasks import log_mel, speech_pictures

        mel = log_mel.log_mel(batch["waveform"], batch["samples"], self.rate, 40)
        ends = log_mel.frames(batch["samples"], self.rate).tolist()
        cells = [speech_pictures.cells(row[:end]) for row, end in zip(mel.cpu().numpy(), ends, strict=True)]
        heard = [speech_pictures.heard(ctc.onsets(path, self.blank), len(path)) for path in paths]
        said = [speech_pictures.said(label) for label in labels]
        rows = {"picture": cells, "heard": heard, "said": said}
        return {name: torch.from_numpy(np.stack(parts)) for name, parts in rows.items()}

    def _sent(self, instance: Any) -> np.ndarray:
        """Return the samples (T,) float32 of what a client sent."""
        if isinstance(instance, bytes):
            return audio.heard(instance, self.rate, self.longest_s).samples
        if not isinstance(instance, np.ndarray) or instance.ndim != 1:
            raise TaskError("a recording is a file's bytes, or samples of one channel")
        return audio.heard((instance.astype(np.float32), self.rate), self.rate, self.longest_s).samples


def _model_type(directory: Path | str) -> str:
    """Return the architecture that a model directory's or a hub model's config names."""
    from transformers import PretrainedConfig

    try:
        config, _ = PretrainedConfig.get_config_dict(str(directory))
    except Exception as error:  # transformers raises several kinds
        raise TaskError(f"cannot load a model from {str(directory)!r}: {error}") from error
    return str(config.get("model_type", ""))
