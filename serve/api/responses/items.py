"""The input of a Responses request, as the messages that the model's chat template gets. Pure functions.

Items of one turn of the model (what it thought, what it said, its calls) become one message, as chat completions have
it; each message knows its place in the request. An item that needs something stored, or that no text model here can
read, is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from serve.api.body import ApiError, shown
from serve.api.openai_messages import ROLES, called, in_order
from serve.api.openai_parameters import invalid, missing, part
from serve.api.openai_requests import MOST_MESSAGES
from serve.api.responses.requests import CallItem, MessageItem, MessagePart, ReasoningItem, ResultItem

TEXTS = ("input_text", "output_text")


@dataclass(frozen=True)
class Conversation:
    """The messages for the template, and where the request has each of them."""

    messages: tuple[dict[str, Any], ...]
    places: tuple[str, ...]
    """`instructions`, `input`, `input[2]`; for results of calls too."""


def conversation(instructions: str | None, given: Any) -> Conversation:
    """Return a request's instructions and input as messages. Raises ApiError (400) naming the item at fault."""
    reader = _Reader()
    if instructions:
        reader.tell({"role": "system", "content": instructions}, "instructions")
    if isinstance(given, str):
        reader.tell({"role": "user", "content": given}, "input")
        return reader.whole()
    if given is None:
        raise missing("input")
    if not isinstance(given, list):
        raise invalid("input", f"must be a string or a list of items (given: {shown(given)})")
    if not given:
        raise invalid("input", "must not be empty")
    if len(given) > MOST_MESSAGES:
        raise invalid("input", f"must be a list of at most {MOST_MESSAGES} items (given: {len(given)})")
    for at, item in enumerate(given):
        reader.read(item, f"input[{at}]")
    if not reader.messages and not reader.thought:
        raise invalid("input", "has no message")  # but reasoning without a word
    return reader.whole()


def text(content: str | list[Any], place: str) -> str:
    """Return the text of a content, in one piece or in parts. Raises ApiError (400) for parts that are no text."""
    if isinstance(content, str):
        return content
    return "".join(_text_part(each, f"{place}[{at}]") for at, each in enumerate(content))


def _text_part(given: Any, place: str) -> str:
    kind = kind_of(given, place)
    if kind not in TEXTS:
        hint = "only text is" if kind != "text" else 'write "input_text"'
        raise unsupported(f"{place}.type", f"{shown(kind)} is not read here; {hint}")
    return part(MessagePart, given, place).text


def kind_of(given: Any, place: str) -> str:
    """Return the `type` of an object. Raises ApiError (400) where it has none."""
    if not isinstance(given, dict):
        raise invalid(place, f"must be an object (given: {shown(given)})")
    kind = given.get("type")
    if kind is None:
        raise missing(f"{place}.type")
    if not isinstance(kind, str):
        raise invalid(f"{place}.type", f"must be a string (given: {shown(kind)})")
    return kind


def unsupported(param: str, message: str) -> ApiError:
    """Return the 400 for what is known of OpenAI's and not served here."""
    return ApiError(400, f"{param}: {message}", code="unsupported_parameter", param=param)


@dataclass
class _Reader:
    """Reads items in their order."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    places: dict[int, str] = field(default_factory=dict)
    """By the id of the message."""
    calls: dict[str, str] = field(default_factory=dict)
    """Names of the functions that were called, by the call's id."""
    answered: set[str] = field(default_factory=set)
    thought: str = ""
    """What the turn that comes next began with."""
    thought_at: str = ""

    def whole(self) -> Conversation:
        if self.thought:
            raise invalid(self.thought_at, "no message and no call of the assistant follows this reasoning")
        ordered = in_order(self.messages)
        return Conversation(tuple(ordered), tuple(self.places[id(message)] for message in ordered))

    def tell(self, message: dict[str, Any], place: str) -> None:
        """Add a message."""
        if message["role"] == "assistant" and self.thought:
            message["reasoning_content"], self.thought = self.thought, ""
        elif self.thought:
            raise invalid(self.thought_at, "no message and no call of the assistant follows this reasoning")
        self.messages.append(message)
        self.places[id(message)] = place

    def read(self, item: Any, place: str) -> None:
        """Add an item. Raises ApiError (400)."""
        if isinstance(item, dict) and item.get("type") is None and "role" in item:
            self._message(item, place)
            return
        if isinstance(item, dict) and item.get("type") is None and set(item) <= {"id", "type"} and "id" in item:
            item = {**item, "type": "item_reference"}  # as OpenAI reads it
        kind = kind_of(item, place)
        readers = {
            "message": self._message,
            "function_call": self._call,
            "function_call_output": self._result,
            "reasoning": self._reasoning,
        }
        if kind == "item_reference":
            raise unsupported(f"{place}.type", '"item_reference": nothing is stored here; send the item itself')
        if kind not in readers:
            raise unsupported(f"{place}.type", f"{shown(kind)} is not read here; there are: {', '.join(readers)}")
        readers[kind](item, place)

    def _message(self, given: Any, place: str) -> None:
        item = part(MessageItem, given, place)
        said = text(item.content, f"{place}.content")
        turn = self._turn()
        if item.role == "assistant" and turn is not None and "tool_calls" in turn:
            turn["content"] += said  # text after calls, of one answer
            return
        self.tell({"role": ROLES.get(item.role, item.role), "content": said}, place)

    def _call(self, given: Any, place: str) -> None:
        item = part(CallItem, given, place)
        if item.status == "incomplete":
            raise invalid(f"{place}.status", "a call that was cut cannot be told to the model; leave it out")
        if item.call_id in self.calls and item.call_id not in self.answered:
            raise invalid(f"{place}.call_id", f"there is a call {shown(item.call_id)} already")
        call = called(item.call_id, item.name, item.arguments, f"{place}.arguments")
        turn = self._turn()
        if turn is None:
            turn = {"role": "assistant", "content": ""}
            self.tell(turn, place)
        turn.setdefault("tool_calls", []).append(call)
        self.calls[item.call_id] = item.name
        self.answered.discard(item.call_id)

    def _result(self, given: Any, place: str) -> None:
        item = part(ResultItem, given, place)
        name, at = self.calls.get(item.call_id), f"{place}.call_id"
        if name is None:
            raise invalid(at, f"no call before it has the id {shown(item.call_id)}")
        if item.call_id in self.answered:
            raise invalid(at, f"the call {shown(item.call_id)} has its result already")
        said = text(item.output, f"{place}.output")
        self.tell({"role": "tool", "content": said, "tool_call_id": item.call_id, "name": name}, place)
        self.answered.add(item.call_id)

    def _reasoning(self, given: Any, place: str) -> None:
        if isinstance(given, dict) and given.get("encrypted_content"):
            raise unsupported(f"{place}.encrypted_content", "only who wrote it can read it; leave the item out")
        if isinstance(given, dict) and given.get("summary"):
            raise unsupported(f"{place}.summary", "a summary is not what the model thought; leave the item out")
        item = part(ReasoningItem, given, place)
        words = "".join(each.text for each in item.content or ())
        if words:
            self.thought, self.thought_at = self.thought + words, place

    def _turn(self) -> dict[str, Any] | None:
        """Return the assistant's message that the next item of its turn belongs to; None where one begins."""
        last = self.messages[-1] if self.messages and not self.thought else None
        return last if last is not None and last["role"] == "assistant" else None
