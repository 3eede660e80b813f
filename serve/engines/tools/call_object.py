"""One call, read character by character: `{"name": "f", "arguments": {…}}`."""

from __future__ import annotations

import json
from collections.abc import Collection
from enum import Enum, auto

ARGUMENTS = ("arguments", "parameters")
NAMES = ("name", "function")
OTHER_KEYS = ("type", "id")
BLANK = " \t\r\n"


class _Place(Enum):
    KEY = auto()
    COLON = auto()
    VALUE = auto()
    AFTER = auto()


class CallObject:
    """Reads the object of a call.

    `accepted` says that it is one: the function is known and its arguments have begun, or the object is complete. From
    then on `take` returns the arguments. `failed` says that it is none; that is never said after `accepted`.
    """

    def __init__(self, known: Collection[str] | None) -> None:
        """`known` are the only functions that make it a call; None takes any name."""
        self._known = known
        self.name: str | None = None
        self.accepted = self.failed = self.complete = False
        self._place: _Place | None = None
        self._key = ""
        self._value = ""
        self._depth = 0
        """Of the brackets inside the value."""
        self._in_string = self._escaped = False
        self._arguments = ""
        self._has_arguments = self._streaming = False

    def take(self) -> str:
        """Return what became certain of the arguments."""
        if not self.accepted:
            return ""
        taken, self._arguments = self._arguments, ""
        return taken

    def read(self, char: str) -> None:
        """Read one more character of the object, the first of which is its opening bracket."""
        if self._place is None:
            self._place = _Place.KEY
        elif self._place is _Place.KEY:
            self._read_key(char)
        elif self._place is _Place.COLON:
            self._read_colon(char)
        elif self._place is _Place.VALUE:
            self._read_value(char)
        else:
            self._read_after(char)

    def _fail(self) -> None:
        """What is no call any more ends here; a call that was accepted stays one."""
        if self.accepted:
            self.complete = True
        else:
            self.failed = True

    def _read_key(self, char: str) -> None:
        if not self._key and char in BLANK:
            return
        if not self._key and char == "}":
            self._end()
            return
        self._key += char
        if self._key[0] != '"' or len(self._key) > 64:
            self._fail()
        elif len(self._key) > 1 and char == '"':
            self._key = self._key[1:-1]
            self._place = _Place.COLON
            if self._known is not None and self._key not in (*ARGUMENTS, *NAMES, *OTHER_KEYS):
                self._fail()

    def _read_colon(self, char: str) -> None:
        if char == ":":
            self._place, self._value = _Place.VALUE, ""
        elif char not in BLANK:
            self._fail()

    def _read_value(self, char: str) -> None:
        if not self._value and char in BLANK:
            return
        scalar = not self._depth and not self._in_string
        if scalar and self._value and char in ",}" + BLANK:  # behind a number or null
            self._settle()
            if not self.failed:
                self._read_after(char)
            return
        self._value += char
        if len(self._value) == 1 and char == "{" and self._key in ARGUMENTS and not self._has_arguments:
            self._streaming = self._has_arguments = True
            self._accept()
        if self._streaming:
            self._arguments += char
        self._count(char)
        if not self._depth and not self._in_string and char in '"}]':
            self._settle()

    def _count(self, char: str) -> None:
        if self._in_string:
            self._in_string = self._escaped or char != '"'
            self._escaped = char == "\\" and not self._escaped
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1

    def _settle(self) -> None:
        """The value is complete."""
        self._place = _Place.AFTER
        if self._streaming:
            self._streaming = False
            return
        value = _parsed(self._value)
        if self._key in NAMES and isinstance(value, str) and self.name is None:
            self.name = value
            if self._known is not None and value not in self._known:
                self._fail()
            self._accept()
        elif self._key in ARGUMENTS and not self._has_arguments:
            self._take_value(value)

    def _take_value(self, value: object) -> None:
        """Take arguments that are no object: none at all, or an object written as a string."""
        text = "{}" if value is None else value
        if isinstance(text, str) and isinstance(_parsed(text), dict):
            self._has_arguments, self._arguments = True, text
            self._accept()
        else:
            self._fail()

    def _accept(self) -> None:
        if self.name is not None and self._has_arguments and not self.failed:
            self.accepted = True

    def _read_after(self, char: str) -> None:
        if char == ",":
            self._place, self._key = _Place.KEY, ""
        elif char == "}":
            self._end()
        elif char not in BLANK:
            self._fail()

    def _end(self) -> None:
        if self.name is None:
            self._fail()
            return
        if not self._has_arguments:
            self._has_arguments, self._arguments = True, "{}"
        self._accept()
        self.complete = True


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return ...
