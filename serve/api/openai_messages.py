"""The messages of a conversation, as the model's chat template gets them. Pure functions.

What says nothing is left out (`refusal: null`), what a template may use is passed on (`name`, `tool_calls`), the rest
is refused. Whether the template really uses it is known in the replica: `serve.engines.chat_template`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from serve.api import strict_json
from serve.api.body import ApiError
from serve.api.openai_parameters import invalid, missing
from serve.api.openai_requests import Message, ToolCall, is_empty

HARMLESS = {"id", "cache_control", "metadata"}
"""Fields of a message that change no answer: agents send them back as they got them."""
ROLES = {"developer": "system"}


def conversation(messages: Sequence[Message]) -> tuple[dict[str, Any], ...]:
    """Return the messages for the template: text as a string, the arguments of calls as objects.

    Results of calls come in the order of the calls, for most templates tell them apart by that alone.
    Raises ApiError (400) naming the message at fault.
    """
    told: list[dict[str, Any]] = []
    calls: dict[str, str] = {}
    answered: set[str] = set()
    for index, message in enumerate(messages):
        place = f"messages[{index}]"
        _check_fields(message, place)
        if message.role == "tool":
            told.append(_result(message, calls, place))
            if message.tool_call_id in answered:
                raise invalid(f"{place}.tool_call_id", f"the call {message.tool_call_id!r} has its result already")
            answered.add(str(message.tool_call_id))
            continue
        told.append({"role": ROLES.get(message.role, message.role), **_said(message, place)})
        new = {call.id: call.function.name for call in message.tool_calls or ()}
        if len(new) < len(message.tool_calls or ()):
            raise invalid(f"{place}.tool_calls", "two calls have the same id")
        calls |= new
        answered -= new.keys()
    return tuple(in_order(told))


def _check_fields(message: Message, place: str) -> None:
    """Raise ApiError for what cannot be honoured."""
    for name, value in (message.model_extra or {}).items():
        if name not in HARMLESS and not is_empty(value) and value is not False:
            raise _unsupported(f"{place}.{name}")
    for name, role in (("tool_calls", "assistant"), ("reasoning_content", "assistant"), ("tool_call_id", "tool")):
        if getattr(message, name) and message.role != role:
            raise invalid(f"{place}.{name}", f"belongs to a message of the role {role}, not {message.role}")


def _unsupported(param: str) -> ApiError:
    return ApiError(400, f"{param} is not supported", code="unsupported_parameter", param=param)


def _said(message: Message, place: str) -> dict[str, Any]:
    """Return what a message other than the result of a call says, beside its role."""
    if message.content is None and not message.tool_calls:
        raise missing(f"{place}.content")
    said: dict[str, Any] = {"content": _text(message)}
    for name in ("name", "reasoning_content"):
        if getattr(message, name):
            said[name] = getattr(message, name)
    if message.tool_calls:
        said["tool_calls"] = [_call(call, f"{place}.tool_calls[{at}]") for at, call in enumerate(message.tool_calls)]
    return said


def _text(message: Message) -> str:
    content = message.content or ""
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _call(call: ToolCall, place: str) -> dict[str, Any]:
    return called(call.id, call.function.name, call.function.arguments, f"{place}.function.arguments")


def called(call_id: str, name: str, text: str, param: str) -> dict[str, Any]:
    """Return an earlier call for the template, its arguments as an object.

    Raises ApiError (400) naming `param`, where the request has the arguments' text.
    """
    try:
        arguments = strict_json.read(text or "{}")
    except ValueError as error:
        raise invalid(param, f"is no JSON: {error}") from None
    if not isinstance(arguments, dict):
        raise invalid(param, "must be a JSON object")
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _result(message: Message, calls: dict[str, str], place: str) -> dict[str, Any]:
    """Return what a call gave. Its function's name is known from the call; templates may ask for it."""
    if not message.tool_call_id:
        raise missing(f"{place}.tool_call_id")
    if message.tool_call_id not in calls:
        raise invalid(f"{place}.tool_call_id", f"no assistant's message before it has a call {message.tool_call_id!r}")
    if message.content is None:
        raise missing(f"{place}.content")
    name = calls[message.tool_call_id]
    if message.name not in (None, "", name):
        raise invalid(f"{place}.name", f"the call {message.tool_call_id!r} is of {name!r}")
    return {"role": "tool", "content": _text(message), "tool_call_id": message.tool_call_id, "name": name}


def in_order(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages with neighbouring results in the order of the calls before them."""
    ordered: list[dict[str, Any]] = []
    places: dict[str, int] = {}
    run: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] == "tool":
            run.append(message)
            continue
        ordered += sorted(run, key=lambda result: places[result["tool_call_id"]])
        run = []
        ordered.append(message)
        for call in message.get("tool_calls", ()):
            places[call["id"]] = len(places)
    return ordered + sorted(run, key=lambda result: places[result["tool_call_id"]])
