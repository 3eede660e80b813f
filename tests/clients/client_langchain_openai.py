"""LangChain's ChatOpenAI and OpenAIEmbeddings."""

from __future__ import annotations

from typing import Literal

import tried
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field

FIELDS = {"model": tried.TEXT, "base_url": tried.URL, "api_key": tried.KEY, "temperature": 0}


class Weather(BaseModel):
    """The weather of a place."""

    place: Literal["Berlin", "Paris"]
    degrees: int = Field(ge=-20, le=40)


def invoke() -> None:
    """invoke"""
    assert ChatOpenAI(max_tokens=8, **FIELDS).invoke("hello").usage_metadata["output_tokens"] > 0


def stream() -> None:
    """stream"""
    assert list(ChatOpenAI(max_tokens=8, **FIELDS).stream("hello"))


def structured() -> None:
    """with_structured_output, default method"""
    model = ChatOpenAI(max_tokens=200, **FIELDS).with_structured_output(Weather)
    assert isinstance(model.invoke("hello"), Weather)


def calling() -> None:
    """with_structured_output(method="function_calling")"""
    model = ChatOpenAI(max_tokens=200, **FIELDS).with_structured_output(Weather, method="function_calling")
    assert isinstance(model.invoke("hello"), Weather)


def tools() -> None:
    """bind_tools, and a ToolMessage sent back"""
    model = ChatOpenAI(max_tokens=200, **FIELDS)
    question = HumanMessage("hello")
    answer = model.bind_tools([Weather], tool_choice="any").invoke([question])
    call = answer.tool_calls[0]
    model.bind_tools([Weather]).invoke([question, answer, ToolMessage("sunny", tool_call_id=call["id"])], max_tokens=4)


def responses() -> None:
    """use_responses_api=True: invoke, stream, with_structured_output, bind_tools and a ToolMessage"""
    model = ChatOpenAI(use_responses_api=True, max_tokens=200, **FIELDS)
    assert (
        ChatOpenAI(use_responses_api=True, max_tokens=8, **FIELDS).invoke("hello").usage_metadata["output_tokens"] > 0
    )
    assert list(ChatOpenAI(use_responses_api=True, max_tokens=8, **FIELDS).stream("hello"))
    assert isinstance(model.with_structured_output(Weather).invoke("hello"), Weather)
    question = HumanMessage("hello")
    answer = model.bind_tools([Weather], tool_choice="any", parallel_tool_calls=False).invoke([question])
    result = ToolMessage("sunny", tool_call_id=answer.tool_calls[0]["id"])
    model.bind_tools([Weather]).invoke([question, answer, result], max_tokens=4)


def embeddings() -> None:
    """OpenAIEmbeddings(check_embedding_ctx_length=False)"""
    made = OpenAIEmbeddings(
        model=tried.TEXT, base_url=tried.URL, api_key=tried.KEY, check_embedding_ctx_length=False
    ).embed_documents(["hello", "good bye"])
    assert len(made) == 2


tried.run(invoke, stream, structured, calling, tools, responses, embeddings)
