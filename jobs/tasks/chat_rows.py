"""Conversations → pieces of tokens with labels, and what of them was left out or cut."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from jobs.tasks import IGNORED, chat_template
from jobs.tasks.chat_template import Rendered
from jobs.tasks.conversations import Conversation, is_learned
from jobs.tasks.messages import REASONING
from jobs.tasks.packing import Piece

COUNTED = {
    "left_out": "conversations left out: their prompts fill sequence_length, so that no answer is left",
    "answers_cut": "conversations cut: an answer goes on beyond sequence_length",
    "divided": "conversations learned answer by answer: the chat template writes earlier turns differently",
    "unended": "conversations have answers that end in no special token: the model will not learn when to stop",
    "dated": "conversations hold the date of today: the chat template writes it",
    "marked": "conversations: the chat template marks what is learned ({% generation %}); the marks are not used, and "
    "answers are learned with what ends them",
    "headless": "conversations: the chat template has no generation prompt, so the beginning of a turn is learned too",
    "otherwise": "conversations: the chat template's generation prompt is not how its answers begin, so a server's "
    "prompt differs from what is learned",
    "stripped": "conversations have answers whose white space at the ends the chat template leaves out",
    "padded": "conversations have calls or tools without the nulls that their columns gave them: Parquet and the hub's "
    "tables have no other way to say that an entry is not there (one that is meant to be null is given as JSON)",
    "special": "conversations have special tokens written into their messages, which become these tokens",
}
"""What is counted of conversations: name → what it is, behind "3 of 10"."""

Counts = dict[str, "np.ndarray"]


def encode(tokenizer: Any, conversations: Sequence[Conversation], width: int) -> tuple[list[Piece], Counts]:
    """Tokenise conversations; of each at most `width` tokens, and none that have no answer among these.

    A token is learned if any of its characters is part of an answer.

    Returns:
        Pieces of (token ids, labels), and the counts of `COUNTED`, each int32 (1,).

    Raises:
        TaskSetupError, TaskError: as `chat_template.render`.
    """
    special = chat_template.special_ids(tokenizer)
    counts = dict.fromkeys(COUNTED, 0)
    pieces: list[Piece] = []
    for conversation, (parts, whole) in zip(conversations, tokenised(tokenizer, conversations), strict=True):
        cut = [(ids[:width], labels[:width]) for ids, labels in whole]
        kept = [piece for piece in cut if targets(piece)]
        pieces += kept
        counts["left_out"] += not kept
        counts["answers_cut"] += bool(kept) and sum(map(targets, kept)) < sum(map(targets, whole))
        counts["divided"] += len(parts) > 1
        counts["unended"] += any(not ends(piece, special) for piece in whole)
        counts["stripped"] += is_stripped(conversation, parts)
    for what, is_so in chat_template.peculiarities(tokenizer).items():
        counts[what] = len(conversations) * is_so
    written = chat_template.special_texts(tokenizer)
    counts["padded"] = sum(conversation.padded for conversation in conversations)
    counts["special"] = sum(holds(conversation, written) for conversation in conversations)
    return pieces, {name: np.array([count], dtype=np.int32) for name, count in counts.items()}


def tokenised(tokenizer: Any, conversations: Sequence[Conversation]) -> list[tuple[list[Rendered], list[Piece]]]:
    """Return of each conversation its texts, one or one for each answer, and their tokens with labels.

    Raises:
        TaskSetupError, TaskError: as `chat_template.render`.
    """
    rendered = [chat_template.render(tokenizer, conversation) for conversation in conversations]
    texts = [part.text for parts in rendered for part in parts]
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False) if texts else {}
    tokens = iter(zip(encoded.get("input_ids", ()), encoded.get("offset_mapping", ()), strict=True))
    return [(parts, [_piece(part, *next(tokens)) for part in parts]) for parts in rendered]


def is_stripped(conversation: Conversation, parts: Sequence[Rendered]) -> bool:
    """Tell whether an answer is learned, but not as it was given."""
    answers = [message["content"] for message in conversation.messages if is_learned(message)]
    return any(not any(answer in part.text for part in parts) for answer in answers)


def holds(conversation: Conversation, written: re.Pattern[str]) -> bool:
    """Tell whether a message's own text holds what `written` finds."""
    texts = (str(m[key]) for m in conversation.messages for key in ("content", *REASONING) if key in m)
    return any(map(written.search, texts))


def _piece(part: Rendered, ids: list[int], offsets: list[tuple[int, int]]) -> Piece:
    labels = [token if _learned(at, part.spans) else IGNORED for token, at in zip(ids, offsets, strict=True)]
    return ids, labels


def _learned(offset: tuple[int, int], spans: Sequence[tuple[int, int]]) -> bool:
    """Tell whether a token has a character of an answer; one of no characters belongs where it stands."""
    start, end = offset
    return any(start < last and (end > first or start == end == first) for first, last in spans)


def targets(piece: Piece) -> int:
    """Return how many tokens are learned; the first one never is."""
    return sum(label != IGNORED for label in piece[1][1:])


def ends(piece: Piece, special: frozenset[int]) -> bool:
    """Tell whether each run of learned tokens ends in a special one."""
    labels = piece[1]
    last = [a for a, b in zip(labels, [*labels[1:], IGNORED], strict=True) if a != IGNORED and b == IGNORED]
    return all(label in special for label in last)
