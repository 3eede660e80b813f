"""Which parameters may come with a request beside those that are supported.

What would change the answer and is not supported is refused by name. What asks for nothing is accepted: `null`, `""`,
`{}` and `[]` under any name, parameters that change no answer (`user`), and the neutral value of an unsupported one
(`reasoning_effort: "none"`). One table for all routes; a parameter that a route supports is not looked up here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from serve.api import mistakes, openai_requests
from serve.api.body import ApiError, shown
from serve.api.openai_requests import (
    Body,
    ChatRequest,
    CompletionRequest,
    EmbeddingsRequest,
    TranscriptionRequest,
    is_empty,
)
from serve.api.responses import requests as responses_requests
from serve.api.responses.requests import ResponsesRequest

HARMLESS = {
    *("user", "metadata", "store", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    *("request_id", "parallel_tool_calls"),
}
"""Parameters that change no answer, whatever their value."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    # OpenAI's
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": (),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "service_tier": ("auto", "default"),
    "suffix": (),
    "tool_choice": ("none", "auto"),
    "tools": (),
    "verbosity": ("medium",),
    "web_search_options": (),
    # those of vLLM, SGLang, llama.cpp and others, as clients send them
    "add_generation_prompt": (True,),
    "allowed_token_ids": (),
    "bad_words": (),
    "cache_salt": (),
    "chat_template": (),
    "chat_template_kwargs": (),
    "continue_final_message": (False,),
    "detokenize": (True,),
    "documents": (),
    "dry_multiplier": (0,),
    "early_stopping": (False,),
    "enable_thinking": (),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_whitespace_pattern": (),
    "include_reasoning": (True,),
    "include_stop_str_in_output": (False,),
    "kv_transfer_params": (),
    "length_penalty": (1,),
    "logits_processors": (),
    "lora_path": (),
    "max_completion_tokens": (),
    "mirostat": (0,),
    "mm_processor_kwargs": (),
    "no_stop_trim": (False,),
    "priority": (0,),
    "prompt_logprobs": (),
    "reasoning": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "separate_reasoning": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stream_reasoning": (True, False),
    "structured_outputs": (),
    "tfs_z": (1,),
    "thinking": ({"type": "disabled"},),
    "top_a": (0,),
    "truncate_prompt_tokens": (),
    "typical_p": (1,),
    "use_beam_search": (False,),
    "xtc_probability": (0,),
}
"""Parameters that are not supported → the values, beside empty ones, that ask for nothing."""

OF_ROUTE: dict[type[Body], dict[str, tuple[Any, ...]]] = {
    ChatRequest: {"add_special_tokens": (False,)},  # the template has them
    CompletionRequest: {"add_special_tokens": (True,)},
    EmbeddingsRequest: {
        "add_special_tokens": (True,),
        "embed_dtype": ("float32",),
        "endianness": ("native", "little"),
        "normalize": (True,),
        "truncate": (False, "NONE"),
    },
    TranscriptionRequest: {  # a form: its values are texts
        "chunking_strategy": (),
        "include": (),
        "include[]": (),
        "keywords[]": (),
        "known_speaker_names[]": (),
        "known_speaker_references[]": (),
        "language": (),
        "languages[]": (),
        "prompt": (),
        "stream": ("false", "False"),
        "temperature": ("0", "0.0"),
        "timestamp_granularities": (),
        "timestamp_granularities[]": (),
    },
    ResponsesRequest: {
        "add_special_tokens": (False,),
        "background": (False,),
        "background_options": (),
        "context_management": (),
        "conversation": (),
        "max_tokens": (),
        "messages": (),
        "n": (1,),
        "previous_response_id": (),
        "prompt": (),
        "prompt_cache_options": ({"mode": "implicit"},),
        "reasoning": ({"effort": "none"}, {"effort": "none", "summary": None}),
        "response_format": (),
        "store": (False,),
        "truncation": ("disabled",),
    },
}
"""The same, where it depends on the route."""
ASKS_WHEN_EMPTY = {"web_search_options"}
"""OpenAI's `{}` turns it on with its defaults."""

HINTS = {
    "functions": "name them in `tools`",
    "function_call": "use `tools` and `tool_choice`",
    "max_completion_tokens": "use `max_tokens`",
    "enable_thinking": "use `chat_template_kwargs`",
    "thinking": "use `chat_template_kwargs`",
    "guided_json": "use `response_format`",
    "structured_outputs": "use `response_format`",
    "use_beam_search": "use `num_beams`",
}
"""What to do instead; "leave it out" for the others."""
NOT_STORED = "nothing is stored here: send all earlier items in `input`"
HINTS_OF_ROUTE: dict[type[Body], dict[str, str]] = {
    TranscriptionRequest: {
        "language": "a model writes the language that it has learned: leave it out",
        "temperature": "a transcript is the most likely one: leave it out, or send 0",
    },
    ResponsesRequest: {
        "background": "responses are not stored here: wait for the answer, or stream it",
        "context_management": "nothing is shortened here: send the items that the model shall see",
        "conversation": NOT_STORED,
        "max_tokens": "use `max_output_tokens`",
        "max_completion_tokens": "use `max_output_tokens`",
        "messages": "use `input`",
        "n": "an answer here is one text",
        "previous_response_id": NOT_STORED,
        "prompt": "no templates of prompts are stored here: send `instructions` and `input`",
        "response_format": "use `text.format`",
        "guided_json": "use `text.format`",
        "structured_outputs": "use `text.format`",
        "store": "responses are not stored here: leave it out, or send false",
        "truncation": "nothing is cut here: a request beyond the context is refused",
    },
}
"""The same, where it depends on the route."""

Kind = TypeVar("Kind", bound=Body)


def validate(kind: type[Kind], body: dict[str, Any]) -> Kind:
    """Read a body as a request of a kind. Raises ApiError (400) that names the parameter at fault."""
    try:
        return kind.model_validate(supported(kind, body))
    except ValidationError as error:
        raise _bad_parameter(error.errors(include_url=False)) from None


def part(kind: type[Kind], value: Any, place: str) -> Kind:
    """Read a part of a body, which the request has at `place`. Raises ApiError (400) that names the field at fault."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise _bad_parameter(error.errors(include_url=False), place) from None


def supported(kind: type[Body], body: dict[str, Any]) -> dict[str, Any]:
    """Return the body without what asks for nothing. Raises ApiError for what does, and is not supported."""
    neutral, hints = NEUTRAL | OF_ROUTE.get(kind, {}), HINTS | HINTS_OF_ROUTE.get(kind, {})
    known = kind.model_fields
    return {
        name: value for name, value in body.items() if name in known or not _asks_nothing(name, value, neutral, hints)
    }


def _asks_nothing(name: str, value: Any, neutral: Mapping[str, tuple[Any, ...]], hints: Mapping[str, str]) -> bool:
    """Say whether a parameter may be left out of account; False for an unknown one. Raises ApiError."""
    harmless = name in HARMLESS and name not in neutral
    if value is None or harmless or (is_empty(value) and name not in ASKS_WHEN_EMPTY):
        return True
    if name not in neutral:
        return False
    if any(_same(value, one) for one in neutral[name]):
        return True
    message = f"{name} = {shown(value)} is not supported by this server; {hints.get(name, 'leave it out')}"
    raise ApiError(400, message, code="unsupported_parameter", param=name)


def _same(value: Any, other: Any) -> bool:
    """Compare as JSON does: true is not 1, but 1 is 1.0."""
    if isinstance(value, bool) or isinstance(other, bool):
        return value is other
    return bool(value == other)


def invalid(param: str, problem: str) -> ApiError:
    """Return the 400 for a value that cannot be."""
    return ApiError(400, f"{param}: {problem}", code="invalid_value", param=param)


def missing(param: str) -> ApiError:
    """Return the 400 for what has to be given."""
    return ApiError(400, f"{param} is required", code="missing_required_parameter", param=param)


def _bad_parameter(details: list[Any], place: str = "") -> ApiError:
    # A union reports an error for each member; those found deepest are of the member that the client meant.
    deepest = max(len(_place(detail)) for detail in details)
    param = next(_path(_place(detail)) for detail in details if len(_place(detail)) == deepest)
    details = [detail for detail in details if _path(_place(detail)) == param]
    param = f"{place}{'.' if place and param and param[0] != '[' else ''}{param}"
    if details[0]["type"] == "extra_forbidden":
        return ApiError(400, f"unknown parameter {param}", code="unknown_parameter", param=param)
    if details[0]["type"] == "missing":
        return missing(param)
    return invalid(param, mistakes.sentence(details))


def _place(detail: Any) -> list[str | int]:
    """Return where a mistake is, without the names that pydantic gives to a union's members."""
    place = detail["loc"]
    known = _FIELDS | ({place[-1]} if detail["type"] == "extra_forbidden" else set())
    return [part for part in place if isinstance(part, int) or part in known]


_MODELS = (*openai_requests.MODELS, *responses_requests.MODELS)
_FIELDS = {field.alias or name for model in _MODELS for name, field in model.model_fields.items()}


def _path(location: list[str | int]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
