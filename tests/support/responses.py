"""Responses requests to parse: items, a request with everything in it, and values that do not belong anywhere."""

from __future__ import annotations

import copy
from typing import Any

from serve.api.responses.parse import Wanted, parse

PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}}
F = {"type": "function", "name": "f", "description": "does", "parameters": PARAMETERS}
G = {"type": "function", "name": "g", "strict": True}
USER = {"role": "user", "content": "hello"}


def wanted(given: Any = "hello", **fields: Any) -> Wanted:
    """Parse a request."""
    return parse({"model": "m", "input": given, **fields}, "1")


def call(at: str, name: str = "f", arguments: str = '{"a": 1}', **fields: Any) -> dict[str, Any]:
    """Return a call, as an item."""
    return {"type": "function_call", "call_id": at, "name": name, "arguments": arguments, **fields}


def result(at: str, output: Any = "4", **fields: Any) -> dict[str, Any]:
    """Return what a call gave, as an item."""
    return {"type": "function_call_output", "call_id": at, "output": output, **fields}


def said(text: str, **fields: Any) -> dict[str, Any]:
    """Return what an earlier answer said, as it was."""
    content = [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}]
    return {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed", "content": content, **fields}


PARTS = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b", "prompt_cache_breakpoint": {"x": 1}}]
THOUGHT = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
FULL = {
    "model": "m",
    "input": [USER, said("well"), call("x"), result("x", PARTS), THOUGHT, said("so"), {**USER, "content": PARTS}],
    "instructions": "be brief",
    "max_output_tokens": 5,
    "temperature": 1.0,
    "top_p": 1.0,
    "stream": True,
    "stream_options": {"include_obfuscation": False},
    "tools": [F, G],
    "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]},
    "parallel_tool_calls": False,
    "text": {"format": {"type": "json_schema", "name": "x", "schema": PARAMETERS, "strict": True}},
    "include": ["message.output_text.logprobs"],
    "top_logprobs": 2,
    "metadata": {"a": "b"},
    "user": "u",
    "safety_identifier": "s",
    "prompt_cache_key": "k",
    "truncation": "disabled",
    "store": False,
    "reasoning": {"effort": "none"},
    "stop": ["x"],
    "logit_bias": {"3": 1.0},
}
JUNK = [None, True, 0, -1, 1.5, 10**30, "", "x", "\x00", [], [[]], [None], [3], {}, {"": None}, {"type": []},
        {"type": "message"}, {"type": "function"}, {"a": {"b": [1]}}]  # fmt: skip


def places(value: Any) -> list[list[Any]]:
    """Return the path of every value inside a value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, each in pairs for path in ([key], *([key, *rest] for rest in places(each)))]


def changed(path: list[Any], junk: Any, whole: dict[str, Any]) -> dict[str, Any]:
    """Return a body with one value put in the place of another."""
    body = copy.deepcopy(whole)
    inside: Any = body
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = junk
    return body
