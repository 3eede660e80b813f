"""OpenAI's shapes, in and out: bodies are parsed strictly, answers and errors are built as the official client reads
them. Pure functions over JSON values; nothing here knows HTTP, Ray or a model.

A parameter that would change the answer and cannot be honoured is refused, never ignored. One that changes nothing
(`user`, `metadata`) is accepted, and so is the neutral value of an unsupported one (`n: 1`, `logprobs: false`).
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serve.body import ApiError, shown
from serve.engine import RequestError, SamplingParams
from serve.wire import GenerateCall, Prompt

HARMLESS = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    "parallel_tool_calls",
}
NEUTRAL: dict[str, tuple[str, ...]] = {
    "n": ("1",),
    "best_of": ("1",),
    "logprobs": ("false",),
    "top_logprobs": (),
    "logit_bias": ("{}",),
    "response_format": ('{"type": "text"}',),
    "tools": ("[]",),
    "tool_choice": ('"none"', '"auto"'),
    "functions": ("[]",),
    "function_call": ('"none"', '"auto"'),
    "modalities": ('["text"]',),
    "echo": ("false",),
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

SAMPLING_FIELDS = (
    *("temperature", "top_p", "top_k", "min_p", "seed", "ignore_eos"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
)


@dataclass(frozen=True)
class Generation:
    """A parsed request: one call for each prompt, and how to send the answer."""

    model: str
    chat: bool
    request_id: str
    calls: tuple[GenerateCall, ...]
    stream: bool
    include_usage: bool


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _StreamOptions(_Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class _TextPart(_Body):
    type: Literal["text"]
    text: str


class _Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_TextPart] | None = None
    name: str | None = None


class _Request(_Body):
    model: str
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    ignore_eos: bool | None = None


class _ChatRequest(_Request):
    messages: Annotated[list[_Message], Field(min_length=1)]
    max_completion_tokens: int | None = None


class _CompletionRequest(_Request):
    prompt: Any


Request = TypeVar("Request", bound=_Request)


def parse_chat(body: dict[str, Any], request_id: str) -> Generation:
    """Parse the body of /v1/chat/completions. Raises ApiError (400) naming the parameter at fault."""
    request = _validate(_ChatRequest, body)
    limits = {limit for limit in (request.max_tokens, request.max_completion_tokens) if limit is not None}
    if len(limits) > 1:
        raise ApiError(400, "max_tokens and max_completion_tokens differ: give one of them", param="max_tokens")
    messages = tuple(_message(message, index) for index, message in enumerate(request.messages))
    return _generation(request, True, f"chatcmpl-{request_id}", [messages], limits.pop() if limits else None)


def parse_completion(body: dict[str, Any], request_id: str, max_prompts: int = 128) -> Generation:
    """Parse the body of /v1/completions: one text, several, one list of token ids, or several."""
    request = _validate(_CompletionRequest, body)
    prompts = _prompts(request.prompt)
    if len(prompts) > max_prompts:
        raise ApiError(400, f"{len(prompts)} prompts in one request; at most {max_prompts} are taken", param="prompt")
    max_tokens = COMPLETION_MAX_TOKENS if request.max_tokens is None else request.max_tokens
    return _generation(request, False, f"cmpl-{request_id}", prompts, max_tokens)


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


class Answer:
    """Builds the objects of one answer: the whole of it, or its chunks."""

    def __init__(self, generation: Generation, fingerprint: str | None = None) -> None:
        self._generation = generation
        self._common = {
            "id": generation.request_id,
            "created": int(time.time()),
            "model": generation.model,
            "system_fingerprint": fingerprint,
        }

    def whole(self, texts: list[str], reasons: list[str | None], counted: dict[str, int]) -> dict[str, Any]:
        """Return the body of an answer that is not streamed, one choice per prompt."""
        kind = "chat.completion" if self._generation.chat else "text_completion"
        choices = [self._choice(i, text, reason) for i, (text, reason) in enumerate(zip(texts, reasons, strict=True))]
        return {**self._common, "object": kind, "choices": choices, "usage": counted}

    def opening(self, index: int) -> dict[str, Any] | None:
        """Return the chunk that opens a choice: chat names the role first, completions have none."""
        return self._chunk([self._delta(index, {"role": "assistant", "content": ""}, None)]) if self._chat else None

    def chunk(self, index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        """Return one chunk of the choice `index`."""
        if self._chat:
            return self._chunk([self._delta(index, {"content": text} if text else {}, finish_reason)])
        return self._chunk([self._choice(index, text, finish_reason)])

    def closing(self, counted: dict[str, int]) -> dict[str, Any]:
        """Return the chunk that carries the usage and no choice."""
        return {**self._chunk([]), "usage": counted}

    @property
    def _chat(self) -> bool:
        return self._generation.chat

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        chunk = {**self._common, "object": kind, "choices": choices}
        return {**chunk, "usage": None} if self._generation.include_usage else chunk

    def _choice(self, index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        content: dict[str, Any] = {"text": text}
        if self._chat:
            content = {"message": {"role": "assistant", "content": text, "refusal": None}}
        return {"index": index, **content, "logprobs": None, "finish_reason": finish_reason}

    def _delta(self, index: int, delta: dict[str, str], finish_reason: str | None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def _validate(kind: type[Request], body: dict[str, Any]) -> Request:
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
    message = f"{param}: {detail['msg']} (given: {shown(detail.get('input'))})"
    return ApiError(400, message, code="invalid_value", param=param)


_FIELDS = {
    name for model in (_ChatRequest, _CompletionRequest, _Message, _TextPart, _StreamOptions)
    for name in model.model_fields
}  # fmt: skip


def _path(location: list[str | int]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")


def _message(message: _Message, index: int) -> dict[str, str]:
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


def _generation(
    request: _Request, chat: bool, request_id: str, prompts: list[Prompt], max_tokens: int | None
) -> Generation:
    sampling = {name: getattr(request, name) for name in SAMPLING_FIELDS if getattr(request, name) is not None}
    if request.stop:
        sampling["stop"] = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop)
    _check_sampling(sampling, max_tokens)
    calls = tuple(
        GenerateCall(f"{request_id}-{index}", prompt, sampling, max_tokens) for index, prompt in enumerate(prompts)
    )
    include_usage = bool(request.stream_options and request.stream_options.include_usage)
    return Generation(request.model, chat, request_id, calls, bool(request.stream), include_usage)


def _check_sampling(sampling: dict[str, Any], max_tokens: int | None) -> None:
    try:
        SamplingParams(**{**sampling, "max_tokens": 1 if max_tokens is None else max_tokens})
    except RequestError as error:
        raise ApiError(400, str(error), code="invalid_value", param=error.field) from None
