"""Prompts in any of their forms → token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from serve.engines.chat_template import ChatTemplate
from serve.engines.protocol import RequestError
from serve.engines.special_texts import token_ids
from serve.engines.tools.formats import Format
from serve.wire import GenerateCall


class TooLong(RequestError):
    """The prompt leaves no room in the context."""


LETTERS = 16
"""Characters of a token, at most, in the beginning of a text that is looked at alone; more only costs time."""
SLACK = 16
"""Tokens that the cut may add."""


def check_length(tokenizer: Any, text: str, most: int, place: str) -> None:
    """Refuse a text that is far too long by its beginning: all the tokens of 8 MiB would take seconds and 2 GiB.

    Raises:
        TooLong: its beginning alone has more tokens than `most`.
    """
    beginning = text[: LETTERS * (most + SLACK)]
    if len(beginning) == len(text):
        return
    tokens = len(tokenizer(beginning, add_special_tokens=False)["input_ids"]) - SLACK
    if tokens > most:
        raise TooLong(place, f"this model's context is {most} tokens and this has more than {tokens}: shorten it")


def encode(tokenizer: Any, call: GenerateCall, max_context: int, form: Format | None = None) -> tuple[int, ...]:
    """Return the token ids of a call's prompt. An empty text is the beginning of a document.

    Args:
        max_context: most tokens of prompt and text.
        form: how the model writes calls of functions.

    Raises:
        TooLong: it leaves no room for one more token, where one is wanted.
        RequestError: the prompt has no tokens, or cannot be told to this model.
    """
    prompt = call.prompt
    if isinstance(prompt, str):
        check_length(tokenizer, prompt, max_context, call.place)
        return _checked(tokenizer(prompt)["input_ids"] or _document_start(tokenizer), max_context, call)
    if isinstance(prompt[0], int):
        if max(prompt) >= len(tokenizer):  # type: ignore[type-var]
            message = f"token id {max(prompt)} is outside the vocabulary of {len(tokenizer)}"  # type: ignore[type-var]
            raise RequestError(call.place, message)
        return _checked(prompt, max_context, call)
    template = ChatTemplate(tokenizer)
    rendered = template.render(prompt, call.tools, call.template_kwargs, form)  # type: ignore[arg-type]
    check_length(tokenizer, rendered.text, max_context, call.place)
    ids = _checked(token_ids(tokenizer, rendered, template.again, max_context), max_context, call)
    template.check(rendered)
    return ids


def _checked(ids: Sequence[Any], max_context: int, call: GenerateCall) -> tuple[int, ...]:
    if not ids:
        raise RequestError(call.place, "the prompt has no tokens")
    if max_context - len(ids) < (call.max_tokens != 0):
        message = f"this model's context is {max_context} tokens and the prompt has {len(ids)}: shorten it"
        raise TooLong(call.place, message)
    return tuple(ids)


def is_chat(call: GenerateCall) -> bool:
    """Say whether the prompt is a conversation."""
    return not isinstance(call.prompt, str) and isinstance(call.prompt[0], dict)


def _document_start(tokenizer: Any) -> list[int]:
    """Return the token that a document begins with: the one that begins texts, or the one that ends the last."""
    tokens = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return [next(token for token in tokens if token is not None)] if any(t is not None for t in tokens) else []
