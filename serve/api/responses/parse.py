"""Bodies of /v1/responses, parsed strictly into one call. Pure functions over JSON values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serve.api import openai_tools, schemas
from serve.api.body import ApiError, shown
from serve.api.openai_api import Generation
from serve.api.openai_parameters import invalid, part, validate
from serve.api.openai_requests import AllowedTools, NamedTool
from serve.api.openai_sampling import check, sampling
from serve.api.responses.items import Conversation, conversation, kind_of, unsupported
from serve.api.responses.requests import (
    LOGPROBS,
    ChosenFunction,
    ChosenFunctions,
    FunctionTool,
    ResponsesRequest,
    SchemaFormat,
    TextFormat,
)
from serve.wire import GenerateCall

RENAMED = {"max_tokens": "max_output_tokens", "response_format": "text.format", "logprobs": "top_logprobs"}
"""What engines call parameters that have another name here."""
JSON_OBJECT: dict[str, Any] = {"type": "object"}


@dataclass(frozen=True)
class Wanted:
    """A parsed request."""

    generation: Generation
    conversation: Conversation
    echoed: Mapping[str, Any]
    """What the answer repeats of the request."""

    def placed(self, error: ApiError) -> ApiError:
        """Return a replica's refusal with the parameter as this request names it."""
        param = _own_name(error.param or "", self.conversation.places)
        if param == error.param:
            return error
        message = error.message.replace(f"{error.param}: ", f"{param}: ", 1)
        return ApiError(error.status, message, code=error.code, param=param, headers=error.headers)


def parse(body: dict[str, Any], request_id: str) -> Wanted:
    """Parse the body of /v1/responses. Raises ApiError (400) naming the parameter at fault."""
    request = validate(ResponsesRequest, body)
    _check_stream_options(request)
    told = conversation(request.instructions, request.input)
    tools = _tools(request)
    call = GenerateCall(
        f"resp_{request_id}",
        told.messages,
        sampling(request, _logprobs(request), _schema(request)),
        request.max_output_tokens,
        tools=openai_tools.usable(tools, "tools[{}]", _choice(request), request.parallel_tool_calls is not False),
        template_kwargs=request.chat_template_kwargs or {},
        place="input",
        session=request.prompt_cache_key or None,
    )
    check(call)
    generation = Generation(request.model, True, call.request_id, (call,), bool(request.stream), include_usage=True)
    return Wanted(generation, told, _echoed(request, tools))


def _own_name(param: str, places: tuple[str, ...]) -> str:
    """Return how a Responses request names what the engine names otherwise: `messages[1].content` → `input[0]`."""
    message = re.match(r"messages\[(\d+)\]", param)
    if message:
        return places[int(message[1])]
    if param in ("messages", "prompt"):
        return "input"
    return RENAMED.get(param) or re.sub(r"^(tools\[\d+\])\.function\b", r"\1", param)


def _check_stream_options(request: ResponsesRequest) -> None:
    if request.stream_options and request.stream_options.include_obfuscation:
        name = "stream_options.include_obfuscation"
        raise unsupported(name, "events are not padded here; leave it out")
    if request.stream_options and request.stream_options.include_usage and not request.stream:
        raise invalid("stream_options", "is about streams; it needs stream: true")


def _logprobs(request: ResponsesRequest) -> int | None:
    """Return how many alternatives of each token are told; None: no log-probabilities."""
    if LOGPROBS in (request.include or ()):
        return request.top_logprobs or 0
    if request.top_logprobs:
        raise invalid("top_logprobs", f'needs include: ["{LOGPROBS}"]')
    return None


def _schema(request: ResponsesRequest) -> dict[str, Any] | None:
    """Return the JSON schema that the text must follow; None where it is free."""
    wanted = request.text.format if request.text else None
    if not wanted:
        return None
    if kind_of(wanted, "text.format") != "json_schema":
        return JSON_OBJECT if part(TextFormat, wanted, "text.format").type == "json_object" else None
    given = part(SchemaFormat, wanted, "text.format").schema_
    schemas.check(given, "text.format.schema")
    return given


def _tools(request: ResponsesRequest) -> list[FunctionTool]:
    return [_tool(each, f"tools[{at}]") for at, each in enumerate(request.tools or ())]


def _tool(given: Any, place: str) -> FunctionTool:
    kind = kind_of(given, place)
    if kind != "function":
        raise unsupported(f"{place}.type", f"{shown(kind)} is no tool that is run here; functions are")
    if isinstance(given.get("function"), dict):
        raise invalid(f"{place}.function", "here the function's fields stand beside `type`, not inside `function`")
    return part(FunctionTool, given, place)


def _choice(request: ResponsesRequest) -> openai_tools.Choice:
    """Return `tool_choice` as chat completions have it."""
    given = request.tool_choice
    if given is None or given in ("none", "auto", "required"):
        return given  # type: ignore[return-value]  # mypy does not narrow a str by the values of a tuple
    if isinstance(given, str):
        raise invalid("tool_choice", f"must be 'none', 'auto', 'required' or an object (given: {shown(given)})")
    kind = kind_of(given, "tool_choice")
    if kind == "function":
        return _named(part(ChosenFunction, given, "tool_choice"))
    if kind != "allowed_tools":
        raise unsupported("tool_choice.type", f"{shown(kind)} is no choice here; there are: function, allowed_tools")
    allowed = part(ChosenFunctions, given, "tool_choice")
    subset = {"mode": allowed.mode, "tools": [_named(each) for each in allowed.tools]}
    return AllowedTools.model_validate({"type": "allowed_tools", "allowed_tools": subset})


def _named(chosen: ChosenFunction) -> NamedTool:
    return NamedTool.model_validate({"type": "function", "function": {"name": chosen.name}})


def _echoed(request: ResponsesRequest, tools: list[FunctionTool]) -> dict[str, Any]:
    """Return what an answer repeats: what the request named, and what holds where it named nothing."""
    named = ("instructions", "max_output_tokens", "max_tool_calls", "temperature", "top_p")
    users = ("user", "safety_identifier", "prompt_cache_key")
    wanted = request.text.format if request.text else None
    return {
        "background": False,
        "conversation": None,
        **{name: getattr(request, name) for name in named},
        "metadata": request.metadata or {},
        "model": request.model,
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": None,
        "prompt": None,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "store": False,
        "text": {"format": wanted or {"type": "text"}, "verbosity": "medium"},
        "tool_choice": "auto" if request.tool_choice is None else request.tool_choice,
        "tools": [_told(tool) for tool in tools],
        "top_logprobs": request.top_logprobs or 0,
        "truncation": "disabled",
        **{name: getattr(request, name) for name in users},
    }


def _told(tool: FunctionTool) -> dict[str, Any]:
    return {
        "type": "function",
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
        "strict": bool(tool.strict),
    }
