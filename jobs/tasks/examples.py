"""Examples of text and conversations: which of the two one is, and its text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jobs.tasks import TaskError
from jobs.tasks.architectures import close
from jobs.tasks.conversations import columns_of, conversation_of, is_conversation
from jobs.tasks.messages import text_of

_QUESTIONS = {"instruction", "prompt", "question", "query", "user", "human"}
_ANSWERS = {"response", "answer", "output", "completion", "assistant", "gpt"}


class ExampleReader:
    """Reads each example by its own shape."""

    def __init__(self, text_column: str | None) -> None:
        """Take the column of the text; None: `text`, where an example is no conversation."""
        self._is_given = text_column is not None
        self.column = text_column or "text"

    def is_conversation(self, example: Mapping[str, Any]) -> bool:
        """Tell a conversation from a text: a column of the text that was named makes every example a text."""
        return not self._is_given and is_conversation(example)

    def columns(self, example: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the columns that are read."""
        return columns_of(example) if self.is_conversation(example) else (self.column,)

    def text(self, example: Mapping[str, Any]) -> str:
        """Return the text of an example that is no conversation.

        Raises:
            TaskError: its column is missing or holds something else.
        """
        if example.get(self.column) is not None:
            return text_of(example[self.column], self.column)
        if self.column in example:
            raise TaskError(f"column {self.column!r} holds NoneType, not text")
        raise TaskError(
            f"no text in column {self.column!r}; this example has {sorted(example)}{_hint(self.column, example)}"
        )

    def words(self, example: Mapping[str, Any]) -> str:
        """Return what a tokenizer may learn from: the text, or all that is said in a conversation."""
        if not self.is_conversation(example):
            return self.text(example)
        return "".join(message["content"] for message in conversation_of(example).messages)


def _hint(column: str, example: Mapping[str, Any]) -> str:
    """Say what to do about an example without the column of the text: half of a conversation is no text."""
    asked, answered = (next((key for key in example if key.lower() in kind), None) for kind in (_QUESTIONS, _ANSWERS))
    if asked and answered:
        return (
            f". A question and its answer are read from the columns prompt and completion, or instruction and output "
            f"(and input), a conversation from messages or conversations: rename {asked!r} and {answered!r}"
        )
    return f"{close(column, example)}. Name the column in task.text_column"
