"""How recordings and transcripts become rows: what speech recognition learns of its data, and keeps with the model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from jobs.tasks import Batch, Columns, TaskError, TaskOptions, audio, speech_hub, transcripts
from jobs.tasks.beside import table_of
from jobs.tasks.labels import column_of
from jobs.tasks.own_networks import OwnNetworks
from jobs.tasks.speech_options import SpeechFindings, SpeechRecognitionOptions

SPEECH_FILE = "speech.json"


class SpeechRows(OwnNetworks):
    """The part of the task that knows recordings and transcripts, and no model."""

    Options: ClassVar[type[TaskOptions]] = SpeechRecognitionOptions
    learned_files: ClassVar[tuple[str, ...]] = (SPEECH_FILE,)
    counted: ClassVar[Mapping[str, str]] = {
        "resampled": "recordings are resampled",
        "averaged": "recordings have several channels, which are averaged",
        "silent": "recordings hold nothing but silence",
        "ambiguous": "names of files fit task.transcript_from in several ways: the shortest text is taken",
        "too_long": "recordings are longer than max_seconds, or than the longest of the training data: left out",
        "too_fast": f"transcripts have more characters than frames of {speech_hub.FRAME_S * 1000:.0f} ms: left out",
        "unknown": "transcripts have characters that the model does not know, and count as mistakes",
    }

    options: SpeechRecognitionOptions

    def __init__(self, options: TaskOptions | Mapping[str, Any] | None = None) -> None:
        super().__init__(options)
        self.rate = 0
        self.longest_s = 0.0
        self.symbols: list[str] = []
        self.blank = 0
        self.normalise = True
        """Whether a model of transformers hears recordings brought to mean 0 and deviation 1."""
        self.case = "lower" if self.options.lowercase else "kept"

    # -- data -------------------------------------------------------------------------------------------------------

    def check(self, example: Mapping[str, Any]) -> None:
        """Raise TaskError for an example without a recording or a transcript."""
        self._audio(example)
        self._text(example)

    def content(self, example: Mapping[str, Any]) -> Any:
        """Return the recording, whatever its name and its transcript."""
        there = [path for path in self.files(example) if path.is_file()]
        value = there[0].read_bytes() if there else self._audio(example)
        if isinstance(value, Mapping):
            return value.get("bytes") or [value.get("array"), value.get("sampling_rate")]
        return value

    def answer(self, example: Mapping[str, Any]) -> str:
        """Return the transcript."""
        return self._text(example)

    def files(self, example: Mapping[str, Any]) -> Sequence[Path]:
        """Return the recording's path, where the example names it instead of holding it."""
        value = self._audio(example)
        if isinstance(value, Mapping):
            value = None if value.get("bytes") else value.get("path")
        return [Path(value)] if isinstance(value, str | Path) else []

    def unused(self, example: Mapping[str, Any]) -> list[str]:
        """Return the columns that are neither the recording, its name nor its transcript."""
        read = {self.options.audio_column, "path"}
        if self.options.transcript_from is None:
            read.add(self.options.text_column)
        return [key for key, value in example.items() if key not in read and value is not None]

    def observe(self, examples: Sequence[Mapping[str, Any]]) -> SpeechFindings:
        """Note lengths, the first one's rate, and the characters of the transcripts."""
        said = [audio.about(audio.content_of(self._audio(example))) for example in examples]
        most = self.options.max_seconds or math.inf
        lengths = [each.seconds for each in said if each.seconds <= most]
        characters = frozenset("".join(map(self._text, examples)))
        return SpeechFindings(said[0].rate, max(lengths, default=0.0), characters, len(lengths), sum(lengths))

    def fit(self, findings: SpeechFindings) -> list[str]:
        """Learn the rate, the length of rows and the symbols."""
        self.rate = self.options.sample_rate or findings.rate
        self.longest_s = self.options.max_seconds or findings.longest_s
        self.symbols, self.blank = transcripts.symbols_of(findings.characters), 0
        if len(self.symbols) < 3:
            raise TaskError("the transcripts hold no characters that can be learned")
        shown = "".join(self.symbols[2:42])
        chosen = "as asked for" if self.options.sample_rate else "as the first one has"
        return [
            f"{findings.count} recordings, {findings.seconds / 60:.1f} minutes; the longest has "
            f"{findings.longest_s:.2f} s, rows have room for {self.longest_s:.2f} s",
            f"{self.rate} samples per second, {chosen}",
            f"{len(self.symbols) - 2} characters: {shown!r}{' …' if len(self.symbols) > 42 else ''}",
        ]

    def inherit(self, parent: Path | str) -> bool:
        """Keep what the parent hears and spells; of a model of the hub, its vocab.json. False where it has neither."""
        parent = Path(parent)
        if (parent / SPEECH_FILE).is_file():
            super().inherit(parent)
        elif (found := speech_hub.symbols(parent)) is not None:
            self.symbols, self.blank = found
            self.rate, self.normalise = speech_hub.hearing(parent)
            letters = [symbol for symbol in self.symbols if symbol.lower() != symbol.upper()]
            self.case = "upper" if letters and all(each.isupper() for each in letters) else self.case
            self.longest_s = self.options.max_seconds or 20.0
        else:
            return False
        self._check_case()
        if self.options.sample_rate not in (None, self.rate):
            raise TaskError(
                f"task.sample_rate is {self.options.sample_rate}, but the model it starts from hears {self.rate} "
                "samples per second: leave it out"
            )
        return True

    def inherited(self) -> list[str]:
        """Say what recordings and transcripts become."""
        case = "; transcripts become upper case, as the model's are" if self.case == "upper" else ""
        return [
            f"as the model that it starts from: {self.rate} samples per second, {len(set(self.symbols)) - 2} "
            f"characters, at most {self.longest_s:.2f} s{case}"
        ]

    def save(self, directory: Path) -> None:
        """Write speech.json: rate, longest recording, symbols."""
        learned = {"sample_rate": self.rate, "max_seconds": self.longest_s, "symbols": self.symbols}
        learned |= {"blank": self.blank, "case": self.case, "normalise": self.normalise}
        (directory / SPEECH_FILE).write_text(json.dumps(learned, indent=2, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, directory: Path, options: TaskOptions | Mapping[str, Any] | None = None) -> SpeechRows:
        """Read what `save` wrote; `max_seconds` of the options goes before the parent's."""
        task = cls(options)
        try:
            learned = json.loads((Path(directory) / SPEECH_FILE).read_text(encoding="utf-8"))
            task.rate, task.symbols = int(learned["sample_rate"]), list(map(str, learned["symbols"]))
            task.blank, task.case = int(learned["blank"]), str(learned["case"])
            task.normalise = bool(learned.get("normalise", True))
            task.longest_s = task.options.max_seconds or float(learned["max_seconds"])
            task.case = "lower" if task.options.lowercase else task.case
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise TaskError(f"{directory} holds no speech model of Tandem: {SPEECH_FILE}: {error!r}") from error
        return task

    def encode(self, examples: Sequence[Mapping[str, Any]]) -> Columns:
        """Decode recordings to samples (N, T) and number their transcripts (N, L); what is too long is left out."""
        rows = [self._row(example) for example in examples]
        names = ("resampled", "averaged", "silent", "ambiguous", "too_long", "too_fast", "unknown")
        counts = {name: np.array([name in row["notes"] for row in rows], np.int32) for name in names}
        kept = [row for row in rows if not row["notes"] & {"too_long", "too_fast"}]
        width, height = self._most_samples(), self._most_symbols()
        return {
            "samples": stacked([row["samples"] for row in kept], width),
            "length": np.array([len(row["samples"]) for row in kept], np.int32),
            "label": stacked([row["label"] for row in kept], height),
            "label_length": np.array([len(row["label"]) for row in kept], np.int32),
            "targets": np.array([len(row["label"]) for row in kept], np.int32),
            **counts,
        }

    def collate(self, rows: Columns) -> Batch:
        """Return waveform (B, T) fp32 as long as the longest, samples (B,), labels (B, L), label_lengths (B,) int64."""
        import torch

        longest, widest = int(rows["length"].max(initial=1)), int(rows["label_length"].max(initial=1))
        return {
            "waveform": torch.from_numpy(rows["samples"][:, :longest].astype(np.float32) / audio.LARGEST),
            "samples": torch.from_numpy(rows["length"].astype(np.int64)),
            "labels": torch.from_numpy(rows["label"][:, :widest].astype(np.int64)),
            "label_lengths": torch.from_numpy(rows["label_length"].astype(np.int64)),
        }

    # -- inside -----------------------------------------------------------------------------------------------------

    def _audio(self, example: Mapping[str, Any]) -> Any:
        value = column_of(example, self.options.audio_column, "audio_column")
        if not isinstance(value, str) or not value or Path(value).is_absolute():
            return value
        table = table_of(example)
        found = audio.beside(table, value) if table is not None else None
        return value if found is None else str(found)

    def _text(self, example: Mapping[str, Any]) -> str:
        """Return the transcript, tidied."""
        pattern, column = self.options.transcript_from, self.options.text_column
        if pattern is not None:
            text: Any = transcripts.from_name(self._name(example), pattern)
        elif column not in example and "path" in example:
            raise TaskError(
                f"nothing says what is said in it: no column {column!r} (this has {sorted(example)}), and no "
                "task.transcript_from, such as '{text}_{speaker}_{take}', that reads it out of the names of files"
            )
        else:
            text = column_of(example, column, "text_column")
        return transcripts.tidy(text, self.case)

    def _name(self, example: Mapping[str, Any]) -> str:
        path = example.get("path", self._audio(example))
        if not isinstance(path, str):
            raise TaskError("task.transcript_from reads names of files, and this recording has none")
        return path

    def _is_ambiguous(self, example: Mapping[str, Any]) -> bool:
        """Tell whether the name of the file could be read as another transcript."""
        pattern = self.options.transcript_from
        if pattern is None:
            return False
        name = self._name(example)
        return transcripts.from_name(name, pattern) != transcripts.from_name(name, pattern, longest=True)

    def _check_case(self) -> None:
        """Refuse small letters for a model that has none.

        Raises:
            TaskError: every letter would be one that it does not know.
        """
        letters = [symbol for symbol in self.symbols if symbol.lower() != symbol.upper()]
        if self.options.lowercase and letters and not any(each.islower() for each in letters):
            raise TaskError(
                f"task.lowercase asks for small letters, and the model it starts from writes {''.join(letters)!r:.40}: "
                "leave it out"
            )

    def _row(self, example: Mapping[str, Any]) -> dict[str, Any]:
        """Return samples and label of an example, and what is to be counted of it."""
        content = audio.content_of(self._audio(example))
        text = self._text(example)
        if audio.about(content).seconds > self.longest_s + 1e-3:
            return {"notes": {"too_long"}}
        heard = audio.heard(content, self.rate)
        label, unknown = transcripts.numbers(text, self.symbols)
        room = len(heard.samples) / self.rate / speech_hub.FRAME_S
        notes = {"resampled": heard.resampled, "averaged": heard.averaged, "unknown": unknown}
        notes["too_fast"] = transcripts.frames_needed(label) > room
        notes["ambiguous"] = self._is_ambiguous(example)
        notes["silent"] = not heard.samples.any()
        samples = audio.whole(heard.samples)[: self._most_samples()]
        return {"samples": samples, "label": label, "notes": {name for name, there in notes.items() if there}}

    def _most_samples(self) -> int:
        return math.ceil(self.longest_s * self.rate)

    def _most_symbols(self) -> int:
        return max(1, math.ceil(self.longest_s / speech_hub.FRAME_S))


def stacked(rows: Sequence[np.ndarray], width: int, dtype: Any = np.int16) -> np.ndarray:
    """Return rows of different lengths as one array (N, width), padded with 0."""
    stacked = np.zeros((len(rows), width), dtype)
    for at, row in enumerate(rows):
        stacked[at, : len(row)] = row
    return stacked
