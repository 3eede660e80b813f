"""The items of an answer while they grow, and the events that tell it: one item after another.

Text becomes a message, each call an item of its own. Every method returns the events of what it changed, without their
numbers.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from serve.api.openai_answers import scored
from serve.wire import CallPiece, Chunk, ScoredToken

Event = dict[str, Any]


class Output:
    """All items of one answer."""

    def __init__(self, logprobs: bool) -> None:
        """`logprobs` says whether log-probabilities are told."""
        self._logprobs = logprobs
        self._items: list[_Message | _Call] = []

    def items(self) -> list[dict[str, Any]]:
        """Return the items as they are now."""
        return [item.told() for item in self._items]

    def add(self, chunk: Chunk) -> list[Event]:
        """Add what became known."""
        events = self._text(chunk.text, chunk.tokens) if chunk.text or chunk.tokens else []
        for piece in chunk.calls:
            events += self._call(piece)
        return events

    def end(self, status: str) -> list[Event]:
        """End the last item. An answer without any is a message without text."""
        events = [] if self._items else self._begin(_Message(0, self._logprobs))
        return events + self._items[-1].end(status)

    def _text(self, text: str, tokens: Sequence[ScoredToken]) -> list[Event]:
        growing = self._items[-1] if self._items else None
        if not isinstance(growing, _Message):
            if not text and (said := [item for item in self._items if isinstance(item, _Message)]):
                said[-1].late(tokens)
                return []
            growing = _Message(len(self._items), self._logprobs)
            return [*self._begin(growing), growing.grow(text, tokens)]
        return [growing.grow(text, tokens)]

    def _call(self, piece: CallPiece) -> list[Event]:
        growing = self._items[-1] if self._items else None
        events: list[Event] = []
        if piece.name is not None:
            growing = _Call(len(self._items), piece.name)
            events = self._begin(growing)
        assert isinstance(growing, _Call)
        return [*events, growing.grow(piece.arguments)] if piece.arguments else events

    def _begin(self, item: _Message | _Call) -> list[Event]:
        events = self._items[-1].end("completed") if self._items else []
        self._items.append(item)
        return events + item.begin()


class _Message:
    """What the model says."""

    def __init__(self, index: int, logprobs: bool) -> None:
        self._id = f"msg_{uuid.uuid4().hex}"
        self._place = {"item_id": self._id, "output_index": index, "content_index": 0}
        self._logprobs = logprobs
        self._pieces: list[str] = []
        self._scored: list[dict[str, Any]] = []
        self._status = "in_progress"

    def told(self) -> dict[str, Any]:
        return self._item([self._part()])

    def begin(self) -> list[Event]:
        added = {"type": "response.output_item.added", "output_index": self._place["output_index"]}
        part = {"type": "response.content_part.added", **self._place, "part": self._part()}
        return [{**added, "item": self._item([])}, part]

    def grow(self, text: str, tokens: Sequence[ScoredToken]) -> Event:
        told = [scored(token) for token in tokens] if self._logprobs else []
        self._pieces.append(text)
        self._scored += told
        return {"type": "response.output_text.delta", **self._place, "delta": text, "logprobs": told}

    def late(self, tokens: Sequence[ScoredToken]) -> None:
        """Add tokens of which a part was text, as it turned out when the item had ended already."""
        self._scored += [scored(token) for token in tokens]

    def end(self, status: str) -> list[Event]:
        self._status = status
        part = self._part()
        said = {"text": part["text"], "logprobs": self._scored}
        return [
            {"type": "response.output_text.done", **self._place, **said},
            {"type": "response.content_part.done", **self._place, "part": part},
            {"type": "response.output_item.done", "output_index": self._place["output_index"], "item": self.told()},
        ]

    def _part(self) -> dict[str, Any]:
        text = "".join(self._pieces)
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(self._scored)}

    def _item(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._id, "type": "message", "status": self._status, "role": "assistant", "content": content}


class _Call:
    """A function's call."""

    def __init__(self, index: int, name: str) -> None:
        self._id, self._call_id = f"fc_{uuid.uuid4().hex}", f"call_{uuid.uuid4().hex[:24]}"
        self._index, self._name = index, name
        self._pieces: list[str] = []
        self._status = "in_progress"

    def told(self) -> dict[str, Any]:
        call = {"call_id": self._call_id, "name": self._name, "arguments": "".join(self._pieces)}
        return {"id": self._id, "type": "function_call", "status": self._status, **call}

    def begin(self) -> list[Event]:
        return [{"type": "response.output_item.added", "output_index": self._index, "item": self.told()}]

    def grow(self, arguments: str) -> Event:
        self._pieces.append(arguments)
        place = {"item_id": self._id, "output_index": self._index}
        return {"type": "response.function_call_arguments.delta", **place, "delta": arguments}

    def end(self, status: str) -> list[Event]:
        self._status = status
        item = self.told()
        done = {"item_id": self._id, "output_index": self._index, "name": self._name, "arguments": item["arguments"]}
        return [
            {"type": "response.function_call_arguments.done", **done},
            {"type": "response.output_item.done", "output_index": self._index, "item": item},
        ]
