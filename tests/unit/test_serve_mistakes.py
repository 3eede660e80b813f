"""Arguments of calls are read as bodies are, and mistakes in requests are told in plain words."""

from __future__ import annotations

import json
from typing import Any

import pytest

from serve.api import strict_json
from serve.api.body import ApiError
from serve.api.openai_api import parse_chat
from serve.api.openai_parameters import validate
from serve.api.openai_requests import ChatRequest


def nested(depth: int, kind: str) -> str:
    opening, closing = {"list": ("[", "]"), "object": ('{"a":', "}")}[kind]
    return opening * depth + "1" + closing * depth


@pytest.mark.parametrize("kind", ["list", "object"])
def test_nesting_is_bounded(kind: str) -> None:
    most = strict_json.MOST_DEPTH
    assert json.dumps(strict_json.read(nested(most, kind)), separators=(",", ":")) == nested(most, kind)
    for depth in (most + 1, 900, 40_000):
        with pytest.raises(ValueError, match="at most 100"):
            strict_json.read(nested(depth, kind))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1, "a": 2}', 'the key "a" is given twice'),
        ('{"a": NaN}', "NaN is not a JSON value"),
        ('{"a": 1e999}', "1e999 is out of range"),
        ('{"a": ' + "1" * 5000 + "}", "a number has more than 4300 digits"),
        ('{"a": "\\ud800"}', "half a surrogate pair"),
        ("[" * 200 + "]" * 200, "at most 100"),
        ("[" * 100_000, "at most 100"),
        ("{", "Expecting"),
        ("[1]", "must be a JSON object"),
    ],
)
def test_arguments_of_calls_are_read_as_bodies_are(text: str, said: str) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": text}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    with pytest.raises(ApiError) as caught:
        parse_chat({"model": "m", "messages": [message]}, "1")
    assert (caught.value.status, caught.value.param) == (400, "messages[0].tool_calls[0].function.arguments")
    assert said in caught.value.message


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content: must be a string or a list (given: 5)"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, 'messages[0].content[0]: must be an object (given: "a")'),
        ({"messages": [3]}, "messages[0]: must be an object (given: 3)"),
        ({"temperature": "hot"}, 'temperature: must be a number (given: "hot")'),
        ({"temperature": 3}, "temperature: must be at most 2 (given: 3)"),
        ({"n": 0}, "n: must be at least 1 (given: 0)"),
        ({"n": 1.0}, "n: must be a whole number (given: 1.0)"),
        ({"stream": 1}, "stream: must be true or false (given: 1)"),
        ({"logit_bias": []}, "logit_bias: must be an object (given: [])"),
        ({"stop": 5}, "stop: must be a string or a list (given: 5)"),
        ({"tool_choice": "any"}, "tool_choice: must be 'none', 'auto' or 'required' or an object (given: \"any\")"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice.function is required"),
        ({"response_format": "json"}, 'response_format: must be an object (given: "json")'),
    ],
)
def test_mistakes_are_told_without_names_of_types(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ApiError) as caught:
        validate(ChatRequest, {"model": "m", "messages": [{"role": "user", "content": "a"}], **fields})
    assert caught.value.message == said
