"""Texts → token ids as a model sees them, what is counted of them, and the bytes that a token stands for."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

import numpy as np

from jobs.tasks import word_cache
from jobs.tasks.chat_template import special_ids
from jobs.tasks.tokenization import SPECIAL_TOKENS

COUNTED = {
    "special_texts": "texts have special tokens written into them, which become these tokens",
    "begun": "texts begin with what the tokenizer puts before a text, as it does before a server's prompt",
    "unknown": "texts have characters that the tokenizer does not know",
}
"""What is counted of texts: name → what it is."""


def encode(tokenizer: Any, texts: list[str]) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """Tokenise texts, each behind what the tokenizer puts before it.

    Returns:
        The token ids of each, int32 (n,), and the counts of `COUNTED`, each int32 (1,).
    """
    documents, begins = _ids_of(tokenizer, texts), np.array(beginning(tokenizer), dtype=np.int32)
    counts = _counts(tokenizer, documents)
    return [np.concatenate([begins, ids]) for ids in documents] if len(begins) else documents, counts


def beginning(tokenizer: Any) -> list[int]:
    """Return the tokens that the tokenizer itself puts before a text, such as Llama's <s>; often none.

    A model that was learned with them does badly without, and a server puts them before a prompt.
    """
    plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    starts = (at for at in range(len(whole) - len(plain) + 1) if whole[at : at + len(plain)] == plain)
    return list(whole[: next(starts, 0)])


def unknown_ids(tokenizer: Any) -> frozenset[int]:
    """Return the ids of the tokens that stand for what the tokenizer does not know; byte-level ones have none."""
    of_model = getattr(tokenizer.backend_tokenizer.model, "unk_token", None)
    both = {tokenizer.unk_token_id, tokenizer.convert_tokens_to_ids(of_model) if of_model else None}
    return frozenset(both - {None, tokenizer.eos_token_id})  # of some, that is the end token


def _ids_of(tokenizer: Any, texts: list[str]) -> list[np.ndarray]:
    """Return the token ids of each text, whole and without special ones that are not written in it."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # a tokenizer.json may ask for both, as a call of transformers' would undo too
    backend.no_padding()
    words = word_cache.of(tokenizer)
    if words is not None:
        return words.encode(texts)
    found = backend.encode_batch_fast(texts, add_special_tokens=False)  # 1.5 times as fast as calling the tokenizer
    return [np.array(encoding.ids, dtype=np.int32) for encoding in found]


def _counts(tokenizer: Any, documents: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Count of texts, given by their own token ids, what `COUNTED` says: int32 (1,) each."""
    unknown = unknown_ids(tokenizer)
    looked_for = {"special_texts": special_ids(tokenizer) - unknown, "unknown": unknown}
    found = {"begun": len(documents) * bool(beginning(tokenizer))}
    found |= {name: _holding(documents, these) for name, these in looked_for.items()}
    return {name: np.array([count], dtype=np.int32) for name, count in found.items()}


def _holding(documents: Sequence[np.ndarray], these: Set[int]) -> int:
    """Count the documents, int32 (n,) each, that hold one of some ids."""
    if not documents or not these:
        return 0
    places = np.flatnonzero(np.isin(np.concatenate(documents), np.array(sorted(these))))
    ends = np.cumsum([len(ids) for ids in documents])
    return len(np.unique(np.searchsorted(ends, places, side="right")))


def bytes_per_token(tokenizer: Any) -> np.ndarray:
    """Return the UTF-8 bytes each token id stands for (int64 [vocab]); special tokens stand for none.

    Needed for bits per byte, the loss that compares across tokenizers.
    """
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    special = set(tokenizer.all_special_tokens) | set(SPECIAL_TOKENS)
    byte_level = "ByteLevel" in type(tokenizer.backend_tokenizer.decoder).__name__
    return np.array([0 if t is None or t in special else _byte_length(t, byte_level) for t in tokens], dtype=np.int64)


def _byte_length(token: str, byte_level: bool) -> int:
    if byte_level:  # every character of such a token is one byte
        return len(token)
    if len(token) == 6 and token.startswith("<0x"):  # byte fallback of SentencePiece models
        return 1
    return len(token.replace("▁", " ").encode("utf-8"))
