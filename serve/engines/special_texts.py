"""Special tokens that a client writes into a conversation stay text.

`<|im_end|>` in a message would end it, and what follows could be a system prompt: whoever writes a part of a message
could speak as anyone. So the template's marks become special tokens and those of the client become letters.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from jobs.tasks import chat_template
from serve.engines.chat_template import Rendered
from serve.engines.protocol import RequestError

_PLACE = re.compile("\ue010([0-9]+)\ue011")
"""Stands in the prompt for a special token that the client wrote."""


def token_ids(tokenizer: Any, rendered: Rendered, again: Callable[[Rendered], str], most: int) -> list[int]:
    """Return the token ids of a prompt.

    Args:
        again: renders what a prompt was made of.
        most: a prompt with more tokens will be refused.

    Raises:
        RequestError: the client wrote special tokens, and this tokenizer has no letters for them.
    """
    written: list[str] = []
    known = _known(tokenizer)
    hidden = rendered._replace(
        messages=_hidden(rendered.messages, known, written), functions=_hidden(rendered.functions, known, written)
    )
    plain = list(tokenizer(rendered.text, add_special_tokens=False)["input_ids"])
    if not written or len(plain) > most:
        return plain
    pieces = _pieces(again(hidden), written)
    special = chat_template.special_ids(tokenizer)
    for behind in ("", "."):
        parts = [_encoded(tokenizer, piece, behind if at else "") for at, piece in enumerate(pieces)]
        ids = [token for part in parts for token in part]
        told = [token for at, part in enumerate(parts) if at % 3 for token in part]
        if special.isdisjoint(told) and _text(tokenizer, ids) == _text(tokenizer, plain):
            return ids
    raise RequestError("messages", f"{written[0]!r} is a special token of this model and cannot be told as text")


@lru_cache(maxsize=8)
def _known(tokenizer: Any) -> re.Pattern[str]:
    return chat_template.special_texts(tokenizer)


def _hidden(value: Any, known: re.Pattern[str], written: list[str]) -> Any:
    """Return a value with a place for each special token in its texts; the tokens are added to `written`."""
    if isinstance(value, str):
        return known.sub(lambda found: _place(found[0], written), value)
    if isinstance(value, dict):
        return {key: _hidden(each, known, written) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_hidden(each, known, written) for each in value]
    return value


def _place(token: str, written: list[str]) -> str:
    written.append(token)
    return f"\ue010{len(written) - 1}\ue011"


def _pieces(text: str, written: list[str]) -> list[str]:
    """Return the text in pieces to be tokenised alone: the template's own and, two each, what the client wrote."""
    split = _PLACE.split(text)
    pieces = split[:1]
    for at, own in zip(split[1::2], split[2::2], strict=True):
        token = written[int(at)]
        pieces += [token[:1], token[1:], own]  # in two, so that it is none
    return pieces


def _encoded(tokenizer: Any, piece: str, behind: str) -> list[int]:
    """Return a piece's token ids as they are behind a text: SentencePiece puts a space before the first word of one."""
    before = list(tokenizer(behind, add_special_tokens=False)["input_ids"]) if behind and piece else []
    ids = list(tokenizer(behind * bool(piece) + piece, add_special_tokens=False)["input_ids"])
    return ids[len(before) :] if ids[: len(before)] == before else []


def _text(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
