"""The options of task `causal-lm`: what is learned, and how examples become rows."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from cluster.strict import Text
from jobs.tasks import TaskOptions
from jobs.tasks.tokenization import TokenizerOptions


class CausalLMOptions(TaskOptions):
    """How text becomes rows."""

    later: ClassVar[frozenset[str]] = frozenset({"objective", "beta", "chosen_weight"})

    text_column: Text | None = None
    """The column that holds the text. Left out: `text`, where an example is no conversation; given, it is the text of
    every example, whatever else stands beside it."""
    sequence_length: int = Field(256, ge=2, le=2**22)
    """Tokens per row (S)."""
    documents: Literal["together", "separate"] = "together"
    """together: texts follow each other in one stream, cut into rows. separate: no text sees another in its row."""
    pack: bool = True
    """Several conversations (or separate documents) share a row; false: each is a row of its own, padded."""
    objective: Literal["likelihood", "dpo", "ipo", "orpo"] = "likelihood"
    """What is learned. likelihood: the next token. dpo, ipo, orpo: to prefer the answer in `chosen` to that in
    `rejected`; dpo and ipo against what the model that the job starts from makes of both (docs/preferences.md)."""
    beta: float | None = Field(None, gt=0, le=1000)
    """How strongly preferences hold on to the reference (dpo, ipo), or weigh beside the chosen answer (orpo); 0.1 where
    it is left out."""
    chosen_weight: float = Field(0.0, ge=0, le=1000)
    """So much of the chosen answer's mean loss per token is added (dpo, ipo), to keep it likely (arXiv:2404.19733)."""
    tokenizer: TokenizerOptions = TokenizerOptions()

    @model_validator(mode="after")
    def _of_the_objective(self) -> CausalLMOptions:
        """Refuse options that the objective would pass over."""
        if self.objective == "likelihood":
            given = [name for name in ("beta", "chosen_weight") if getattr(self, name)]
            if given:
                raise ValueError(f"{given[0]} is for task.objective dpo, ipo or orpo")
            return self
        if self.text_column is not None:
            raise ValueError(f"text_column has no effect with objective {self.objective}, which learns preferences")
        if self.documents != "together":
            raise ValueError(f"documents has no effect with objective {self.objective}, which learns preferences")
        if self.chosen_weight and self.objective == "orpo":
            raise ValueError("chosen_weight is for dpo and ipo: orpo learns the chosen answer anyway")
        return self
