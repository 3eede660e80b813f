"""Calls of functions in the answers of families of models: the same pieces, however the answer was cut."""

from __future__ import annotations

import json
from typing import Any

import pytest

from serve.engines.tools.formats import FORMATS, marker_tokens, tool_format
from serve.engines.tools.lark import grammar
from serve.engines.tools.parser import CallParser, TextPiece
from serve.wire import Tools
from tests.support import tiny_models, tool_templates

Answer = tuple[str, list[tuple[str, str]], int]


def read(form: str, parts: list[str], parallel: bool = True) -> Answer:
    """Return text, calls and how many of them are complete."""
    parser = CallParser(FORMATS[form], ["f", "g"], parallel)
    whole, text = "".join(parts), ""
    names: dict[int, str] = {}
    arguments: dict[int, str] = {}
    pieces = [piece for part in parts for piece in parser.push(part)] + parser.finish()
    for piece in pieces:
        if isinstance(piece, TextPiece):
            assert whole[piece.start : piece.start + len(piece.text)] == piece.text
            text += piece.text
            continue
        if piece.name is not None:
            assert piece.number not in names
            names[piece.number] = piece.name
        arguments[piece.number] = arguments.get(piece.number, "") + piece.arguments
    return text, [(names[at], arguments[at]) for at in names], parser.complete


CASES: list[tuple[str, str, str, list[tuple[str, str]]]] = [
    ("hermes", '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', "", [("f", '{"a": 1}')]),
    (
        "hermes",
        'Sure.\n\n<tool_call>\n{"name": "f", "arguments": {"a": [1, {"b": 2}]}}\n</tool_call>\n'
        '<tool_call>{"arguments": {}, "name": "else"}</tool_call>\n',
        "Sure.",
        [("f", '{"a": [1, {"b": 2}]}'), ("else", "{}")],
    ),
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {"a": "}<tool_call>\\\\\\"{"}}</tool_call>',
        "",
        [("f", '{"a": "}<tool_call>\\\\\\"{"}')],
    ),
    (
        "hermes",
        '<tool_call>{"name": "f"}\n<tool_call>{"name": "g", "arguments": null}</tool_call> and text',
        " and text",
        [("f", "{}"), ("g", "{}")],
    ),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", '{"a": 1}')]),
    ("hermes", "a < b <tool_call> x <tool_call", "a < b <tool_call> x <tool_call", []),
    ("hermes", "  \n hi ", "  \n hi ", []),
    ("hermes", '<tool_call>{"nam', '<tool_call>{"nam', []),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}}\n</tool', "", [("f", '{"a": 1}')]),
    ("hermes", '{"name": "f", "arguments": {}}', '{"name": "f", "arguments": {}}', []),
    (
        "mistral",
        '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}, "id": "x"}]',
        "",
        [("f", '{"a": 1}'), ("g", "{}")],
    ),
    ("mistral", 'Hi[TOOL_CALLS]{"name": "f", "arguments": {}} ok', "Hi ok", [("f", "{}")]),
    ("mistral", "see [TOOL_CALLS] [1]", "see [TOOL_CALLS] [1]", []),
    (
        "llama3",
        '{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}',
        "",
        [("f", '{"a": 1}'), ("g", "{}")],
    ),
    ("llama3", '<|python_tag|>{"name": "any", "parameters": {}}', "", [("any", "{}")]),
    ("llama3", "<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
    ("llama3", '{"type": "function", "function": "f", "parameters": {"q": null}}', "", [("f", '{"q": null}')]),
    ("llama3", '{"name": "Anna", "age": 5}', '{"name": "Anna", "age": 5}', []),
    ("llama3", '{"answer": 5} or {"name": "f"}', '{"answer": 5} or {"name": "f"}', []),
    ("json", '\n{"name": "f", "arguments": {}}\n{"name": "g", "arguments": {}}\n', "", [("f", "{}"), ("g", "{}")]),
    ("json", '[{"name": "f", "arguments": {}}, {"name": "g"}] so', " so", [("f", "{}"), ("g", "{}")]),
    ("json", '[1, 2] [{"name": "f"}]', '[1, 2] [{"name": "f"}]', []),
    ("json", '[{"name": "Bob"}, {"name": "f"}]', '[{"name": "Bob"}, {"name": "f"}]', []),
    ("llama3", '[{"name": "f", "parameters": {}}]', '[{"name": "f", "parameters": {}}]', []),
    ("json", 'so: {"name": "f", "arguments": {}}', 'so: {"name": "f", "arguments": {}}', []),
    ("json", '{"name": "f", "arguments": 5}', '{"name": "f", "arguments": 5}', []),
    ("json", '{"name": "f", "arguments": {}, "arguments": {"b": 1}}', "", [("f", "{}")]),
]


@pytest.mark.parametrize(("form", "answer", "text", "calls"), CASES)
def test_an_answer_is_taken_apart_the_same_however_it_is_cut(
    form: str, answer: str, text: str, calls: list[tuple[str, str]]
) -> None:
    whole = read(form, [answer])
    assert whole == (text, calls, len(calls))
    assert read(form, list(answer)) == whole
    for first in range(len(answer) + 1):
        for second in (first, min(first + 3, len(answer))):
            assert read(form, [answer[:first], answer[first:second], answer[second:]]) == whole


def test_a_call_that_was_cut_is_not_complete() -> None:
    assert read("hermes", ['<tool_call>{"name": "f", "arguments": {"a": ']) == ("", [("f", '{"a": ')], 0)


def test_arguments_come_as_they_grow() -> None:
    parser = CallParser(FORMATS["hermes"], ["f"])
    parts = ['<tool_call>{"name": "f"', ', "arguments": {"a"', ": 1", "}}", "</tool_call>"]
    told = [[(p.name, p.arguments) for p in parser.push(part) if not isinstance(p, TextPiece)] for part in parts]
    assert told == [[], [("f", '{"a"')], [(None, ": 1")], [(None, "}")], []]


@pytest.mark.parametrize("form", FORMATS)
def test_an_answer_of_one_call_ends_with_it(form: str) -> None:
    one = {"hermes": "<tool_call>", "mistral": "[TOOL_CALLS]["}.get(form, "") + '{"name": "f", "arguments": {}}'
    parser = CallParser(FORMATS[form], ["f"], parallel=False)
    assert not parser.ended
    assert len(parser.push(one + one + "text")) == 1
    assert parser.ended


# -- which format ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "template"), tool_templates.FAMILIES.items(), ids=tool_templates.FAMILIES)
def test_a_template_tells_how_calls_are_written(name: str, template: str) -> None:
    form = tool_format(template)
    assert form is not None
    assert form.name == name


def test_templates_without_tools_and_of_other_forms() -> None:
    assert tool_format(tiny_models.CHAT_TEMPLATE) is None
    with pytest.raises(ValueError, match="<function="):
        tool_format("{{ tools }}<tool_call>\n<function=f>")


# -- grammars --------------------------------------------------------------------------------------------------------

PARAMETERS = {
    "type": "object",
    "properties": {"a": {"$ref": "#/$defs/number"}},
    "required": ["a"],
    "additionalProperties": False,
    "$defs": {"number": {"type": "integer"}},
}
FUNCTIONS = ({"name": "f", "parameters": PARAMETERS}, {"name": "g", "parameters": {"type": "object"}})
CALLS = {
    "hermes": ('<tool_call>\n{"name": "f", "arguments": %s}\n</tool_call>', "\n"),
    "llama3": ('{"name": "f", "parameters": %s}', "; "),
    "mistral": ('[TOOL_CALLS][{"name": "f", "arguments": %s}]', None),
    "json": ('{"name": "f", "arguments": %s}', "\n"),
}


@pytest.fixture(scope="module", params=["marks are tokens", "marks are text"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    from tokenizers import AddedToken

    made = tiny_models.tokenizer()
    if request.param == "marks are tokens":
        made.add_tokens([AddedToken(mark, special=False) for mark in ("<tool_call>", "</tool_call>")])
        made.add_tokens([AddedToken("[TOOL_CALLS]", special=True)], special_tokens=True)
    return made


def follows(rules: str, text: str, tokenizer: Any) -> bool:
    """Say whether a text is one of the grammar's, from its first token to its last."""
    from llguidance import LLMatcher
    from llguidance.hf import from_tokenizer

    vocabulary = from_tokenizer(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    matcher = LLMatcher(vocabulary, LLMatcher.grammar_from_lark(rules), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


@pytest.mark.parametrize("name", FORMATS)
def test_a_grammar_takes_calls_and_nothing_else(name: str, tokenizer: Any) -> None:
    form = FORMATS[name]
    tokens = marker_tokens(form, tokenizer)
    call, between = CALLS[name]
    good, bad = call % '{"a": 1}', call % '{"a": "x"}'

    def taken(text: str, parallel: bool = True, schema: str | None = None, **fields: Any) -> bool:
        rules = grammar(form, Tools(FUNCTIONS, **fields), parallel, tokens, schema)
        assert rules is not None
        return follows(rules, text, tokenizer)

    assert taken(good, required=True)
    assert not taken(bad, required=True)
    assert not taken("hello", required=True)
    assert not taken(good, required=True, named="g")
    assert taken(call.replace('"f"', '"g"') % '{"x": 1}', required=True, named="g")
    if between is not None:
        assert taken(good + between + good, required=True)
        assert not taken(good + between + good, parallel=False, required=True)
    # the model decides, and strict arguments follow their schema
    assert taken("hello", strict=("f",))
    assert taken(good, strict=("f",))
    assert not taken(bad, strict=("f",))
    assert taken(bad.replace('"f"', '"g"'), strict=("f",))


def test_an_answer_in_a_schema_or_a_call(tokenizer: Any) -> None:
    form, schema = FORMATS["hermes"], json.dumps({"enum": [17]})
    rules = grammar(form, Tools(FUNCTIONS), True, marker_tokens(form, tokenizer), schema)
    assert rules is not None
    assert follows(rules, "17", tokenizer)
    assert follows(rules, CALLS["hermes"][0] % '{"a": 1}', tokenizer)
    assert not follows(rules, "18", tokenizer)
    with pytest.raises(ValueError, match="cannot be told from a call"):
        grammar(FORMATS["json"], Tools(FUNCTIONS), True, {}, schema)


def test_without_demands_there_is_no_grammar() -> None:
    assert grammar(FORMATS["hermes"], Tools(FUNCTIONS), True, {}) is None
