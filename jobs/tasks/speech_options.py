"""The options of speech recognition, and what recordings say of themselves before anything is learned of them."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field, field_validator, model_validator

from cluster.strict import Text
from jobs.tasks import TaskOptions
from jobs.tasks.labels import check_columns
from jobs.tasks.transcripts import check_pattern


class SpeechRecognitionOptions(TaskOptions):
    """How recordings and transcripts become rows."""

    audio_column: Text = "audio"
    """The column that holds the recording: a file's bytes, or its path; a relative one starts at the table's folder."""
    text_column: Text = "text"
    """The column that holds what was said."""
    transcript_from: Text | None = None
    """What was said, out of the names of the files: `{text}_{speaker}_{take}`, or `{text}/{name}` for folders."""
    sample_rate: int | None = Field(None, ge=4_000, le=48_000)
    """Samples per second; recordings of another rate are resampled. Left out: as the first recording has."""
    max_seconds: float | None = Field(None, gt=0, le=120)
    """Longer recordings are left out, and refused by the endpoint. Left out: the longest of the training data."""
    lowercase: bool = False
    """Learn small letters only."""
    speed: float = Field(0.1, ge=0, le=0.5)
    """In training, play each recording faster or slower by up to this share."""
    noise: float = Field(0.1, ge=0, le=1)
    """In training, add white noise of up to this share of a recording's level."""

    @field_validator("transcript_from")
    @classmethod
    def _check_pattern(cls, pattern: str | None) -> str | None:
        return pattern and check_pattern(pattern)

    @model_validator(mode="after")
    def _columns_differ(self) -> SpeechRecognitionOptions:
        if self.transcript_from is not None and self.text_column != "text":
            raise ValueError("text_column has no effect beside transcript_from, which reads what was said from names")
        return check_columns(self, "audio_column", "text_column")


@dataclass(frozen=True)
class SpeechFindings:
    """What recordings say, out of one chunk or many."""

    rate: int
    """Samples per second of the first one."""
    longest_s: float
    characters: frozenset[str]
    """Those that transcripts are made of."""
    count: int
    seconds: float
    """Of all recordings together."""

    def merged(self, later: SpeechFindings) -> SpeechFindings:
        """Return the findings of both chunks."""
        return SpeechFindings(
            self.rate,
            max(self.longest_s, later.longest_s),
            self.characters | later.characters,
            self.count + later.count,
            self.seconds + later.seconds,
        )
