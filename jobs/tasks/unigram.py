"""A unigram tokenizer of the SentencePiece kind (Kudo 2018, arXiv:1804.10959), trained on texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

UNKNOWN = "<|unk|>"
"""Stands for characters that the training text does not have."""


def train(texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str]) -> Any:
    """Return a `tokenizers.Tokenizer` whose pieces are the likeliest ones of the texts; a space begins a piece as ▁.

    Args:
        special_tokens: come first in the vocabulary, in this order.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=[*special_tokens, UNKNOWN], unk_token=UNKNOWN, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
