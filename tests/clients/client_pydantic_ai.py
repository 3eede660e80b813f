"""Pydantic AI with its OpenAI models, of chat and of responses."""

from __future__ import annotations

from typing import Literal

import tried
from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

PROVIDER = OpenAIProvider(base_url=tried.URL, api_key=tried.KEY)
model = OpenAIChatModel(tried.TEXT, provider=PROVIDER)
SETTINGS = {"max_tokens": 200, "temperature": 0}


class Weather(BaseModel):
    """The weather of a place."""

    place: Literal["Berlin", "Paris"]
    degrees: int = Field(ge=-20, le=40)


def text() -> None:
    """text"""
    made = Agent(model, retries=0).run_sync("hello", model_settings={"max_tokens": 12, "temperature": 0})
    assert made.output


def output() -> None:
    """output_type (an output tool, the default)"""
    made = Agent(model, output_type=Weather, retries=0).run_sync("hello", model_settings=SETTINGS)
    assert isinstance(made.output, Weather)


def native() -> None:
    """NativeOutput (json_schema)"""
    made = Agent(model, output_type=NativeOutput(Weather), retries=0).run_sync("hello", model_settings=SETTINGS)
    assert isinstance(made.output, Weather)


def tools() -> None:
    """a function tool told to the model, its calls and results sent back"""
    agent = Agent(model, output_type=Weather, retries=3)

    @agent.tool_plain
    def look_up(place: Literal["Berlin", "Paris"]) -> str:
        """Look the weather up."""
        return f"sunny in {place}"

    # a random model picks one of both tools: whichever it is, the conversation must go on until it ends
    made = agent.run_sync("hello", model_settings={"max_tokens": 200, "temperature": 1, "seed": 3})
    assert isinstance(made.output, Weather)


def responses() -> None:
    """OpenAIResponsesModel: text, output_type (a tool and NativeOutput), a conversation that goes on"""
    answering = OpenAIResponsesModel(tried.TEXT, provider=PROVIDER)
    short = {"max_tokens": 12, "temperature": 0}
    first = Agent(answering, retries=0).run_sync("hello", model_settings=short)
    assert first.output
    again = Agent(answering, retries=0).run_sync("more", message_history=first.all_messages(), model_settings=short)
    assert again.usage.input_tokens > first.usage.input_tokens
    for kind in (Weather, NativeOutput(Weather)):
        made = Agent(answering, output_type=kind, retries=0).run_sync("hello", model_settings=SETTINGS)
        assert isinstance(made.output, Weather)


tried.run(text, output, native, tools, responses)
