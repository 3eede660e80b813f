"""Conversations → prompts, through the model's own chat template, and nothing lost on the way.

A template that leaves out what it was given (a role, a name, tools) gives a prompt that says something else than the
client did. So it is asked: what renders to the same text without a thing has not used it, and the thing is refused.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from jobs.tasks import template_questions
from serve.engines.protocol import RequestError
from serve.engines.tools.formats import Format
from serve.wire import Tools

Messages = Sequence[Mapping[str, Any]]


LEFT_OUT = "this model's chat template leaves it out"
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
        told, text = template_questions.in_its_form(self._renderer(functions, options), told)
        return Rendered(text, told, functions, options)

    def again(self, rendered: Rendered) -> str:
        """Return the prompt that something else than it was made of gives. Raises RequestError."""
        return self._render(rendered.messages, rendered.functions, rendered.options)

    def check(self, rendered: Rendered) -> None:
        """Raise LeftOut for what the template has left out of a prompt. It renders again, so too long ones go first."""
        text, told, functions, options = rendered
        if functions and template_questions.is_same(self._renderer(None, options), told, text):
            raise LeftOut("tools", "this model's chat template has no place for them")
        render = self._renderer(functions, options)
        source = self.source(functions is not None)
        for index, message in enumerate(told):
            for field in _in_doubt(message, source):
                changed = [*told[:index], _without(message, field), *told[index + 1 :]]
                if template_questions.is_same(render, changed, text):
                    raise LeftOut(f"messages[{index}].{field}", LEFT_OUT)
        for index in template_questions.unshown(render, told, text):
            if "tool_calls" not in told[index]:  # most templates with calls leave such text out on purpose
                raise LeftOut(f"messages[{index}].content", LEFT_OUT)

    def _renderer(self, functions: Any, options: Mapping[str, Any]) -> Callable[[Messages], str]:
        return lambda messages: self._render(messages, functions, options)

    def _render(self, messages: Messages, functions: Any, options: Mapping[str, Any]) -> str:
        from jinja2 import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), tools=functions, add_generation_prompt=True, tokenize=False, **options
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise RequestError("messages", f"the model's chat template refuses these messages: {error}") from None
        return str(text)

    def _check_options(self, options: Mapping[str, Any], source: str) -> None:
        taken = {*inspect.signature(self._tokenizer.apply_chat_template).parameters, "messages"}
        known = _variables(source) if options else ()
        for name, value in options.items():
            param = f"chat_template_kwargs.{name}"
            if name in taken:
                raise RequestError(param, "is no variable of the template's own")
            neutral = name in KNOWN_NEUTRAL and value is KNOWN_NEUTRAL[name]
            if not neutral and name not in known:
                raise LeftOut(param, "this model's chat template does not know it")


@lru_cache(maxsize=16)
def _variables(source: str) -> frozenset[str]:
    """Return what a template reads that it does not set itself: a word in it may be a key, or the name of a loop's."""
    from jinja2 import Environment, TemplateError, meta

    blocks = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", source)  # transformers' own, which marks answers
    try:
        parsed = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(blocks)
    except TemplateError:  # it will be refused when it is rendered
        return frozenset()
    return frozenset(meta.find_undeclared_variables(parsed))


def _in_doubt(message: Mapping[str, Any], source: str) -> list[str]:
    """Return the fields of a message, beside its content, that a template may have left out."""
    doubted = [field for field in ("name", "tool_calls") if field in message and message["role"] != "tool"]
    if "reasoning_content" in message and not re.search(r"\b(reasoning_content|thinking)\b", source):
        doubted.append("reasoning_content")  # one that knows it leaves out old ones on purpose
    return doubted


def _without(message: Mapping[str, Any], field: str) -> dict[str, Any]:
    return {name: value for name, value in message.items() if name != field}


def _for_template(message: Mapping[str, Any], form: Format | None) -> dict[str, Any]:
    """Return a message with the ids of calls as the template wants them."""
    told = dict(message)
    if "tool_calls" in message:
        told["tool_calls"] = [{**call, "id": _id(call["id"], form)} for call in message["tool_calls"]]
    if "tool_call_id" in message:
        told["tool_call_id"] = _id(message["tool_call_id"], form)
    return told


def _id(name: str, form: Format | None) -> str:
    """Return the id of a call as a template takes it: Mistral's want nine letters and digits."""
    if form is None or form.name != "mistral":
        return name
    return re.sub("[^A-Za-z0-9]", "", name)[-9:].rjust(9, "0")
