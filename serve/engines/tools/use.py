"""What a model's replica does with the tools of a request: how the model writes calls, enforced and read."""

from __future__ import annotations

from typing import Any

from serve.engines.chat_template import ChatTemplate, LeftOut
from serve.engines.protocol import RequestError
from serve.engines.table import ToolFormat
from serve.engines.tools.formats import FORMATS, Format, marker_tokens, tool_format
from serve.engines.tools.lark import grammar
from serve.engines.tools.parser import CallParser
from serve.wire import GenerateCall

ONE_CALL = "only supports single tool-calls"
"""What templates say (Llama 3.1) that cannot tell a model of two calls in one message."""


class ToolUse:
    """The calls of one model."""

    def __init__(self, tokenizer: Any, name: ToolFormat = "auto") -> None:
        """`name` is the format in which the model writes calls; `auto` asks its template."""
        self._tokenizer = tokenizer
        self._name = name
        self._template = ChatTemplate(tokenizer)

    def format(self, call: GenerateCall) -> Format | None:
        """Return how the model writes calls; None where that does not matter. Raises RequestError."""
        told = isinstance(call.prompt, tuple) and any(isinstance(m, dict) and "tool_calls" in m for m in call.prompt)
        if call.tools is None and not told:
            return None
        if self._name != "auto":
            return FORMATS[self._name]
        try:
            form = tool_format(self._template.source(call.tools is not None))
        except ValueError as error:
            if call.tools is None:  # calls of the past are the template's own matter
                return None
            raise LeftOut("tools", str(error)) from None
        if form is None and call.tools is not None:
            raise LeftOut("tools", "this model's chat template has no place for them")
        return form

    def parser(self, call: GenerateCall) -> CallParser | None:
        """Return what takes the calls out of the answer; None where there are none to take."""
        form = self.format(call)
        if call.tools is None or form is None:
            return None
        return CallParser(form, [f["name"] for f in call.tools.functions], self._parallel(call))

    def sampling(self, call: GenerateCall) -> dict[str, Any]:
        """Return the sampling parameters that calls need: a grammar, and markers that show. Raises RequestError."""
        form = self.format(call)
        assert form is not None
        assert call.tools is not None
        tokens = marker_tokens(form, self._tokenizer)
        wanted: dict[str, Any] = {"visible_tokens": tuple(tokens.values())}
        try:
            rules = grammar(form, call.tools, self._parallel(call), tokens, call.sampling.get("json_schema"))
        except ValueError as error:
            raise RequestError("response_format", str(error)) from None
        return wanted if rules is None else {**wanted, "grammar": rules, "json_schema": None}

    def _parallel(self, call: GenerateCall) -> bool:
        assert call.tools is not None
        return call.tools.parallel and ONE_CALL not in self._template.source(True)
