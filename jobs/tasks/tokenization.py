"""Tokenizers: trained on the data (byte-level BPE, single characters), or loaded."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from jobs.tasks import TaskError
from jobs.tasks.conversations import CHATML

END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>", "<|pad|>")


def train(kind: str, vocab_size: int, texts: Iterable[str]) -> Any:
    """Train a fast tokenizer on `texts`: `bpe` (byte-level, any text round-trips) or `char`.

    The special tokens of a chat are reserved from the start, so fine-tuning never resizes the embedding.
    """
    make = {"bpe": _train_bpe, "char": _train_char}.get(kind)
    if make is None:
        raise TaskError(f"tokenizer.train is {kind!r}; it can be 'bpe' or 'char'")
    return _wrap(make(texts, vocab_size))


def load(source: str | Path) -> Any:
    """Load a tokenizer from a directory or a hub id; give it a padding token and a chat template if it lacks them."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise TaskError(f"cannot load a tokenizer from {str(source)!r}: {str(error).splitlines()[0]}") from error
    if not tokenizer.is_fast:
        raise TaskError(f"the tokenizer in {str(source)!r} has no fast (tokenizer.json) form, which encoding needs")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None and "<|im_start|>" in tokenizer.get_vocab():
        tokenizer.chat_template = CHATML
    return tokenizer


def bytes_per_token(tokenizer: Any) -> np.ndarray:
    """Return the UTF-8 bytes each token id stands for (int64, one entry per id); special tokens stand for none.

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


def _train_bpe(texts: Iterable[str], vocab_size: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise TaskError(f"tokenizer.vocab_size is {vocab_size}; a byte-level BPE needs at least {smallest}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _train_char(texts: Iterable[str], vocab_size: int) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    characters = sorted({character for text in texts for character in set(text)})
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, "<|unk|>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([*SPECIAL_TOKENS])
    return tokenizer


def _wrap(tokenizer: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHATML
    return wrapped
