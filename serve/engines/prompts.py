"""Prompts in any of their forms → token ids."""

from __future__ import annotations

from typing import Any

from serve.engines.chat_template import ChatTemplate
from serve.engines.protocol import RequestError
from serve.engines.tools.formats import Format
from serve.wire import GenerateCall


class TooLong(RequestError):
    """The prompt leaves no room in the context."""


def encode(tokenizer: Any, call: GenerateCall, form: Format | None = None) -> tuple[int, ...]:
    """Return the token ids of a call's prompt. An empty text is the beginning of a document.

    Args:
        form: how the model writes calls of functions.

    Raises:
        RequestError: the prompt has no tokens, or cannot be told to this model.
    """
    prompt = call.prompt
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"] or _document_start(tokenizer)
    elif isinstance(prompt[0], int):
        ids = prompt
        if max(ids) >= len(tokenizer):
            message = f"token id {max(ids)} is outside the vocabulary of {len(tokenizer)}"
            raise RequestError("prompt", message)
    else:
        text = ChatTemplate(tokenizer).prompt(prompt, call.tools, call.template_kwargs, form)  # type: ignore[arg-type]
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise RequestError("prompt" if isinstance(prompt, str) else "messages", "the prompt has no tokens")
    return tuple(ids)


def check_length(tokens: int, max_context: int, call: GenerateCall) -> None:
    """Raise TooLong for a prompt of so many tokens that leaves no room for one more, where one is wanted."""
    if max_context - tokens < (call.max_tokens != 0):
        message = f"this model's context is {max_context} tokens and the prompt has {tokens}: shorten it"
        raise TooLong("messages" if is_chat(call) else "prompt", message)


def is_chat(call: GenerateCall) -> bool:
    """Say whether the prompt is a conversation."""
    return not isinstance(call.prompt, str) and isinstance(call.prompt[0], dict)


def _document_start(tokenizer: Any) -> list[int]:
    """Return the token that a document begins with: the one that begins texts, or the one that ends the last."""
    tokens = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return [next(token for token in tokens if token is not None)] if any(t is not None for t in tokens) else []
