"""Pairs of a source and a target text as rows of token ids, by one tokenizer for both sides, trained or given.

A source is what the tokenizer itself makes of a text; a target always ends with the end token, unless it was cut: a
model must not learn to end where we have cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from jobs.tasks import IGNORED, Batch, Columns, TaskSetupError, tokenization, unigram
from jobs.tasks.chat_template import special_texts
from jobs.tasks.document_tokens import unknown_ids
from jobs.tasks.text_sample import TextFindings
from jobs.tasks.tokenization import END_OF_TEXT, TokenizerOptions

COUNTED: Mapping[str, str] = {
    "cut_source": "sources are longer than task.max_source_length and were cut",
    "cut_target": "targets are longer than task.max_target_length and were cut",
    "special": "pairs have special tokens written into them, which become these tokens",
    "unknown": "sources have characters that the tokenizer does not know",
    "lossy": "targets do not come back from the tokenizer as they were: BLEU and chrF compare with what comes back",
}
"""What `encode` counts: name → what it is."""


class PairTokenizerOptions(TokenizerOptions):
    """The tokenizer of both sides: trained on the data, or loaded. Left out, a model given by `from` keeps its own."""

    train: Literal["bpe", "unigram"] | None = None  # type: ignore[assignment]
    """bpe: byte-level pairs, any text comes back as it was. unigram: the likeliest pieces, as in SentencePiece; trained
    again it may differ in some."""


def obtain(options: PairTokenizerOptions, findings: TextFindings | None) -> tuple[Any, list[str]]:
    """Load or train the tokenizer that the options ask for; return it and what is to be said about it.

    Raises:
        TaskSetupError: it cannot be used for pairs.
    """
    tokenizer, said = tokenization.obtain(options, findings)
    if options.source is None:
        _end_with_a_mark(tokenizer)
        tokenizer.chat_template = None  # what it makes is no chat
    if options.train == "unigram":
        tokenizer.unk_token = unigram.UNKNOWN
        said = [*said, "a unigram tokenizer may differ in some pieces when it is trained again on the same text"]
    return checked(tokenizer), said


def checked(tokenizer: Any) -> Any:
    """Return a tokenizer that can be used for pairs.

    Raises:
        TaskSetupError: it has no end token, or wants to be told the languages of both sides.
    """
    tokenization.end_of_text(tokenizer)
    if hasattr(tokenizer, "src_lang"):
        raise TaskSetupError(
            f"{type(tokenizer).__name__} is a tokenizer of several languages and wants to be told those of source and "
            "target, which seq2seq does not do: name another tokenizer in task.tokenizer.from"
        )
    return tokenizer


def _end_with_a_mark(tokenizer: Any) -> None:
    """Let a tokenizer of our own put the end token behind each text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {END_OF_TEXT}",
        pair=f"$A {END_OF_TEXT} $B {END_OF_TEXT}",
        special_tokens=[(END_OF_TEXT, tokenizer.convert_tokens_to_ids(END_OF_TEXT))],
    )


def encode(
    tokenizer: Any, sources: Sequence[str], targets: Sequence[str], most_source: int, most_target: int
) -> Columns:
    """Tokenise N pairs and cut them.

    Returns:
        source (N, most_source) and source_length (N,); target (N, most_target) and targets (N,), the number of its
        tokens, each a term of the loss; and for each of `COUNTED` 1 where it holds of the pair, (N,). All int32.
    """
    read, cut_source = source_ids(tokenizer, sources, most_source)
    whole = target_ids(tokenizer, targets)
    learned = [ids[:most_target] for ids in whole]
    written, unknown = special_texts(tokenizer), unknown_ids(tokenizer)
    back = tokenizer.batch_decode(whole, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    counts = {
        "cut_source": cut_source,
        "cut_target": [len(ids) > most_target for ids in whole],
        "special": [bool(written.search(s) or written.search(t)) for s, t in zip(sources, targets, strict=True)],
        "unknown": [not unknown.isdisjoint(ids) for ids in read],
        "lossy": [one != other for one, other in zip(back, targets, strict=True)],
    }
    padding = tokenizer.pad_token_id
    return {
        "source": _padded(read, most_source, padding),
        "source_length": np.array([len(ids) for ids in read], dtype=np.int32),
        "target": _padded(learned, most_target, padding),
        "targets": np.array([len(ids) for ids in learned], dtype=np.int32),
        **{name: np.array(of_each, dtype=np.int32) for name, of_each in counts.items()},
    }


def source_ids(tokenizer: Any, sources: Sequence[str], most: int) -> tuple[list[list[int]], list[bool]]:
    """Return the token ids of sources, cut at `most` before what the tokenizer puts behind a text; and which were."""
    whole = tokenizer(list(sources), verbose=False, return_attention_mask=False)["input_ids"]
    cut = [len(ids) > most for ids in whole]
    if any(cut):
        whole = tokenizer(list(sources), truncation=True, max_length=most, return_attention_mask=False)["input_ids"]
    return whole, cut


def target_ids(tokenizer: Any, targets: Sequence[str]) -> list[list[int]]:
    """Return the token ids of targets, each with the end token."""
    end = tokenization.end_of_text(tokenizer)
    given = tokenizer(text_target=list(targets), verbose=False, return_attention_mask=False)["input_ids"]
    return [ids if ids and ids[-1] == end else [*ids, end] for ids in given]


def batch_of(rows: Columns) -> Batch:
    """Return input_ids and attention_mask (B, S), labels (B, T), all int64; S and T those of the longest.

    Args:
        rows: source (B, Ls) and source_length (B,), target (B, Lt) and targets (B,); all int32.
    """
    import torch

    read, filled = _trimmed(rows["source"], rows["source_length"])
    learned, labelled = _trimmed(rows["target"], rows["targets"])
    labels = torch.from_numpy(learned).masked_fill(~torch.from_numpy(labelled), IGNORED)
    mask = torch.from_numpy(filled.astype(np.int64))
    return {"input_ids": torch.from_numpy(read), "attention_mask": mask, "labels": labels}


def of_like_length(batch: Batch, groups: int) -> list[tuple[Batch, int]]:
    """Split a batch into so many parts of pairs of like length, each as wide as its longest, with its weight.

    The weight is 1, and 0 for a part that stands in where there are fewer pairs than parts: under ZeRO-3 all ranks
    must make the same number of forward passes.

    Args:
        batch: as `batch_of` makes it: tensors (B, …), B at least 1.
    """
    import torch

    if groups == 1:
        return [(batch, 1)]
    read, learned = batch["attention_mask"].sum(1), (batch["labels"] != IGNORED).sum(1)
    order = (learned * (int(read.max()) + 1) + read).argsort()
    parts = []
    for rows in torch.tensor_split(order, groups):
        part, weight = (rows, 1) if len(rows) else (order[:1], 0)
        widths = {"input_ids": int(read[part].max()), "labels": max(1, int(learned[part].max()))}
        widths["attention_mask"] = widths["input_ids"]
        parts.append(({name: column[part, : widths[name]] for name, column in batch.items()}, weight))
    return parts


def _padded(texts: Sequence[Sequence[int]], width: int, padding: int) -> np.ndarray:
    rows = np.full((len(texts), width), padding, dtype=np.int32)
    for row, ids in zip(rows, texts, strict=True):
        row[: len(ids)] = ids
    return rows


def _trimmed(ids: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return ids (B, W) int64 without the columns that none fills, and where each row is filled, bool."""
    longest = max(1, int(length.max(initial=1)))
    return ids[:, :longest].astype(np.int64), np.arange(longest) < length[:, None]
