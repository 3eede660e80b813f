"""The fields of OpenAI's requests, as pydantic models: strict types, no unknown names."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from serve.engines.protocol import MOST_ALTERNATIVES

FUNCTION_NAME = r"^[A-Za-z0-9_.-]{1,128}$"
MOST_MESSAGES = 10_000
"""Messages of a conversation, items of an input, and parts of one content."""
MOST_TOOLS = 1000
"""Tools of a request, and calls of one message."""
MOST_NAMES = 100
"""Names of an object that may ask for nothing."""
Item = TypeVar("Item")
First = Annotated[list[Item], Field(fail_fast=True)]
"""A list of which the first mistake is told, for all of them could be millions."""
Many = Annotated[list[Item], Field(max_length=MOST_MESSAGES, fail_fast=True)]
Tools = Annotated[list[Item], Field(max_length=MOST_TOOLS, fail_fast=True)]


def is_empty(value: Any) -> bool:
    """Say whether a value asks for nothing under any name; an object of such values does not either."""
    if isinstance(value, dict):
        return len(value) <= MOST_NAMES and all(map(is_empty, value.values()))
    return value is None or (isinstance(value, (str, list)) and not value)


def first_unknown(kind: type[BaseModel], value: dict[str, Any]) -> dict[str, Any]:
    """Return the value without the unknown names behind the first of them, which is the one that is told."""
    known = {field.alias or name for name, field in kind.model_fields.items()}
    first = next((name for name in value if name not in known), None)
    return {name: part for name, part in value.items() if name in known or name == first}


def _first_mistake(value: Any) -> Any:
    """Return an object of numbers, or what is no number in it, alone: each mistake more would cost time."""
    wrong = (
        ((name, part) for name, part in value.items() if type(part) not in (int, float))
        if isinstance(value, dict)
        else ()
    )
    return dict([found]) if (found := next(iter(wrong), None)) else value


class Body(BaseModel):
    """A part of a request: what it does not know is refused, unless it asks for nothing."""

    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        known = {field.alias or name for name, field in cls.model_fields.items()}
        return first_unknown(cls, {name: part for name, part in value.items() if name in known or not is_empty(part)})


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None


class TextPart(Body):
    type: Literal["text"]
    text: str
    cache_control: Any = None


class CalledFunction(Body):
    name: str
    arguments: str


class ToolCall(Body):
    """A call that an assistant made; `index` is left over from where a client joined the pieces of a stream."""

    id: Annotated[str, Field(min_length=1)]
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Many[TextPart] | None = None
    name: str | None = None
    tool_calls: Tools[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class Function(Body):
    name: Annotated[str, Field(pattern=FUNCTION_NAME)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function
    cache_control: Any = None


class FunctionName(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: FunctionName


class ToolSubset(Body):
    mode: Literal["auto", "required"]
    tools: Annotated[Tools[NamedTool], Field(min_length=1)]


class AllowedTools(Body):
    type: Literal["allowed_tools"]
    allowed_tools: ToolSubset


class JsonSchema(Body):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Generating(Body):
    """What every request for text has: the model, and how tokens are chosen."""

    model: str
    stream: bool | None = None
    min_tokens: int | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], BeforeValidator(_first_mistake)] | None = None
    seed: int | None = None
    stop: str | First[str] | None = None
    stop_token_ids: First[int] | None = None
    ignore_eos: bool | None = None


class Request(Generating):
    stream_options: StreamOptions | None = None
    n: int | None = Field(default=None, ge=1)
    max_tokens: int | None = None
    response_format: ResponseFormat | None = None
    num_beams: int | None = None


class ChatRequest(Request):
    messages: Annotated[Many[Message], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MOST_ALTERNATIVES)
    tools: Tools[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionRequest(Request):
    prompt: Any
    logprobs: int | None = Field(default=None, ge=0, le=MOST_ALTERNATIVES)
    echo: bool | None = None
    best_of: int | None = None


class EmbeddingsRequest(Body):
    model: str
    input: Any
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None


class TranscriptionRequest(Body):
    model: str
    file: Any
    response_format: Literal["json", "text"] | None = None


MODELS: tuple[type[BaseModel], ...] = (
    *(
        ChatRequest,
        CompletionRequest,
        EmbeddingsRequest,
        TranscriptionRequest,
        Message,
        TextPart,
        ToolCall,
        CalledFunction,
        StreamOptions,
    ),
    *(Tool, Function, NamedTool, FunctionName, AllowedTools, ToolSubset, ResponseFormat, JsonSchema),
)
"""All of them, for the names of their fields."""
