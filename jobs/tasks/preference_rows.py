"""Preferences → rows of two answers each, behind the same prompt, and what of them was left out or cut.

Rows (W = sequence_length + 1):
    input_ids  (N, 2, W) int32    the prompt with the chosen answer, and with the rejected one, padded
    labels     (N, 2, W) int32    the token where it is part of an answer, else -100
    targets    (N,) int32         1: a pair is one term of the loss
    reference  (N, 2) float32     log-probability of both answers by the model that the job starts from (nats); added
                                  once all rows are there (jobs/driver/reference.py)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jobs.tasks import IGNORED, Batch, Columns, TaskError, chat_rows, chat_template
from jobs.tasks.chat_template import Rendered
from jobs.tasks.conversations import Conversation
from jobs.tasks.packing import Piece
from jobs.tasks.preferences import Preference

COUNTED = {
    "pairs_left_out": "preferences left out: the prompt fills sequence_length, so that of an answer nothing is left",
    "pairs_alike": "preferences left out: their answers are the same tokens, or are within sequence_length",
    "pairs_cut": "preferences cut: an answer goes on beyond sequence_length, and is compared by its beginning",
    "pairs_unended": "preferences have answers that end in no special token: the model will not learn when to stop",
    "pairs_special": "preferences have special tokens written into their messages, which become these tokens",
    "pairs_repeating": "preferences have answers that begin with the prompt's text, which the model learns to repeat",
    "pairs_stripped": "preferences have answers whose white space at the ends the chat template leaves out",
    "pairs_padded": "preferences have calls or tools without the nulls that their columns gave them",
}
"""What is counted of preferences: name → what it is, behind "3 of 10"."""


def encode(tokenizer: Any, preferences: Sequence[Preference], width: int) -> Columns:
    """Tokenise pairs; of each answer with its prompt at most `width` tokens.

    Returns:
        input_ids and labels (N, 2, width) and targets (N,), and the counts of `COUNTED`, (1,) each; all int32.

    Raises:
        TaskSetupError, TaskError: as `chat_template.render`; or an answer of several turns is no one text.
    """
    both = [conversation for pair in preferences for conversation in (pair.chosen, pair.rejected)]
    told = chat_rows.tokenised(tokenizer, both)
    pieces = [_one(whole) for _, whole in told]
    pairs = list(zip(pieces[::2], pieces[1::2], strict=True))
    counts = dict.fromkeys(COUNTED, 0) | _said(tokenizer, preferences, pairs)
    counts["pairs_stripped"] = sum(_stripped(told[at : at + 2], both[at : at + 2]) for at in range(0, len(both), 2))
    kept = []
    for pair in pairs:
        cut = tuple((ids[:width], labels[:width]) for ids, labels in pair)
        if not all(map(chat_rows.targets, cut)):
            counts["pairs_left_out"] += 1
        elif cut[0] == cut[1]:
            counts["pairs_alike"] += 1
        else:
            kept.append(cut)
            counts["pairs_cut"] += sum(map(chat_rows.targets, cut)) < sum(map(chat_rows.targets, pair))
    numbered = {name: np.array([count], dtype=np.int32) for name, count in counts.items()}
    return {**_padded(kept, width, tokenizer.pad_token_id), **numbered}


def collate(rows: Columns) -> Batch:
    """Return input_ids and labels (B, 2, T) int64, shifted against each other, and `reference` (B, 2) where it is.

    T is the length of the longest: what is behind an answer has no effect.

    Args:
        rows: input_ids and labels (B, 2, W) int32, and perhaps reference (B, 2) float32.
    """
    import torch

    last = np.flatnonzero((rows["labels"] != IGNORED).any(axis=(0, 1)))[-1]
    ids, labels = (torch.from_numpy(rows[name][..., : last + 1].astype(np.int64)) for name in ("input_ids", "labels"))
    batch = {"input_ids": ids[..., :-1], "labels": labels[..., 1:]}
    return {**batch, "reference": torch.from_numpy(rows["reference"])} if "reference" in rows else batch


def _one(parts: list[Piece]) -> Piece:
    if len(parts) > 1:
        raise TaskError(
            "the chat template writes earlier turns of an answer differently, so an answer that calls tools is no one "
            "text whose probability could be compared"
        )
    return parts[0]


def _stripped(told: Sequence[tuple[list[Rendered], list[Piece]]], both: Sequence[Conversation]) -> bool:
    return any(chat_rows.is_stripped(one, parts) for one, (parts, _) in zip(both, told, strict=True))


def _said(tokenizer: Any, preferences: Sequence[Preference], pairs: Sequence[tuple[Piece, Piece]]) -> dict[str, int]:
    special, written = chat_template.special_ids(tokenizer), chat_template.special_texts(tokenizer)
    both = [(pair.chosen, pair.rejected) for pair in preferences]
    return {
        "pairs_unended": sum(not all(chat_rows.ends(piece, special) for piece in pair) for pair in pairs),
        "pairs_special": sum(any(chat_rows.holds(each, written) for each in pair) for pair in both),
        "pairs_repeating": sum(pair.repeats for pair in preferences),
        "pairs_padded": sum(any(each.padded for each in pair) for pair in both),
        **{what: len(pairs) * is_so for what, is_so in chat_template.peculiarities(tokenizer).items()},
    }


def _padded(pairs: Sequence[Sequence[Piece]], width: int, padding: int) -> Columns:
    input_ids = np.full((len(pairs), 2, width), padding, dtype=np.int32)
    labels = np.full((len(pairs), 2, width), IGNORED, dtype=np.int32)
    for row, pair in enumerate(pairs):
        for side, (ids, learned) in enumerate(pair):
            input_ids[row, side, : len(ids)], labels[row, side, : len(ids)] = ids, learned
    labels[..., 0] = IGNORED  # nothing comes before it
    return {"input_ids": input_ids, "labels": labels, "targets": np.ones(len(pairs), dtype=np.int32)}
