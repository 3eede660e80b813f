"""LiteLLM's SDK, provider `openai` with a base address."""

from __future__ import annotations

import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # no look-up of prices on the net

import litellm
import tried

FIELDS = {"model": f"openai/{tried.TEXT}", "api_base": tried.URL, "api_key": tried.KEY}
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "parameters": {
            "type": "object",
            "properties": {"place": {"enum": ["Berlin", "Paris"]}},
            "required": ["place"],
        },
    },
}


def chat() -> None:
    """chat"""
    assert litellm.completion(messages=tried.HELLO, max_tokens=8, **FIELDS).choices[0].finish_reason


def cache_control() -> None:
    """text parts with cache_control"""
    parts = [{"type": "text", "text": "hello", "cache_control": {"type": "ephemeral"}}]
    litellm.completion(messages=[{"role": "user", "content": parts}], max_tokens=8, **FIELDS)


def stream() -> None:
    """stream"""
    chunks = list(litellm.completion(messages=tried.HELLO, max_tokens=8, stream=True, **FIELDS))
    assert chunks[-1].choices[0].finish_reason


def tools() -> None:
    """tools, required"""
    answer = litellm.completion(
        messages=tried.HELLO, tools=[TOOL], tool_choice="required", max_tokens=200, temperature=0, **FIELDS
    )
    assert answer.choices[0].message.tool_calls[0].function.name == "look_up"


def text() -> None:
    """text completion"""
    answer = litellm.text_completion(
        model=f"text-completion-openai/{tried.TEXT}", prompt="the", api_base=tried.URL, api_key=tried.KEY, max_tokens=4
    )
    assert answer.choices[0].finish_reason


def embeddings() -> None:
    """embeddings"""
    assert len(litellm.embedding(input=["hello", "bye"], **FIELDS).data) == 2


tried.run(chat, cache_control, stream, tools, text, embeddings)
