"""Conversations → prompts, through the model's own chat template, and nothing lost on the way.

A template that leaves out what it was given (a role, a name, tools) gives a prompt that says something else than the
client did. So it is asked: what renders to the same text without a thing has not used it, and the thing is refused.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from serve.engines.protocol import RequestError
from serve.engines.tools.formats import Format
from serve.wire import Tools

Messages = Sequence[Mapping[str, Any]]


KNOWN_NEUTRAL: Mapping[str, Any] = {"enable_thinking": False, "thinking": False}
"""What says nothing to a template that does not know it: a model that cannot think does not."""


class NoChatTemplate(RequestError):
    """The model cannot take conversations."""


class LeftOut(RequestError):
    """The template has no place for something that the request has."""


class Rendered(NamedTuple):
    """A prompt, and what it was made of, as the template got it."""

    text: str
    messages: Messages
    functions: list[dict[str, Any]] | None
    options: Mapping[str, Any]


class ChatTemplate:
    """Renders the conversations of one model."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def source(self, has_tools: bool = False) -> str:
        """Return the template's text. Raises NoChatTemplate."""
        if not self._tokenizer.chat_template:
            raise NoChatTemplate("messages", "this model has no chat template; use /v1/completions")
        return str(self._tokenizer.get_chat_template(tools=[{}] if has_tools else None))

    def render(
        self, messages: Messages, tools: Tools | None, options: Mapping[str, Any], form: Format | None = None
    ) -> Rendered:
        """Return the prompt. Raises RequestError for what the template refuses.

        Args:
            options: what the request tells the template beside the messages (`chat_template_kwargs`).
            form: how the model writes calls, which decides what their ids may look like.
        """
        self._check_options(options, self.source(tools is not None))
        functions = [{"type": "function", "function": f} for f in tools.functions] if tools else None
        told = [_for_template(message, form) for message in messages]
        arguments = [call["function"]["arguments"] for message in told for call in message.get("tool_calls", ())]
        try:
            text = self._render(told, functions, options)
            if not any(part and str(part) in text for part in arguments):
                return Rendered(text, told, functions, options)
        except RequestError:
            if not arguments:
                raise
        # Most templates write arguments as JSON and want mappings; this one fails on them, or writes Python's form
        told = [_with_json(message) for message in told]
        return Rendered(self._render(told, functions, options), told, functions, options)

    def check(self, rendered: Rendered) -> None:
        """Raise LeftOut for what the template has left out of a prompt. It renders again, so too long ones go first."""
        _, told, functions, options = rendered
        if functions and self._same(rendered, rendered._replace(functions=None)):
            raise LeftOut("tools", "this model's chat template has no place for them")
        source = self.source(functions is not None)
        for index, message in enumerate(told):
            for field in _in_doubt(message, rendered.text, source):
                changed = [*told[:index], _without(message, field), *told[index + 1 :]]
                if self._same(rendered, Rendered("", changed, functions, options)):
                    raise LeftOut(f"messages[{index}].{field}", "this model's chat template leaves it out")

    def _render(self, messages: Messages, functions: Any, options: Mapping[str, Any]) -> str:
        from jinja2 import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), tools=functions, add_generation_prompt=True, tokenize=False, **options
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise RequestError("messages", f"the model's chat template refuses these messages: {error}") from None
        return str(text)

    def _same(self, rendered: Rendered, other: Rendered) -> bool:
        """Say whether something else gives the same prompt."""
        try:
            return self._render(other.messages, other.functions, other.options) == rendered.text
        except RequestError:  # it misses what was taken away
            return False

    def _check_options(self, options: Mapping[str, Any], source: str) -> None:
        taken = {*inspect.signature(self._tokenizer.apply_chat_template).parameters, "messages"}
        for name, value in options.items():
            param = f"chat_template_kwargs.{name}"
            if name in taken:
                raise RequestError(param, "is no variable of the template's own")
            neutral = name in KNOWN_NEUTRAL and value is KNOWN_NEUTRAL[name]
            if not neutral and not re.search(rf"\b{re.escape(name)}\b", source):
                raise LeftOut(param, "this model's chat template does not know it")


def _in_doubt(message: Mapping[str, Any], text: str, source: str) -> list[str]:
    """Return the fields of a message that may have been left out of the text."""
    doubted = [field for field in ("name", "tool_calls") if field in message and message["role"] != "tool"]
    if "reasoning_content" in message and not re.search(r"\b(reasoning_content|thinking)\b", source):
        doubted.append("reasoning_content")  # one that knows it leaves out old ones on purpose
    content = str(message["content"]).strip()
    shown = (content, json.dumps(content, ensure_ascii=False)[1:-1], json.dumps(content)[1:-1])
    beside_calls = "tool_calls" in message  # most templates with calls leave such text out on purpose
    if not beside_calls and not any(form in text for form in shown):
        doubted.append("content")
    return doubted


def _without(message: Mapping[str, Any], field: str) -> dict[str, Any]:
    """Return the message without a field, or with another content."""
    if field == "content":
        return {**message, "content": f"{message['content']} and more"}
    return {name: value for name, value in message.items() if name != field}


def _for_template(message: Mapping[str, Any], form: Format | None) -> dict[str, Any]:
    """Return a message with the ids of calls as the template wants them."""
    told = dict(message)
    if "tool_calls" in message:
        told["tool_calls"] = [{**call, "id": _id(call["id"], form)} for call in message["tool_calls"]]
    if "tool_call_id" in message:
        told["tool_call_id"] = _id(message["tool_call_id"], form)
    return told


def _with_json(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message with the arguments of calls as JSON."""
    if "tool_calls" not in message:
        return dict(message)
    functions = [call["function"] for call in message["tool_calls"]]
    texts = [json.dumps(function["arguments"], ensure_ascii=False) for function in functions]
    calls = [
        {**call, "function": {**call["function"], "arguments": text}}
        for call, text in zip(message["tool_calls"], texts, strict=True)
    ]
    return {**message, "tool_calls": calls}


def _id(name: str, form: Format | None) -> str:
    """Return the id of a call as a template takes it: Mistral's want nine letters and digits."""
    if form is None or form.name != "mistral":
        return name
    return re.sub("[^A-Za-z0-9]", "", name)[-9:].rjust(9, "0")
