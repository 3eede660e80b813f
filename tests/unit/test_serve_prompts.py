"""Texts that are far too long are refused by their beginning; others by their tokens."""

from __future__ import annotations

from typing import Any

import pytest

from serve.engines.embedding import token_ids
from serve.engines.prompts import TooLong, check_length, encode
from serve.wire import EmbedCall, GenerateCall
from tests.support import tiny_models


class Counting:
    """A tokenizer that notes the longest text it was given."""

    def __init__(self) -> None:
        self._tokenizer = tiny_models.tokenizer()
        self.longest = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: str, **options: Any) -> Any:
        self.longest = max(self.longest, len(text))
        return self._tokenizer(text, **options)

    def __len__(self) -> int:
        return len(self._tokenizer)


def test_the_rest_of_a_text_far_too_long_is_not_read() -> None:
    tokenizer, text = Counting(), "a " * 1_000_000
    conversation = ({"role": "user", "content": text},)
    with pytest.raises(TooLong, match=r"prompt\[3\]: this model's context is 64 tokens and this has more than \d+"):
        encode(tokenizer, GenerateCall("1", text, place="prompt[3]"), 64)
    with pytest.raises(TooLong, match="messages: "):
        encode(tokenizer, GenerateCall("1", conversation, place="messages"), 64)
    with pytest.raises(TooLong, match=r"input\[1\]: "):
        token_ids(tokenizer, EmbedCall("1", ("a", text)), 64)
    assert tokenizer.longest < 2000


def test_a_long_text_of_few_tokens_is_read_to_its_end() -> None:
    tokenizer = tiny_models.tokenizer()
    tokenizer.add_tokens(["x" * 40])
    text = "x" * 40 * 60
    assert len(tokenizer(text)["input_ids"]) == 60
    check_length(tokenizer, text, 64, "prompt")
    with pytest.raises(TooLong):
        check_length(tokenizer, "a" * len(text), 64, "prompt")
