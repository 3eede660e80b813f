"""The official client."""

from __future__ import annotations

import math
from typing import Literal

import openai
import tried
from pydantic import BaseModel, Field

client = openai.OpenAI(base_url=tried.URL, api_key=tried.KEY, max_retries=0, timeout=120)


class Weather(BaseModel):
    """The weather of a place."""

    place: Literal["Berlin", "Paris"]
    degrees: int = Field(ge=-20, le=40)


def chat() -> None:
    """chat"""
    answer = client.chat.completions.create(model=tried.TEXT, messages=tried.HELLO, max_tokens=12)
    assert answer.usage.completion_tokens <= 12


def stream() -> None:
    """stream with usage"""
    options = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(
            model=tried.TEXT, messages=tried.HELLO, max_tokens=12, stream=True, stream_options=options
        )
    )
    assert chunks[-1].usage.completion_tokens > 0


def completions() -> None:
    """completions with log-probabilities"""
    answer = client.completions.create(model=tried.TEXT, prompt="the quick", max_tokens=5, logprobs=2, echo=True)
    told = answer.choices[0].logprobs
    text = answer.choices[0].text
    ends = [*told.text_offset[1:], len(text)]
    assert len(told.tokens) == len(told.text_offset)
    assert text[told.text_offset[0] : ends[0]] == told.tokens[0]


def parse() -> None:
    """chat.completions.parse of a pydantic model"""
    answer = client.chat.completions.parse(
        model=tried.TEXT, messages=tried.HELLO, response_format=Weather, max_tokens=200, temperature=0
    )
    assert isinstance(answer.choices[0].message.parsed, Weather)


def tools() -> None:
    """tools: a required call, its result sent back, and the stream helper"""
    told = [openai.pydantic_function_tool(Weather)]
    fields = {"model": tried.TEXT, "tools": told, "tool_choice": "required", "max_tokens": 200, "temperature": 0}
    message = client.chat.completions.create(messages=tried.HELLO, **fields).choices[0].message
    call = message.tool_calls[0]
    Weather.model_validate_json(call.function.arguments)
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    client.chat.completions.create(
        model=tried.TEXT, messages=[*tried.HELLO, message.model_dump(), result], tools=told, max_tokens=5
    )
    with client.chat.completions.stream(messages=tried.HELLO, **fields) as events:
        final = events.get_final_completion()
    assert isinstance(final.choices[0].message.tool_calls[0].function.parsed_arguments, Weather)


def responses() -> None:
    """responses.create, and what it answered sent back"""
    made = client.responses.create(model=tried.TEXT, input="hello", instructions="be brief", max_output_tokens=12)
    assert made.usage.output_tokens <= 12
    assert made.output_text == made.output[0].content[0].text
    history = [*tried.HELLO, *made.output, *tried.HELLO]
    more = client.responses.create(model=tried.TEXT, input=history, max_output_tokens=4)
    assert more.usage.input_tokens > made.usage.output_tokens


def responses_stream() -> None:
    """responses.stream"""
    with client.responses.stream(model=tried.TEXT, input="hello", max_output_tokens=12) as events:
        told = list(events)
    deltas = [event.delta for event in told if event.type == "response.output_text.delta"]
    assert told[-1].response.output_text == "".join(deltas)
    assert [event.sequence_number for event in told] == list(range(len(told)))


def responses_parse() -> None:
    """responses.parse of a pydantic model"""
    answer = client.responses.parse(
        model=tried.TEXT, input="hello", text_format=Weather, max_output_tokens=200, temperature=0
    )
    assert isinstance(answer.output_parsed, Weather)


def responses_tools() -> None:
    """responses with tools: a required call, its result sent back, and streamed"""
    function = openai.pydantic_function_tool(Weather)["function"]
    told = [{"type": "function", **function}]
    fields = {"model": tried.TEXT, "tools": told, "temperature": 0}
    wanted = {"tool_choice": "required", "parallel_tool_calls": False, "max_output_tokens": 200}
    made = client.responses.create(input="hello", **fields, **wanted)
    call = made.output[0]
    Weather.model_validate_json(call.arguments)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    client.responses.create(input=[*tried.HELLO, call, result], **fields, max_output_tokens=5)
    with client.responses.stream(input="hello", **fields, **wanted) as events:
        final = events.get_final_response()
    assert final.output[0].arguments == call.arguments


def responses_refused() -> None:
    """what needs stored responses is refused by name"""
    create = client.responses.create
    found = tried.error(
        openai.BadRequestError, lambda: create(model=tried.TEXT, input="hello", previous_response_id="resp_1")
    )
    assert found.param == "previous_response_id"
    tried.error(openai.NotFoundError, lambda: client.responses.retrieve("resp_1"))


def embeddings() -> None:
    """embeddings (base64, the client's default)"""
    answer = client.embeddings.create(model=tried.TEXT, input=["hello", "good bye"])
    lengths = [math.dist(part.embedding, [0] * len(part.embedding)) for part in answer.data]
    assert all(abs(length - 1) < 1e-4 for length in lengths)


def errors() -> None:
    """errors are the client's own types"""
    create = client.chat.completions.create
    found = tried.error(openai.NotFoundError, lambda: create(model="none-such", messages=tried.HELLO))
    assert found.code == "model_not_found"


def models() -> None:
    """models"""
    assert tried.TEXT in [card.id for card in client.models.list()]


ANSWERED = (responses, responses_stream, responses_parse, responses_tools, responses_refused)
tried.run(models, chat, stream, completions, parse, tools, *ANSWERED, embeddings, errors)
