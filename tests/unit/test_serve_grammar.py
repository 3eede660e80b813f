"""Schemas that no text can follow are refused, with the reason and the function that they belong to."""

from __future__ import annotations

import json
from typing import Any

import pytest

from serve.engines.grammar import Constraint, Grammars
from serve.engines.protocol import RequestError
from serve.engines.tools.formats import FORMATS
from serve.engines.tools.lark import grammar
from serve.wire import Tools
from tests.support import tiny_models


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(tiny_models.tokenizer(), 320, frozenset([tiny_models.EOS]))


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"$ref": "#"}, "there is no value that it describes"),
        ({"allOf": [{"$ref": "#"}]}, "there is no value that it describes"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"type": "string", "pattern": "(?=a)a"}, "look-ahead"),
        ({"type": "cat"}, "Invalid type: cat"),
        ({"$ref": "#/$defs/none"}, "does not exist"),
        ({"$ref": "file:///etc/passwd"}, "not fetched"),
        ({"enum": []}, "Unsatisfiable"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"oneOf": [{"type": "integer"}, {"minimum": 1}]}, "use anyOf"),
        ({"type": "integer", "multipleOf": 1_000_000_007}, "too complex"),
        ({"type": "integer", "minimum": 10**40}, "minimum or maximum is beyond"),
        ({"const": "b", "pattern": "^a"}, "no text fits it"),
    ],
)
def test_why_a_schema_cannot_be_followed(grammars: Grammars, schema: Any, said: str) -> None:
    with pytest.raises(RequestError) as caught:
        grammars.constraint(json.dumps(schema))
    assert caught.value.field == "response_format"
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_text_that_cannot_go_on_is_not_whole() -> None:
    from llguidance import LLMatcher
    from llguidance.hf import from_tokenizer

    tokenizer = tiny_models.tokenizer()
    vocabulary = from_tokenizer(tokenizer, 320, [tiny_models.EOS])
    stuck = Constraint(LLMatcher(vocabulary, LLMatcher.grammar_from_json_schema('{"$ref": "#"}'), log_level=0), 320)
    assert stuck.failure is None
    stuck.forbidden()
    assert (stuck.complete, stuck.failure) == (True, "InternalError")
    whole = Constraint(LLMatcher(vocabulary, LLMatcher.grammar_from_json_schema('{"const": 7}'), log_level=0), 320)
    for token in tokenizer("7")["input_ids"]:
        whole.observe(token)
    assert (whole.complete, whole.failure) == (True, None)


@pytest.mark.parametrize("schema", [{}, {"const": ""}, {"type": "null"}, {"anyOf": [{"$ref": "#"}, {"type": "null"}]}])
def test_schemas_that_have_values(grammars: Grammars, schema: Any) -> None:
    assert not grammars.constraint(json.dumps(schema)).forbidden().all()


@pytest.mark.parametrize("form", sorted(FORMATS))
@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"type": "cat"}, "Invalid type: cat"), ({"type": "string", "pattern": "("}, "unclosed group")],
)
def test_the_function_at_fault_is_named(grammars: Grammars, form: str, wrong: Any, said: str) -> None:
    parameters = {"one": {}, "two-b": {"a": wrong}, "three": {}}
    functions = tuple(
        {"name": name, "description": "", "parameters": {"type": "object", "properties": properties}}
        for name, properties in parameters.items()
    )
    rules = grammar(FORMATS[form], Tools(functions, required=True), True, {})
    with pytest.raises(RequestError) as caught:
        grammars.constraint(None, rules)
    assert caught.value.field == "tools"
    assert "function 'two-b': " in str(caught.value)
    assert said in str(caught.value)
