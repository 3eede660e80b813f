"""LlamaIndex with OpenAILike. Annotations are not postponed: FunctionTool reads them as they are."""

from typing import Literal

import tried
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, Field

FIELDS = {"model": tried.TEXT, "api_base": tried.URL, "api_key": tried.KEY, "temperature": 0, "context_window": 2048}
HELLO = [ChatMessage(role="user", content="hello")]


class Weather(BaseModel):
    """The weather of a place."""

    place: Literal["Berlin", "Paris"]
    degrees: int = Field(ge=-20, le=40)


def complete() -> None:
    """complete, stream_complete"""
    model = OpenAILike(max_tokens=8, **FIELDS)
    model.complete("the quick")
    assert list(model.stream_complete("the quick"))


def chat() -> None:
    """chat, stream_chat (is_chat_model=True)"""
    model = OpenAILike(is_chat_model=True, max_tokens=8, **FIELDS)
    model.chat(HELLO)
    assert list(model.stream_chat(HELLO))


def structured() -> None:
    """structured_predict (is_function_calling_model=True)"""
    model = OpenAILike(is_chat_model=True, is_function_calling_model=True, max_tokens=200, **FIELDS)
    assert isinstance(model.structured_predict(Weather, PromptTemplate("hello")), Weather)


def tools() -> None:
    """chat_with_tools, required"""
    model = OpenAILike(is_chat_model=True, is_function_calling_model=True, max_tokens=200, **FIELDS)

    def look_up(place: Literal["Berlin", "Paris"]) -> str:
        """Look the weather up."""
        return f"sunny in {place}"

    answer = model.chat_with_tools([FunctionTool.from_defaults(look_up)], "hello", tool_required=True)
    assert model.get_tool_calls_from_response(answer)[0].tool_name == "look_up"


def embeddings() -> None:
    """OpenAILikeEmbedding"""
    model = OpenAILikeEmbedding(model_name=tried.TEXT, api_base=tried.URL, api_key=tried.KEY)
    assert len(model.get_text_embedding_batch(["hello", "good bye"])) == 2


tried.run(complete, chat, structured, tools, embeddings)
