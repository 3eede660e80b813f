"""OpenAI's requests: bodies are parsed strictly into calls. Pure functions over JSON values; nothing here knows HTTP,
Ray or a model. The answers are in `serve.api.openai_answers`.

A parameter that would change the answer and cannot be honoured is refused, never ignored. One that changes nothing
(`user`, `metadata`) is accepted, and so is the neutral value of an unsupported one (`tools: []`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError

from serve.api.body import ApiError, shown
from serve.api.openai_requests import (
    ChatRequest,
    CompletionRequest,
    JsonSchema,
    Message,
    Request,
    ResponseFormat,
    StreamOptions,
    TextPart,
)
from serve.engines.protocol import RequestError, SamplingParams
from serve.wire import GenerateCall, Prompt

HARMLESS = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    "parallel_tool_calls",
}
NEUTRAL: dict[str, tuple[str, ...]] = {
    "tools": ("[]",),
    "tool_choice": ('"none"', '"auto"'),
    "functions": ("[]",),
    "function_call": ('"none"', '"auto"'),
    "modalities": ('["text"]',),
    "suffix": ('""',),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}
"""Parameters that are not supported → the values, as JSON, that ask for nothing. `null` always does."""

COMPLETION_MAX_TOKENS = 16
"""OpenAI's default for /v1/completions; chat has none but the context."""
MOST_TEXTS = 128
"""Most texts of one request: prompts times `n`."""

SAMPLING_FIELDS = (
    *("temperature", "top_p", "top_k", "min_p", "seed", "ignore_eos"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
)


@dataclass(frozen=True)
class Generation:
    """A parsed request: one call for each text, the `n` of each prompt together, and how to send the answer."""

    model: str
    chat: bool
    request_id: str
    calls: tuple[GenerateCall, ...]
    stream: bool
    include_usage: bool
    n: int = 1

    @property
    def logprobs(self) -> bool:
        """Whether the answer tells log-probabilities."""
        return self.calls[0].sampling.get("logprobs") is not None


Kind = TypeVar("Kind", bound=Request)


def parse_chat(body: dict[str, Any], request_id: str) -> Generation:
    """Parse the body of /v1/chat/completions. Raises ApiError (400) naming the parameter at fault."""
    request = _validate(ChatRequest, body)
    limits = {limit for limit in (request.max_tokens, request.max_completion_tokens) if limit is not None}
    if len(limits) > 1:
        raise ApiError(400, "max_tokens and max_completion_tokens differ: give one of them", param="max_tokens")
    if request.top_logprobs is not None and not request.logprobs:
        raise _invalid("top_logprobs", "needs logprobs: true")
    messages = tuple(_message(message, index) for index, message in enumerate(request.messages))
    max_tokens = limits.pop() if limits else None
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    calls = _calls(request, f"chatcmpl-{request_id}", [messages], max_tokens, logprobs, MOST_TEXTS)
    return _generation(request, True, f"chatcmpl-{request_id}", calls)


def parse_completion(body: dict[str, Any], request_id: str, max_prompts: int = MOST_TEXTS) -> Generation:
    """Parse the body of /v1/completions: one text, several, one list of token ids, or several."""
    request = _validate(CompletionRequest, body)
    if request.best_of not in (None, request.n or 1):
        message = f"best_of = {request.best_of} is not supported by this server; leave it out"
        raise ApiError(400, message, code="unsupported_parameter", param="best_of")
    max_tokens = COMPLETION_MAX_TOKENS if request.max_tokens is None else request.max_tokens
    prompts = _prompts(request.prompt)
    echo = bool(request.echo)
    calls = _calls(request, f"cmpl-{request_id}", prompts, max_tokens, request.logprobs, max_prompts, echo)
    return _generation(request, False, f"cmpl-{request_id}", calls)


def _validate(kind: type[Kind], body: dict[str, Any]) -> Kind:
    try:
        return kind.model_validate(_supported(body))
    except ValidationError as error:
        raise _bad_parameter(error.errors(include_url=False)) from None


def _supported(body: dict[str, Any]) -> dict[str, Any]:
    """Return the body without what changes nothing. Raises ApiError for what would, and is not supported."""
    for name, neutral in NEUTRAL.items():
        value = body.get(name)
        if value is not None and json.dumps(value) not in neutral:
            message = f"{name} = {shown(value)} is not supported by this server; leave it out"
            raise ApiError(400, message, code="unsupported_parameter", param=name)
    return {key: value for key, value in body.items() if key not in NEUTRAL and key not in HARMLESS}


def _bad_parameter(details: list[Any]) -> ApiError:
    # A union reports one error per member; the one found deepest is the member that the client meant.
    detail = max(details, key=lambda detail: len(detail["loc"]))
    known = _FIELDS | ({detail["loc"][-1]} if detail["type"] == "extra_forbidden" else set())
    param = _path([part for part in detail["loc"] if isinstance(part, int) or part in known])
    if detail["type"] == "extra_forbidden":
        return ApiError(400, f"unknown parameter {param}", code="unknown_parameter", param=param)
    if detail["type"] == "missing":
        return ApiError(400, f"{param} is required", code="missing_required_parameter", param=param)
    return _invalid(param, f"{detail['msg']} (given: {shown(detail.get('input'))})")


_FIELDS = {
    field.alias or name
    for model in (
        *(ChatRequest, CompletionRequest, Message, TextPart, StreamOptions),
        *(ResponseFormat, JsonSchema),
    )
    for name, field in model.model_fields.items()
}


def _path(location: list[str | int]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")


def _invalid(param: str, problem: str) -> ApiError:
    return ApiError(400, f"{param}: {problem}", code="invalid_value", param=param)


def _message(message: Message, index: int) -> dict[str, str]:
    for name, value in (message.model_extra or {}).items():
        if value not in (None, [], {}):
            param = f"messages[{index}].{name}"
            raise ApiError(400, f"{param} is not supported", code="unsupported_parameter", param=param)
    content = message.content
    if content is None:
        param = f"messages[{index}].content"
        raise ApiError(400, f"{param} is required", code="missing_required_parameter", param=param)
    text = content if isinstance(content, str) else "".join(part.text for part in content)
    return {"role": "system" if message.role == "developer" else message.role, "content": text}


def _prompts(prompt: Any) -> list[Prompt]:
    if isinstance(prompt, str):
        return [prompt]
    if _is_token_ids(prompt):
        return [tuple(prompt)]
    if isinstance(prompt, list) and prompt:
        if all(isinstance(part, str) for part in prompt):
            return list(prompt)
        if all(_is_token_ids(part) for part in prompt):
            return [tuple(part) for part in prompt]
    wanted = "a string, a list of strings, a list of token ids, or a list of such lists, none of them empty"
    raise ApiError(400, f"prompt must be {wanted} (given: {shown(prompt)})", code="invalid_value", param="prompt")


def _is_token_ids(value: Any) -> bool:
    whole = isinstance(value, list) and bool(value)
    return whole and all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in value)


def _calls(
    request: Request,
    request_id: str,
    prompts: list[Prompt],
    max_tokens: int | None,
    logprobs: int | None,
    most_texts: int,
    echo: bool = False,
) -> tuple[GenerateCall, ...]:
    """Return `n` calls for each prompt. With a seed, each of the `n` has one of its own: seed, seed + 1, …"""
    n = request.n or 1
    if n * len(prompts) > most_texts:
        message = f"{len(prompts)} prompts with n = {n} in one request; at most {most_texts} texts are taken"
        raise ApiError(400, message, code="invalid_value", param="prompt" if len(prompts) > 1 else "n")
    sampling = _sampling(request, logprobs)
    _check_sampling(sampling, max_tokens, echo)
    seeds = [{} if request.seed is None else {"seed": request.seed + choice} for choice in range(n)]
    return tuple(
        GenerateCall(f"{request_id}-{at * n + choice}", prompt, {**sampling, **seeds[choice]}, max_tokens, echo)
        for at, prompt in enumerate(prompts)
        for choice in range(n)
    )


def _sampling(request: Request, logprobs: int | None) -> dict[str, Any]:
    sampling = {name: getattr(request, name) for name in SAMPLING_FIELDS if getattr(request, name) is not None}
    if request.stop:
        sampling["stop"] = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop)
    if logprobs is not None:
        sampling["logprobs"] = logprobs
    if request.logit_bias:
        sampling["logit_bias"] = _logit_bias(request.logit_bias)
    if request.response_format is not None and request.response_format.type != "text":
        sampling["json_schema"] = json.dumps(_schema(request.response_format))
    return sampling


def _logit_bias(bias: dict[str, float]) -> dict[int, float]:
    for token in bias:
        if not (token.isascii() and token.isdigit()):
            raise _invalid("logit_bias", f"{shown(token)} is no token id")
    return {int(token): value for token, value in bias.items()}


def _schema(wanted: ResponseFormat) -> dict[str, Any]:
    if wanted.type == "json_object":
        return {"type": "object"}
    if wanted.json_schema is None:
        param = "response_format.json_schema"
        raise ApiError(400, f"{param} is required", code="missing_required_parameter", param=param)
    return wanted.json_schema.schema_


def _check_sampling(sampling: dict[str, Any], max_tokens: int | None, echo: bool) -> None:
    try:
        limit = 1 if max_tokens is None else max_tokens
        SamplingParams(**{**sampling, "max_tokens": limit, "prompt_logprobs": echo})
    except RequestError as error:
        raise ApiError(400, str(error), code="invalid_value", param=error.field) from None


def _generation(request: Request, chat: bool, request_id: str, calls: tuple[GenerateCall, ...]) -> Generation:
    include_usage = bool(request.stream_options and request.stream_options.include_usage)
    return Generation(request.model, chat, request_id, calls, bool(request.stream), include_usage, request.n or 1)
