"""The tools of a request: which functions the model may call, and whether it must. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from serve.api import schemas
from serve.api.openai_parameters import invalid
from serve.api.openai_requests import AllowedTools, ChatRequest, Function, NamedTool
from serve.wire import Tools

NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}}


Choice = Literal["none", "auto", "required"] | NamedTool | AllowedTools | None


def tools(request: ChatRequest) -> Tools | None:
    """Return the functions that a chat request lets the model call; None where it may not. Raises ApiError (400)."""
    functions = [tool.function for tool in request.tools or ()]
    return usable(functions, "tools[{}].function", request.tool_choice, request.parallel_tool_calls is not False)


def usable(functions: Sequence[Function], place: str, choice: Choice, parallel: bool) -> Tools | None:
    """Return the functions that the model may call; None where it may not. Raises ApiError (400).

    Args:
        place: where the request has a function, its number left open: `tools[{}].function`.
        parallel: whether one answer may have several calls.
    """
    offered = _by_name(functions, place)
    if not offered:
        if choice not in (None, "none", "auto"):
            raise invalid("tool_choice", "asks for a call, and there are no tools")
        return None
    if choice == "none":
        return None
    named: str | None = None
    required = choice == "required"
    if isinstance(choice, NamedTool):
        named, required = choice.function.name, True
        _check_known(named, offered)
    if isinstance(choice, AllowedTools):
        allowed = [tool.function.name for tool in choice.allowed_tools.tools]
        for name in allowed:
            _check_known(name, offered)
        offered = {name: function for name, function in offered.items() if name in allowed}
        required = choice.allowed_tools.mode == "required"
    strict = tuple(name for name, function in offered.items() if function.strict)
    return Tools(tuple(map(_told, offered.values())), strict, required, named, parallel and named is None)


def _by_name(functions: Sequence[Function], place: str) -> dict[str, Function]:
    found: dict[str, Function] = {}
    for at, function in enumerate(functions):
        here = place.format(at)
        if function.name in found:
            raise invalid(f"{here}.name", f"there are two functions {function.name!r}")
        if (function.parameters or NO_ARGUMENTS).get("type", "object") != "object":
            raise invalid(f"{here}.parameters", "must be the schema of an object")
        check = schemas.check if function.strict else schemas.check_size
        check(function.parameters or NO_ARGUMENTS, f"{here}.parameters")
        found[function.name] = function
    return found


def _check_known(name: str, offered: dict[str, Function]) -> None:
    if name not in offered:
        raise invalid("tool_choice", f"there is no function {name!r} in tools; there are: {', '.join(offered)}")


def _told(function: Function) -> dict[str, Any]:
    """Return a function as templates get it: some fail where a description or the properties are missing."""
    parameters = {**NO_ARGUMENTS, **(function.parameters or {})}
    return {"name": function.name, "description": function.description or "", "parameters": parameters}
