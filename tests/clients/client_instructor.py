"""instructor in its default mode, which sends tools and names the one to call."""

from __future__ import annotations

from typing import Literal

import instructor
import openai
import tried
from pydantic import BaseModel, ConfigDict, Field

plain = openai.OpenAI(base_url=tried.URL, api_key=tried.KEY, max_retries=0)


class Weather(BaseModel):
    """The weather of a place."""

    # a model with random weights would invent more fields until its tokens are used up
    model_config = ConfigDict(extra="forbid")

    place: Literal["Berlin", "Paris"]
    degrees: int = Field(ge=-20, le=40)


def default() -> None:
    """default mode (tools)"""
    made = instructor.from_openai(plain).chat.completions.create(
        model=tried.TEXT, messages=tried.HELLO, response_model=Weather, max_tokens=200, temperature=0, max_retries=0
    )
    assert isinstance(made, Weather)


def partial() -> None:
    """create_partial (streamed)"""
    parts = list(
        instructor.from_openai(plain).chat.completions.create_partial(
            model=tried.TEXT, messages=tried.HELLO, response_model=Weather, max_tokens=200, temperature=0
        )
    )
    Weather.model_validate(parts[-1].model_dump())


def json_schema() -> None:
    """Mode.JSON_SCHEMA"""
    client = instructor.from_openai(plain, mode=instructor.Mode.JSON_SCHEMA)
    made = client.chat.completions.create(
        model=tried.TEXT, messages=tried.HELLO, response_model=Weather, max_tokens=200, temperature=0, max_retries=0
    )
    assert isinstance(made, Weather)


tried.run(default, partial, json_schema)
