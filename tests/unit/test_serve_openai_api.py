"""OpenAI's shapes: what is accepted, what is refused and how, and answers that the official client's types accept."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.completion_choice import Logprobs

from serve.api.body import ApiError, model_name, model_not_found, parse_json
from serve.api.openai_answers import Answer, Text, usage
from serve.api.openai_api import parse_chat, parse_completion
from serve.wire import ScoredToken

HELLO = [{"role": "user", "content": "hello"}]


def chat(**fields: Any) -> Any:
    return parse_chat({"model": "m", "messages": HELLO, **fields}, "1")


SCHEMA = {"json_schema": {"name": "a", "schema": {"type": "integer"}}}


def refusal(**fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        chat(**fields)
    assert caught.value.status == 400
    return caught.value


def test_a_plain_request() -> None:
    generation = chat()
    assert (generation.model, generation.stream, generation.include_usage) == ("m", False, False)
    assert generation.calls[0].prompt == ({"role": "user", "content": "hello"},)
    assert generation.calls[0].sampling == {}
    assert generation.calls[0].max_tokens is None


def test_sampling_is_passed_on_as_given() -> None:
    call = chat(temperature=0, top_p=0.5, top_k=3, seed=7, stop="x", ignore_eos=True, repetition_penalty=1.1).calls[0]
    assert call.sampling == {
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 3,
        "seed": 7,
        "stop": ("x",),
        "ignore_eos": True,
        "repetition_penalty": 1.1,
    }


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
def test_both_names_of_the_limit(limit: str) -> None:
    assert chat(**{limit: 5}).calls[0].max_tokens == 5


def test_the_newer_of_two_limits_counts() -> None:
    assert chat(max_tokens=5, max_completion_tokens=6).calls[0].max_tokens == 6


def test_content_parts_and_the_developer_role() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    generation = chat(messages=[{"role": "developer", "content": parts}])
    assert generation.calls[0].prompt == ({"role": "system", "content": "ab"},)


def test_a_message_as_the_client_dumps_it() -> None:
    message = {"role": "assistant", "content": "a", "refusal": None, "tool_calls": None, "annotations": []}
    message["provider_specific_fields"] = {"refusal": None}
    assert chat(messages=[message, *HELLO]).calls[0].prompt[0] == {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("functions", [{"name": "f"}]),
        ("function_call", {"name": "f"}),
        ("suffix", "x"),
        ("reasoning_effort", "low"),
        ("verbosity", "high"),
        ("modalities", ["text", "audio"]),
        ("web_search_options", {}),
        ("service_tier", "flex"),
        ("skip_special_tokens", False),
        ("length_penalty", 1.5),
        ("use_beam_search", True),
        ("best_of", 2),
        ("echo", True),
        ("continue_final_message", True),
        ("guided_json", {"type": "object"}),
        ("add_special_tokens", True),
        ("bad_words", ["x"]),
        ("include_stop_str_in_output", 1),
    ],
)
def test_what_cannot_be_honoured_is_refused(name: str, value: Any) -> None:
    error = refusal(**{name: value})
    assert (error.code, error.param) == ("unsupported_parameter", name)


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 1, "logprobs": False, "logit_bias": {}, "tools": [], "response_format": {"type": "text"}},
        {"logit_bias": None, "logprobs": None, "top_logprobs": None, "response_format": None, "tools": None},
        {"n": None, "stop": None, "temperature": None, "stream": None},
        {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"},
        {"skip_special_tokens": True, "add_generation_prompt": True, "include_stop_str_in_output": False},
        {"length_penalty": 1.0, "use_beam_search": False, "spaces_between_special_tokens": True, "stop_token_ids": []},
        {"reasoning_effort": "none", "verbosity": "medium", "modalities": ["text"], "audio": None, "prediction": None},
        {"chat_template_kwargs": {}, "best_of": 1, "logit_bias": {}, "tools": [], "tool_choice": "auto", "stop": ""},
        {"logprobs": False, "top_logprobs": 0, "parallel_tool_calls": True, "safety_identifier": "x"},
        {"add_special_tokens": False, "stream_options": {"some_new_name": None}},
        {"stream_options": {"include_usage": False, "include_obfuscation": False}},
        {"response_format": {"type": "text", "json_schema": None}, "some_new_name": {"a": None, "b": {}}},
        {"suffix": "", "guided_json": {}, "documents": [], "some_new_name": None, "another": [], "length_penalty": 1},
    ],
)
def test_what_changes_nothing_is_accepted(fields: dict[str, Any]) -> None:
    assert chat(**fields).calls == chat().calls


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": "hello"}, "invalid_value", "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "invalid_value", "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "missing_required_parameter", "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "invalid_value",
            "messages[0].content[0].type",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]},
            "missing_required_parameter",
            "messages[0].tool_calls[0].function",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "prefix": True}]},
            "unsupported_parameter",
            "messages[0].prefix",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "reasoning_content": "y"}]},
            "invalid_value",
            "messages[0].reasoning_content",
        ),
        ({"temperature": "hot"}, "invalid_value", "temperature"),
        ({"temperature": -1}, "invalid_value", "temperature"),
        ({"temperature": 2.5}, "invalid_value", "temperature"),
        ({"top_p": -0.1}, "invalid_value", "top_p"),
        ({"top_p": 1.1}, "invalid_value", "top_p"),
        ({"min_tokens": 5, "max_tokens": 4}, "invalid_value", "min_tokens"),
        ({"min_tokens": 5, "response_format": {"type": "json_object"}}, "invalid_value", "min_tokens"),
        ({"stop_token_ids": [-1]}, "invalid_value", "stop_token_ids"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"max_completion_tokens": 0, "max_tokens": 5}, "invalid_value", "max_completion_tokens"),
        ({"max_tokens": 1.5}, "invalid_value", "max_tokens"),
        ({"stream": "yes"}, "invalid_value", "stream"),
        ({"stop": ["a", 3]}, "invalid_value", "stop[1]"),
        ({"stop": ["x"] * 17}, "invalid_value", "stop"),
        ({"stop": ["x", ""]}, "invalid_value", "stop[1]"),
        ({"n": 0}, "invalid_value", "n"),
        ({"n": True}, "invalid_value", "n"),
        ({"n": 129}, "invalid_value", "n"),
        ({"logprobs": 1}, "invalid_value", "logprobs"),
        ({"top_logprobs": 2}, "invalid_value", "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "invalid_value", "top_logprobs"),
        ({"logit_bias": {"the": 5}}, "invalid_value", "logit_bias"),
        ({"logit_bias": {"5": 101}}, "invalid_value", "logit_bias"),
        ({"logit_bias": {"5": 1, "05": 2}}, "invalid_value", "logit_bias"),
        ({"repetition_penalty": 1e-320}, "invalid_value", "repetition_penalty"),
        ({"logit_bias": [5]}, "invalid_value", "logit_bias"),
        ({"response_format": {"type": "yaml"}}, "invalid_value", "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "missing_required_parameter", "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "missing_required_parameter",
            "response_format.json_schema.schema",
        ),
        ({"temprature": 0}, "unknown_parameter", "temprature"),
        ({"temprature": 1}, "unknown_parameter", "temprature"),
        ({"stream_options": {"usage": True}}, "unknown_parameter", "stream_options.usage"),
        ({"stream_options": {"include_usage": True}}, "invalid_value", "stream_options"),
        ({"stream_options": {"continuous_usage_stats": True}, "stream": False}, "invalid_value", "stream_options"),
        (
            {"stream_options": {"include_obfuscation": True}, "stream": True},
            "unsupported_parameter",
            "stream_options.include_obfuscation",
        ),
        ({"response_format": {"type": "json_object", **SCHEMA}}, "invalid_value", "response_format.json_schema"),
        ({"response_format": {"type": "text", **SCHEMA}}, "invalid_value", "response_format.json_schema"),
    ],
)
def test_bad_parameters_are_named(fields: dict[str, Any], code: str, param: str) -> None:
    error = refusal(**fields)
    assert (error.code, error.param) == (code, param)
    assert error.body()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [(1, 2)]),
        ([[1], [2, 3]], [(1,), (2, 3)]),
        ("", [""]),
        (None, [""]),
    ],
)
def test_forms_of_a_prompt(prompt: Any, prompts: list[Any]) -> None:
    generation = parse_completion({"model": "m", "prompt": prompt}, "1")
    assert [call.prompt for call in generation.calls] == prompts
    assert {call.max_tokens for call in generation.calls} == {16}
    assert len({call.request_id for call in generation.calls}) == len(prompts)


@pytest.mark.parametrize("prompt", [5, [], [[]], [1, "a"], [-1], [1.5], [True], {"a": 1}])
def test_bad_prompts(prompt: Any) -> None:
    with pytest.raises(ApiError) as caught:
        parse_completion({"model": "m", "prompt": prompt}, "1")
    assert (caught.value.status, caught.value.param) == (400, "prompt")


def test_too_many_prompts() -> None:
    with pytest.raises(ApiError, match="at most 2"):
        parse_completion({"model": "m", "prompt": ["a"] * 3}, "1", max_prompts=2)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": 1e999}',
        b"\xff",
        b"[" * 100_000,
        b'{"a":"\\ud800"}',
    ],
)
def test_bad_json(raw: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse_json(raw)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")


def test_json_keeps_text_as_it_is() -> None:
    assert parse_json(b'{"a": "\\ud83d\\ude00 \xc3\xa9"}') == {"a": "😀 é"}


@pytest.mark.parametrize("body", [{}, {"model": 5}, {"model": ""}])
def test_a_model_must_be_named(body: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as caught:
        model_name(body)
    assert (caught.value.status, caught.value.param) == (400, "model")


def test_an_unknown_model_names_the_known() -> None:
    error = model_not_found("x", ["b", "a"])
    assert (error.status, error.code) == (404, "model_not_found")
    assert "a, b" in error.message


@pytest.mark.parametrize(
    ("status", "kind"), [(429, "rate_limit_error"), (503, "server_error"), (404, "invalid_request_error")]
)
def test_error_types(status: int, kind: str) -> None:
    assert ApiError(status, "x").body() == {"error": {"message": "x", "type": kind, "param": None, "code": None}}


def test_answers_are_what_the_client_expects() -> None:
    answer = Answer(chat(), "m@3").whole([Text("text", "stop")], usage(3, 4))
    parsed = ChatCompletion.model_validate(answer, strict=True)
    assert parsed.choices[0].message.content == "text"
    assert parsed.usage is not None
    assert parsed.usage.total_tokens == 7


def test_completions_are_what_the_client_expects() -> None:
    generation = parse_completion({"model": "m", "prompt": ["a", "b"]}, "1")
    texts = [Text("x", "stop"), Text("y", "length")]
    parsed = Completion.model_validate(Answer(generation).whole(texts, usage(2, 2)))
    assert [(choice.index, choice.text, choice.finish_reason) for choice in parsed.choices] == [
        (0, "x", "stop"),
        (1, "y", "length"),
    ]


def test_chunks_are_what_the_client_expects() -> None:
    answer = Answer(chat(stream=True, stream_options={"include_usage": True}))
    opening = answer.opening(0)
    assert opening is not None
    pieces = [answer.chunk(0, Text("a", None)), answer.chunk(0, Text("", "stop"))]
    chunks = [opening, *pieces, answer.closing(usage(1, 1))]
    parsed = [ChatCompletionChunk.model_validate(chunk, strict=True) for chunk in chunks]
    assert parsed[0].choices[0].delta.role == "assistant"
    assert parsed[1].choices[0].delta.content == "a"
    assert parsed[2].choices[0].finish_reason == "stop"
    assert [chunk.usage is None for chunk in parsed] == [True, True, True, False]
    assert parsed[3].choices == []


def test_without_include_usage_chunks_have_none() -> None:
    assert "usage" not in Answer(chat(stream=True)).chunk(0, Text("a", None))


def test_n_texts_of_each_prompt_with_seeds_of_their_own() -> None:
    generation = parse_completion({"model": "m", "prompt": ["a", "b"], "n": 2, "best_of": 2, "seed": 7}, "1")
    assert [(call.prompt, call.sampling["seed"]) for call in generation.calls] == [
        ("a", 7),
        ("a", 8),
        ("b", 7),
        ("b", 8),
    ]
    assert len({call.request_id for call in generation.calls}) == 4
    with pytest.raises(ApiError, match="best_of = 3 is not supported"):
        parse_completion({"model": "m", "prompt": "a", "n": 2, "best_of": 3}, "1")


def test_logprobs_bias_and_schemas_are_passed_on() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    call = chat(logprobs=True, top_logprobs=3, logit_bias={"17": -100}, response_format=wanted).calls[0]
    assert call.sampling == {"logprobs": 3, "logit_bias": {17: -100}, "json_schema": json.dumps(schema)}
    assert chat(logprobs=True).calls[0].sampling == {"logprobs": 0}
    any_object = chat(response_format={"type": "json_object"}).calls[0].sampling
    assert any_object == {"json_schema": '{"type": "object"}'}


def test_a_prompt_can_be_scored_without_a_text() -> None:
    body = {"model": "m", "prompt": [1, 2], "echo": True, "logprobs": 1, "max_tokens": 0}
    call = parse_completion(body, "1").calls[0]
    assert (call.echo, call.max_tokens, call.sampling) == (True, 0, {"logprobs": 1})
    with pytest.raises(ApiError, match="max_tokens"):
        parse_completion({"model": "m", "prompt": [1, 2], "max_tokens": 0}, "1")


TOKENS = [
    ScoredToken(b"a", None, (), 0),
    ScoredToken(b"\xe4\xb8", -2.5, ((b" b", -0.5), (b"c", -1.0)), 1),
    ScoredToken(b"c", -1.0, ((b"c", -1.0), (b"c", -3.0)), 2),
]


def test_logprobs_of_completions_are_what_the_client_expects() -> None:
    generation = parse_completion({"model": "m", "prompt": "a", "echo": True, "logprobs": 2}, "1")
    whole = Answer(generation).whole([Text("a?c", "stop", TOKENS)], usage(1, 2))
    # `construct`, as the client reads answers: its type has no None for the first token, OpenAI's answers have
    logprobs = Logprobs.construct(**whole["choices"][0]["logprobs"])
    assert logprobs.tokens == ["a", "bytes:\\xe4\\xb8", "c"]
    assert logprobs.token_logprobs == [None, -2.5, -1.0]
    assert logprobs.top_logprobs == [None, {" b": -0.5, "c": -1.0, "bytes:\\xe4\\xb8": -2.5}, {"c": -1.0}]
    assert logprobs.text_offset == [0, 1, 2]
    answer = Answer(generation)
    pieces = [answer.chunk(0, Text("", None, [token]))["choices"][0]["logprobs"] for token in TOKENS]
    assert [piece["text_offset"] for piece in pieces] == [[0], [1], [2]]


def test_at_most_four_stop_strings() -> None:
    assert chat(stop=["a", "b", "c", "d"]).calls[0].sampling == {"stop": ("a", "b", "c", "d")}
    assert refusal(stop=list("abcde")).message == "stop: at most 4 strings are taken, 5 were given"


def test_every_chunk_may_tell_the_usage() -> None:
    generation = chat(stream=True, stream_options={"continuous_usage_stats": True})
    assert (generation.include_usage, generation.continuous_usage) == (False, True)
    chunk = Answer(generation).chunk(0, Text("a", None), usage(3, 1))
    told = ChatCompletionChunk.model_validate(chunk, strict=True).usage
    assert told is not None
    assert (told.prompt_tokens, told.completion_tokens) == (3, 1)


@pytest.mark.parametrize(
    "extra",
    [
        {"id": 5},
        {"cache_control": {"type": "ephemeral"}},
        {"refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": []},
        {"tool_calls": None, "reasoning_content": "", "prefix": False},
        {"content": [{"type": "text", "text": "x", "annotations": []}]},
        {"content": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]},
    ],
)
def test_extras_of_messages_that_change_nothing(extra: dict[str, Any]) -> None:
    message = {"role": "assistant", "content": "x", **extra}
    assert chat(messages=[*HELLO, message]).calls[0].prompt[1] == {"role": "assistant", "content": "x"}


def test_a_name_goes_to_the_template() -> None:
    assert chat(messages=[{"role": "user", "content": "x", "name": "Ann"}]).calls[0].prompt[0]["name"] == "Ann"


def test_logprobs_of_chat_are_what_the_client_expects() -> None:
    generation = chat(logprobs=True, top_logprobs=2)
    whole = ChatCompletion.model_validate(
        Answer(generation).whole([Text("a", "stop", TOKENS[1:])], usage(1, 2)), strict=True
    )
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [(entry.token, entry.bytes, entry.logprob) for entry in logprobs.content] == [
        ("\ufffd", [0xE4, 0xB8], -2.5),
        ("c", [99], -1.0),
    ]
    assert [top.token for top in logprobs.content[0].top_logprobs] == [" b", "c"]
    chunk = Answer(chat(logprobs=True, stream=True)).chunk(0, Text("c", None, TOKENS[2:]))
    parsed = ChatCompletionChunk.model_validate(chunk, strict=True).choices[0].logprobs
    assert parsed is not None
    assert parsed.content is not None
    assert parsed.content[0].logprob == -1.0
