"""Pydantic AI with its OpenAI chat model."""

from __future__ import annotations

from typing import Literal

import tried
from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

model = OpenAIChatModel(tried.TEXT, provider=OpenAIProvider(base_url=tried.URL, api_key=tried.KEY))
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


tried.run(text, output, native, tools)
