"""The options of task `seq2seq`."""

from __future__ import annotations

from pydantic import Field, model_validator

from cluster.strict import Text
from jobs.tasks import TaskOptions
from jobs.tasks.labels import check_columns
from jobs.tasks.pair_tokens import PairTokenizerOptions


class Seq2SeqOptions(TaskOptions):
    """How pairs of texts become rows, and how they are learned."""

    source_column: Text = "source"
    """The column that holds the text to translate."""
    target_column: Text = "target"
    """The column that holds its translation."""
    prefix: str | None = None
    """Put before each source, in training and by the server: "translate English to French: " for T5. Left out: nothing,
    or what the model that the job starts from was trained with."""
    max_source_length: int | None = Field(None, ge=2, le=2**20)
    """Tokens of the longest source; what is longer is cut, and counted in the log. Left out: 128, or what the model
    that the job starts from was trained with."""
    max_target_length: int | None = Field(None, ge=2, le=2**20)
    """The same of the targets."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """So much of each target's probability is spread over all tokens while it is learned; what is measured has none."""
    length_groups: int = Field(1, ge=1, le=256)
    """A micro-batch is computed in so many parts of texts of like length: less padding, which pays where lengths differ
    and a part has some dozens of rows. It changes no result."""
    decode_share: float = Field(1.0, gt=0, le=1)
    """So large a share of each batch of held-out rows, its first ones, is translated for BLEU and chrF at each
    evaluation: a large model takes long for all."""
    tokenizer: PairTokenizerOptions = PairTokenizerOptions()

    @model_validator(mode="after")
    def _columns_differ(self) -> Seq2SeqOptions:
        return check_columns(self, "source_column", "target_column")
