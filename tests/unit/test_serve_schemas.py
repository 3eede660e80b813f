"""Keywords of schemas that nothing would follow are refused, by their place in the request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.api import schemas
from serve.api.body import ApiError
from tests.support import tiny_models
from tests.support.in_process import InProcess, run
from tests.support.tool_templates import HERMES

DRAFT_7 = "http://json-schema.org/draft-07/schema#"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = tiny_models.tokenizer()
    tokenizer.chat_template = HERMES
    return tiny_models.language_model(tmp_path_factory.mktemp("tiny"), fast=tokenizer)


@pytest.mark.parametrize(
    ("schema", "place", "said"),
    [
        ({"type": "string", "maxlength": 3}, ".maxlength", "did you mean maxLength"),
        ({"properties": {"a": {"anyOf": [{"minimun": 1}]}}}, ".properties.a.anyOf[0].minimun", "did you mean minimum"),
        ({"$defs": {"a": {"items": [{"extends": {}}]}}}, ".$defs.a.items[0].extends", "leave it out"),
        ({"items": {"nullable": True}}, ".items.nullable", '"null"'),
        ({"type": "string", "contentEncoding": "base64"}, ".contentEncoding", "no keyword"),
        ({"const": 1, "x-guidance": {"lenient": True}}, ".x-guidance", "no keyword"),
        ({"propertyOrdering": ["a"], "type": "object"}, ".propertyOrdering", "no keyword"),
        ({"$schema": DRAFT_7, "prefixItems": [{"const": 1}]}, ".prefixItems", "no keyword of draft-07"),
        ({"$schema": "http://json-schema.org/draft-04/schema#", "const": 1}, ".const", "no keyword of draft-04"),
        ({"$schema": DRAFT_7, "unevaluatedProperties": False}, ".unevaluatedProperties", "no keyword of draft-07"),
        ({"properties": {"a": {"$schema": DRAFT_7}}}, ".properties.a.$schema", "root"),
        ({"$schema": 7}, ".$schema", "root"),
    ],
)
def test_a_keyword_that_would_be_passed_over_is_refused(schema: dict[str, Any], place: str, said: str) -> None:
    with pytest.raises(ApiError, match=said) as caught:
        schemas.check(schema, "here")
    assert (caught.value.status, caught.value.param) == (400, f"here{place}")


@pytest.mark.parametrize(
    "schema",
    [
        {"title": "A", "type": "object", "properties": {"maxlength": {"default": {"foo": 1}, "x-order": 3}}},
        {"enum": [{"foo": 1}], "examples": [{"bar": 1}], "nullable": False, "$comment": "c"},
        {
            "$schema": DRAFT_7,
            "items": [{"const": 1}],
            "additionalItems": False,
            "definitions": {"foo": {"type": "null"}},
        },
        {"$schema": "https://json-schema.org/draft/2020-12/schema", "prefixItems": [True], "not": {}},
        {"oneOf": [{"$ref": "#"}], "discriminator": {"propertyName": "kind", "mapping": {}}},
    ],
)
def test_notes_values_and_names_of_properties_are_no_keywords(schema: dict[str, Any]) -> None:
    schemas.check(schema, "here")


def chain(length: int) -> dict[str, Any]:
    """Return a schema whose definitions refer to each other in a row, as lists of lists."""
    rows = {f"d{at}": {"type": "array", "items": {"$ref": f"#/$defs/d{at + 1}"}} for at in range(length)}
    return {"$defs": {**rows, f"d{length}": {"const": 1}}, "$ref": "#/$defs/d0"}


def test_references_that_would_overflow_the_stack_of_who_compiles_them_are_refused() -> None:
    with pytest.raises(ApiError, match=r"here: it has 3005 levels, with what it refers to, in all; at most 1000"):
        schemas.check(chain(1500), "here")
    schemas.check(chain(450), "here")
    many = {f"m{at}": {"properties": {"next": {"anyOf": [{"$ref": "#/$defs/m0"}]}}} for at in range(900)}
    schemas.check({"$defs": many, "$ref": "#/$defs/m1"}, "here")  # many of them are not many levels


@pytest.mark.parametrize("reference", ["#name", "http://example.org/a", "#/items/3", "#/$defs/a%20b/items"])
def test_references_of_any_form_count(reference: str) -> None:
    schemas.check_size({"$ref": reference, "$defs": {"a b": {"items": [1]}}}, "here")


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        (
            {"anyOf": [{"pattern": "a" * 5001}, {"patternProperties": {"b" * 5001: True}}]},
            "10002 characters of pattern",
        ),
        ({"type": "object", "required": [f"p{at}" for at in range(5001)]}, "5001 names of properties"),
        ({"properties": {f"p{at}": True for at in range(5001)}}, "5001 names of properties"),
        ({"patternProperties": {f"^p{at}$": True for at in range(101)}}, "101 patternProperties"),
        ({"const": [[] for _ in range(20_000)]}, "20002 objects and lists"),
        ({"enum": list(range(50_001))}, "50001 values of enum"),
    ],
)
def test_what_would_take_minutes_or_end_the_process_is_refused(schema: dict[str, Any], said: str) -> None:
    with pytest.raises(ApiError, match=f"here: it has {said}.* in all; at most"):
        schemas.check_size(schema, "here")


def function(strict: bool, schema: dict[str, Any]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"a": schema}, "required": ["a"], "additionalProperties": False}
    return {"type": "function", "function": {"name": "f", "strict": strict, "parameters": parameters}}


def asked(**fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "hi"}]
    return {"model": "tiny", "messages": messages, "max_tokens": 40, "temperature": 0, **fields}


def format_of(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def test_requests_are_refused_by_the_place_of_the_keyword_and_functions_that_are_not_strict_pass(
    directory: Path,
) -> None:
    misspelt = {"type": "boolean", "minimun": 1}

    async def scenario(client: httpx.AsyncClient, backend: InProcess) -> None:
        async def param(**fields: Any) -> Any:
            answer = await client.post("/v1/chat/completions", json=asked(**fields))
            return (answer.status_code, answer.json().get("error", {}).get("param"))

        where = "response_format.json_schema.schema.minimun"
        assert await param(response_format=format_of(misspelt)) == (400, where)
        strict = "tools[0].function.parameters.properties.a.minimun"
        assert await param(tools=[function(True, misspelt)]) == (400, strict)
        assert await param(tools=[function(False, misspelt)], tool_choice="required") == (200, None)
        parameters = "tools[0].function.parameters"
        assert await param(tools=[function(False, {"pattern": "a" * 10_001})]) == (400, parameters)

    run(directory, scenario)


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_that_turns_out_too_complex_is_the_requests_fault(directory: Path, stream: bool) -> None:
    endless = {"type": "string", "pattern": "^a{1000000000}$"}

    async def scenario(client: httpx.AsyncClient, backend: InProcess) -> None:
        answer = await client.post(
            "/v1/chat/completions", json=asked(response_format=format_of(endless), stream=stream)
        )
        assert answer.status_code == (200 if stream else 400)
        assert '"param":"response_format"' in answer.text
        assert "too complex" in answer.text
        assert '"type":"invalid_request_error"' in answer.text
        assert "[DONE]" not in answer.text

    run(directory, scenario)


def test_the_prompt_at_fault_is_named_among_several(directory: Path) -> None:
    async def scenario(client: httpx.AsyncClient, backend: InProcess) -> None:
        async def error(prompt: Any) -> Any:
            answer = await client.post("/v1/completions", json={"model": "tiny", "prompt": prompt, "max_tokens": 1})
            return answer.json()["error"]

        assert (await error([[1], [5000]]))["param"] == "prompt[1]"
        assert (await error(["a", "b " * 600]))["message"].startswith("prompt[1]: this model's context is 512 tokens")
        assert (await error([5000]))["param"] == "prompt"

    run(directory, scenario)
