"""How families of models write the calls of functions in their answers.

| name | an answer |
| --- | --- |
| `hermes` | `<tool_call>\\n{"name": "f", "arguments": {…}}\\n</tool_call>` (Hermes, Qwen 2.5 and 3) |
| `llama3` | `{"name": "f", "parameters": {…}}`, perhaps after `<|python_tag|>` (Llama 3.1 and on) |
| `mistral` | `[TOOL_CALLS][{"name": "f", "arguments": {…}}]` (Mistral, up to its third tokenizer) |
| `json` | `{"name": "f", "arguments": {…}}`, or a list of such |
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Format:
    """One way of writing calls. The object of a call may say `parameters` for `arguments` in any of them."""

    name: str
    opening: str | None = None
    """What stands before the calls; without one, an answer that begins with an object may be a call."""
    needs_opening: bool = True
    closing: str | None = None
    """What stands after each call."""
    listed: bool = False
    """Whether the calls stand in a JSON list."""
    takes_list: bool = False
    """Whether they may."""
    arguments: str = "arguments"
    """The key of the arguments, as the model learned to write it."""
    between: str = "\n"
    """What stands between two calls."""
    padding: str = ""
    """What stands between the markers and the object."""

    @property
    def first(self) -> tuple[str, ...]:
        """What calls begin with."""
        return ("{", "[") if self.takes_list else ("{",)

    @property
    def markers(self) -> tuple[str, ...]:
        return tuple(marker for marker in (self.opening, self.closing) if marker)


FORMATS: dict[str, Format] = {
    form.name: form
    for form in (
        Format("hermes", "<tool_call>", closing="</tool_call>", padding="\n"),
        Format("llama3", "<|python_tag|>", needs_opening=False, arguments="parameters", between="; "),
        Format("mistral", "[TOOL_CALLS]", listed=True, takes_list=True, between=", "),
        Format("json", needs_opening=False, takes_list=True),
    )
}
FOREIGN = (
    *("<function=", "<arg_key>", "[ARGS]", "<|START_ACTION|>", "<start_function_call>", "<|tool_calls_section_begin|>"),
    *("<｜tool▁calls▁begin｜>", "<|channel|>", "<minimax:tool_call>", "<|tool_call_start|>", "<|tool_call|>"),
)
"""Marks of templates whose calls are not written in JSON, or in JSON of another form: they would be taken for text."""


def tool_format(template: str) -> Format | None:
    """Return how a model writes calls, as its chat template tells; None for a template without tools.

    Raises:
        ValueError: the template has tools, in a form that is not known here; the message names what gives it away.
    """
    if not re.search(r"\btools\b", template):
        return None
    for mark in FOREIGN:
        if mark in template:
            raise ValueError(f"its chat template writes calls with {mark!r}, which is not supported")
    if "<tool_call>" in template:
        return FORMATS["hermes"]
    if "[TOOL_CALLS]" in template:
        return FORMATS["mistral"]
    if "<|python_tag|>" in template or ("<|start_header_id|>" in template and "parameters" in template):
        return FORMATS["llama3"]
    return FORMATS["json"]


def marker_tokens(form: Format, tokenizer: Any) -> Mapping[str, int]:
    """Return the markers that are tokens of their own, with their ids."""
    added = {str(token): at for at, token in getattr(tokenizer, "added_tokens_decoder", {}).items()}
    return {marker: added[marker] for marker in form.markers if marker in added}
