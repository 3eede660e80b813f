"""OpenAI's answers, whole or in chunks, as the official client's types read them."""

from __future__ import annotations

import time
import uuid
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from serve.api.openai_api import Generation
from serve.wire import CallPiece, ScoredToken


@dataclass(frozen=True)
class Text:
    """One text of an answer, or a piece of it."""

    text: str
    finish_reason: str | None
    tokens: Sequence[ScoredToken] = ()
    calls: Sequence[CallPiece] = ()


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


class Answer:
    """Builds the objects of one answer: the whole of it, or its chunks."""

    def __init__(self, generation: Generation, fingerprint: str | None = None) -> None:
        self._generation = generation
        self._common = {
            "id": generation.request_id,
            "created": int(time.time()),
            "model": generation.model,
            "system_fingerprint": fingerprint,
        }
        self._call_ids: defaultdict[tuple[int, int], str] = defaultdict(lambda: f"call_{uuid.uuid4().hex[:24]}")
        """Of each choice's calls."""

    def whole(self, texts: Sequence[Text], counted: dict[str, int]) -> dict[str, Any]:
        """Return the body of an answer that is not streamed: the choices of each prompt, one prompt after another."""
        kind = "chat.completion" if self._chat else "text_completion"
        choices = [self._choice(index, text) for index, text in enumerate(texts)]
        return {**self._common, "object": kind, "choices": choices, "usage": counted}

    def opening(self, index: int) -> dict[str, Any] | None:
        """Return the chunk that opens a choice: chat names the role first, completions have none."""
        if not self._chat:
            return None
        delta = {"role": "assistant", "content": None if self._generation.tools else ""}
        return self._chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def chunk(self, index: int, text: Text, counted: dict[str, int] | None = None) -> dict[str, Any]:
        """Return one chunk of the choice `index`; `counted` is the usage so far, where every chunk tells it."""
        told = {"logprobs": self._logprobs(text.tokens), "finish_reason": text.finish_reason}
        if self._chat:
            delta: dict[str, Any] = {"content": text.text} if text.text else {}
            if text.calls:
                delta["tool_calls"] = [self._call_delta(index, piece) for piece in text.calls]
            choice = {"index": index, "delta": delta, **told}
        else:
            choice = {"index": index, "text": text.text, **told}
        chunk = self._chunk([choice])
        return chunk if counted is None else {**chunk, "usage": counted}

    def closing(self, counted: dict[str, int]) -> dict[str, Any]:
        """Return the chunk that carries the usage and no choice."""
        return {**self._chunk([]), "usage": counted}

    @property
    def _chat(self) -> bool:
        return self._generation.chat

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        chunk = {**self._common, "object": kind, "choices": choices}
        return {**chunk, "usage": None} if self._generation.include_usage else chunk

    def _choice(self, index: int, text: Text) -> dict[str, Any]:
        content: dict[str, Any] = {"text": text.text}
        if self._chat:
            content = {"message": self._message(index, text)}
        told = {"logprobs": self._logprobs(text.tokens), "finish_reason": text.finish_reason}
        return {"index": index, **content, **told}

    def _message(self, index: int, text: Text) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": text.text, "refusal": None}
        if not text.calls:
            return message
        calls: dict[int, dict[str, Any]] = {}
        for piece in text.calls:
            call = calls.setdefault(piece.number, {"name": piece.name, "arguments": ""})
            call["arguments"] += piece.arguments
        told = [{"id": self._call_ids[index, at], "type": "function", "function": call} for at, call in calls.items()]
        return {**message, "content": text.text or None, "tool_calls": told}

    def _call_delta(self, index: int, piece: CallPiece) -> dict[str, Any]:
        """Return a piece of a call: the first has its id and its function's name."""
        if piece.name is None:
            return {"index": piece.number, "function": {"arguments": piece.arguments}}
        function = {"name": piece.name, "arguments": piece.arguments}
        return {
            "index": piece.number,
            "id": self._call_ids[index, piece.number],
            "type": "function",
            "function": function,
        }

    def _logprobs(self, tokens: Sequence[ScoredToken]) -> dict[str, Any] | None:
        if not self._generation.logprobs:
            return None
        if self._chat:
            return {"content": [scored(token) for token in tokens], "refusal": None}
        return {
            "tokens": [_name(token.raw) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [_by_name(token) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }


def scored(token: ScoredToken) -> dict[str, Any]:
    """Return a token of a conversation with its log-probability, and those of the likeliest at its place."""
    top = [_valued(raw, logprob) for raw, logprob in token.top]
    return {**_valued(token.raw, token.logprob), "top_logprobs": top}


def _valued(raw: bytes, logprob: float | None) -> dict[str, Any]:
    return {"token": raw.decode(errors="replace"), "bytes": list(raw), "logprob": logprob}


def _by_name(token: ScoredToken) -> dict[str, float] | None:
    """Return the alternatives of a completion's token, itself included whatever its rank; the first has none."""
    if token.logprob is None:
        return None
    named: dict[str, float] = {}
    for raw, logprob in (*token.top, (token.raw, token.logprob)):
        named.setdefault(_name(raw), logprob)  # two tokens of one name: the likelier came first
    return named


def _name(raw: bytes) -> str:
    """Return a token as text; one that is not whole characters as OpenAI writes it: `bytes:\\xe4\\xb8`."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
