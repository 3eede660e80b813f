"""Labelled texts, and pairs of them: what they say, as rows of token ids, and rows as batches for an encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jobs.tasks import Batch, Columns, TaskError
from jobs.tasks.chat_template import special_ids
from jobs.tasks.document_tokens import unknown_ids
from jobs.tasks.messages import is_blank
from jobs.tasks.text_sample import TextFindings
from jobs.tasks.tokenization import END_OF_TEXT


@dataclass(frozen=True)
class ClassFindings:
    """What labelled texts say, out of one chunk or many."""

    labels: frozenset[str]
    texts: TextFindings | None
    kinds: frozenset[str] = frozenset()
    """What the labels are, in words: text, numbers."""

    @property
    def suffices(self) -> bool:
        """True where the sample of the texts is whole."""
        return self.texts is None or self.texts.suffices

    def merged(self, later: ClassFindings) -> ClassFindings:
        """Return the findings of both chunks."""
        texts = self.texts.merged(later.texts) if self.texts and later.texts else None
        return ClassFindings(self.labels | later.labels, texts, self.kinds | later.kinds)


def begin_with_a_mark(tokenizer: Any) -> None:
    """Let a tokenizer of our own put a mark before each text: what encoders pool, and what the first word follows."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{END_OF_TEXT} $A",
        pair=f"{END_OF_TEXT} $A {END_OF_TEXT}:1 $B:1",
        special_tokens=[(END_OF_TEXT, tokenizer.convert_tokens_to_ids(END_OF_TEXT))],
    )


def tokenise(tokenizer: Any, texts: Sequence[tuple[str, ...]], width: int) -> Columns:
    """Tokenise texts, or pairs, and cut them at `width` (L).

    Returns:
        input_ids (N, L) and length (N,); for pairs, where the tokenizer makes them, token_type_ids (N, L); and `cut`
        (N,), 1 where a text was longer. All int32.
    """
    apart = [list(column) for column in zip(*texts, strict=True)]
    whole = tokenizer(*apart, verbose=False, return_attention_mask=False)
    lengths = np.array([len(ids) for ids in whole["input_ids"]], dtype=np.int32)
    if (lengths > width).any():
        whole = tokenizer(*apart, truncation=True, max_length=width, return_attention_mask=False)
    rows = {"input_ids": np.full((len(texts), width), tokenizer.pad_token_id, dtype=np.int32)}
    if len(apart) > 1 and "token_type_ids" in whole:
        rows["token_type_ids"] = np.zeros_like(rows["input_ids"])
    for key, column in rows.items():
        for row, values in zip(column, whole[key], strict=True):
            row[: len(values)] = values
    return {**rows, "length": np.minimum(lengths, width), "cut": (lengths > width).astype(np.int32)}


def unknown(tokenizer: Any, rows: Columns) -> np.ndarray:
    """Tell of rows that `tokenise` made which hold no token that says something: int32 (N,)."""
    says_nothing = [*special_ids(tokenizer), *unknown_ids(tokenizer)]
    filled = np.arange(rows["input_ids"].shape[1]) < rows["length"][:, None]
    says = filled & ~np.isin(rows["input_ids"], says_nothing)
    return (~says.any(1)).astype(np.int32)


def batch_of(rows: Columns) -> Batch:
    """Return input_ids and attention_mask (B, S) int64, S that of the longest, and labels (B,) int64.

    Args:
        rows: input_ids (B, L) and length (B,), perhaps label (B,) and token_type_ids (B, L); all int32.
    """
    import torch

    length = torch.from_numpy(rows["length"].astype(np.int64))
    longest = int(length.max())
    kept: Columns = {key: rows[key][:, :longest] for key in ("input_ids", "token_type_ids") if key in rows}
    batch: Batch = {key: torch.from_numpy(column.astype(np.int64)) for key, column in kept.items()}
    batch["attention_mask"] = (torch.arange(longest) < length[:, None]).long()
    if "label" in rows:
        batch["labels"] = torch.from_numpy(rows["label"].astype(np.int64))
    return batch


def decoded(text: Any) -> str:
    """Return a text that a client sent, a str or UTF-8 bytes.

    Raises:
        TaskError: it is something else, or empty.
    """
    try:
        return filled(text.decode("utf-8") if isinstance(text, bytes) else text, "an input")
    except UnicodeDecodeError as error:
        raise TaskError(f"the text is not UTF-8: {error}") from error


def filled(text: Any, where: str) -> str:
    """Return a text that says something.

    Raises:
        TaskError: it is none, or empty; `where` names what holds it.
    """
    if not isinstance(text, str) or is_blank(text):
        raise TaskError(f"{where} holds {text!r:.60}, not a text")
    return text
