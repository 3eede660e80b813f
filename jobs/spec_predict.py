"""The section `predict` of a job's spec: what batch inference writes, and how a task that generates does so."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Literal

from pydantic import Field, model_validator

from cluster.precision import Wanted
from cluster.strict import Strict, Text

Format = Literal["parquet", "jsonl"]
SUFFIXES: dict[str, Format] = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl"}
"""What the name of an output says of its format."""


class GenerationSpec(Strict):
    """How a task that generates does so. What is left out is as the model's own generation_config.json has it."""

    max_tokens: int = Field(256, ge=1, le=2**22)
    """Most tokens of a row's answer; the model's context may end it earlier."""
    temperature: float | None = Field(None, ge=0, le=100)
    """0 takes the most likely token each time."""
    top_p: float | None = Field(None, ge=0, le=1)
    """Keep the smallest set of tokens whose probability reaches it."""
    top_k: int | None = Field(None, ge=0, le=2**31)
    """Keep so many of the most likely tokens; 0 keeps all."""
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=16)] = Field(default_factory=list)
    """Texts that end an answer, and are no part of it."""
    seed: int = Field(0, ge=0, lt=2**63)
    """With the number of a row it decides what is drawn for that row, whatever worker it comes to."""


class PredictSpec(Strict):
    """What phase `predict` writes: the columns of `data.predict`, and beside them what the model says of each row."""

    output: Text | None = None
    """The file, .parquet or .jsonl: a path on the driver's node, or an object store's URI; it must not be there yet. A
    relative path starts at the spec's folder. Left out: predictions.parquet in the run's folder."""
    format: Format | None = None
    """Left out: as the name of the output ends, else parquet."""
    columns: list[Text] | None = None
    """The columns of the input to keep. Left out: all; an empty list: none."""
    prefix: Annotated[str, Field(max_length=100)] = "prediction_"
    """What the names of the model's columns begin with; an error of a row has one of them too."""
    where: bool = False
    """Write the file and line (or number) that each row is from, too."""
    batch_size: int = Field(32, ge=1, le=2**20)
    """Rows that a worker gives to the model at once; to an engine, texts that are generated at once."""
    shard_rows: int | None = Field(None, ge=1, le=10**9)
    """Rows that are done, or done again after a failure, as one; fewer where these have 4 MiB. Left out: 1,024, of a
    task that generates 64."""
    precision: Wanted = "auto"
    """What the model computes in, as in `training`."""
    generation: GenerationSpec | None = None
    """For tasks that generate."""

    @model_validator(mode="after")
    def _one_format(self) -> PredictSpec:
        named = self._named
        if self.output is not None and named is None and self.format is None:
            raise ValueError(f"output {self.output!r} ends in neither .parquet nor .jsonl: say `format`")
        if named is not None and self.format is not None and named != self.format:
            raise ValueError(f"output {self.output!r} is {named} by its name and {self.format} by `format`")
        if self.columns is not None and (twice := [name for name in self.columns if self.columns.count(name) > 1]):
            raise ValueError(f"columns has {twice[0]!r} twice")
        return self

    @property
    def written_as(self) -> Format:
        """The format that `format` and the output's name come to."""
        return self.format or self._named or "parquet"

    @property
    def _named(self) -> Format | None:
        """The format that the output's name says, if it has one."""
        name = self.output or ""
        return SUFFIXES.get(PurePath(name.partition("?")[0] if "://" in name else name).suffix.lower())
