"""The fields of a Responses request and of the items in it, as pydantic models: strict types, no unknown names."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, StringConstraints
from pydantic_core import PydanticCustomError

from serve.api.openai_requests import Body, First, Function, Generating, Many, Tools
from serve.engines.protocol import MOST_ALTERNATIVES

Status = Literal["in_progress", "completed", "incomplete"]
NonEmpty = Annotated[str, Field(min_length=1)]
LOGPROBS = "message.output_text.logprobs"
Included = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "message.input_image.image_url",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]
"""Only the first can be in an answer; the others are about items that no answer has."""
MOST_METADATA = 16
"""Pairs, as OpenAI has it; the lengths too."""


def _few(value: Any) -> Any:
    """Raise for so many pairs that to read each would take time."""
    if isinstance(value, dict) and len(value) > MOST_METADATA:
        told = f"at most {MOST_METADATA} pairs are taken, {len(value)} were given"
        raise PydanticCustomError("too_many_pairs", told)  # type: ignore[type-var]
    return value


Metadata = Annotated[
    dict[Annotated[str, StringConstraints(max_length=64)], Annotated[str, StringConstraints(max_length=512)]],
    BeforeValidator(_few),
]


class MessageItem(Body):
    """What somebody said; `type` may be left out."""

    type: Literal["message"] | None = None
    role: Literal["user", "system", "developer", "assistant"]
    content: str | Many[Any]
    id: str | None = None
    status: Status | None = None


class MessagePart(Body):
    """A part of a message, as clients write it and as answers have it."""

    type: Literal["input_text", "output_text"]
    text: str
    logprobs: Any = None
    cache_control: Any = None
    prompt_cache_breakpoint: Any = None


class CallItem(Body):
    """A function's call that the model made."""

    type: Literal["function_call"]
    call_id: NonEmpty
    name: NonEmpty
    arguments: str
    id: str | None = None
    status: Status | None = None


class ResultItem(Body):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: NonEmpty
    output: str | Many[Any]
    id: str | None = None
    status: Status | None = None


class ReasoningPart(Body):
    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(Body):
    """What the model thought before it answered, in words."""

    type: Literal["reasoning"]
    content: Many[ReasoningPart] | None = None
    id: str | None = None
    status: Status | None = None


class FunctionTool(Function):
    """A function that the model may call."""

    type: Literal["function"]
    async_: Literal[False] | None = Field(default=None, alias="async")
    defer_loading: Literal[False] | None = None
    allowed_callers: First[Literal["direct"]] | None = None
    cache_control: Any = None


class ChosenFunction(Body):
    type: Literal["function"]
    name: str


class ChosenFunctions(Body):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[Tools[ChosenFunction], Field(min_length=1)]


class TextFormat(Body):
    type: Literal["text", "json_object"]


class SchemaFormat(Body):
    type: Literal["json_schema"]
    name: NonEmpty
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class TextSettings(Body):
    """How the text of the answer is to be; `format` is read by its type."""

    format: dict[str, Any] | None = None
    verbosity: Literal["medium"] | None = None


class EventOptions(Body):
    """`include_usage` asks for what the last event tells anyway."""

    include_obfuscation: bool | None = None
    include_usage: bool | None = None


class ResponsesRequest(Generating):
    """The body of /v1/responses. Items, tools and the choice among them are read one by one, by their types."""

    input: Any
    instructions: str | None = None
    include: First[Included] | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    max_tool_calls: int | None = Field(default=None, ge=1)
    """Of OpenAI's own tools, of which an answer has none."""
    metadata: Metadata | None = Field(default=None, json_schema_extra={"maxProperties": MOST_METADATA})
    parallel_tool_calls: bool | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    stream_options: EventOptions | None = None
    text: TextSettings | None = None
    tool_choice: str | dict[str, Any] | None = None
    tools: Tools[Any] | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MOST_ALTERNATIVES)
    user: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


MODELS: tuple[type[BaseModel], ...] = (
    *(ResponsesRequest, MessageItem, MessagePart, CallItem, ResultItem, ReasoningItem, ReasoningPart, FunctionTool),
    *(ChosenFunction, ChosenFunctions, TextFormat, SchemaFormat, TextSettings, EventOptions),
)
"""All of them, for the names of their fields."""
