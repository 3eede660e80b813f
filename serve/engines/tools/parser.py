"""An answer, piece by piece, taken apart into text and calls of functions.

It is read character by character, so that what comes out does not depend on how the answer was cut. What looks like a
call and turns out to be none is text again, every character of it. Blanks around calls belong to the calls.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from serve.engines.tools.call_object import BLANK, CallObject
from serve.engines.tools.formats import Format
from serve.wire import CallPiece

SEPARATORS = ";," + BLANK
"""Between the calls of formats without markers."""


class TextPiece(NamedTuple):
    """Text of the answer, and its place in what was read."""

    text: str
    start: int


Piece = TextPiece | CallPiece


class CallParser:
    """Text in, pieces out."""

    def __init__(self, form: Format, names: Collection[str], parallel: bool = True) -> None:
        """`names` are the functions there are; without `parallel` the answer ends with its first call."""
        self._form = form
        self._names = frozenset(names)
        self._parallel = parallel
        self._state = self._text
        self._pieces: list[Piece] = []
        self._read = 0
        """Characters read."""
        self._held = ""
        """The last characters read, which are text or the beginning of a call."""
        self._object = CallObject(None)
        self._in_list = False
        self._marked = False
        """Whether a marker stood before the objects being read."""
        self._said = False
        """Whether any text was returned."""
        self.calls = 0
        """Calls that have begun."""
        self.complete = 0
        """Calls that are complete."""

    @property
    def ended(self) -> bool:
        """Whether the answer is over: it may have one call, and has it."""
        return not self._parallel and self.complete > 0

    @property
    def settled(self) -> int:
        """Characters of which it is known whether they are text."""
        return self._read - len(self._held)

    def push(self, text: str) -> list[Piece]:
        """Read more of the answer; return what became certain."""
        for char in text:
            if self.ended:
                break
            self._read += 1
            self._held += char
            self._state(char)
        return self._take()

    def finish(self) -> list[Piece]:
        """Return what was held back, when no more will come."""
        if self.calls and (self._state == self._after_call or not self._held.strip(BLANK)):
            self._held = ""  # a marker that was cut, blanks
        self._say(len(self._held))
        return self._take()

    # -- states: each gets the character that was just added to what is held -----------------------------------------

    def _text(self, char: str) -> None:
        form, held = self._form, self._held
        if form.opening and held.endswith(form.opening):
            self._say(len(held.removesuffix(form.opening).rstrip(BLANK)))
            self._marked, self._state = True, self._before_call
        elif not form.needs_opening and not self._said and held.strip(BLANK) in form.first:
            self._state = self._before_call
            self._before_call(char)
        else:
            self._say(len(held) - len(_undecided(held, form.opening)))

    def _before_call(self, char: str) -> None:
        if char == "{":
            self._begin(char)
        elif char == "[" and self._form.takes_list and not self._in_list:
            self._in_list = True
        elif char not in BLANK:
            self._leave()
            self._say(len(self._held) - 1)
            self._text(char)

    def _begin(self, char: str) -> None:
        self._object = CallObject(None if self._marked else self._names)
        self._state = self._call
        self._call(char)

    def _call(self, char: str) -> None:
        call = self._object
        was_accepted = call.accepted
        call.read(char)
        if call.failed:
            self._say(len(self._held))
            self._leave()
        elif call.accepted:
            self._held = ""
            name = None if was_accepted else call.name
            arguments = call.take()
            if name is not None or arguments:
                self._pieces.append(CallPiece(self.calls - was_accepted, name, arguments))
            self.calls += not was_accepted
        if call.complete:
            self.complete += 1
            self._state = self._after_call

    def _after_call(self, char: str) -> None:
        form, after = self._form, self._held.strip(BLANK)
        if form.closing and form.closing.startswith(after):
            if after == form.closing:
                self._held = ""
                self._leave()
        elif self._in_list and after in ("", ","):
            if after == ",":
                self._state = self._before_call
        elif self._in_list and after == "]":
            self._held = ""
            self._leave()
        elif (after if form.needs_opening else after.lstrip(SEPARATORS)) == "{":
            self._begin(char)
        elif after and (form.needs_opening or after.strip(SEPARATORS)):
            self._back_to_text()

    # -- between states -----------------------------------------------------------------------------------------------

    def _leave(self) -> None:
        self._state, self._in_list, self._marked = self._text, False, False

    def _back_to_text(self) -> None:
        """What stands behind a call is text, or begins the marker of another one."""
        self._leave()
        held, self._held = self._held, ""
        self._read -= len(held)
        for char in held:
            self._read += 1
            self._held += char
            self._state(char)

    def _say(self, count: int) -> None:
        """Return the first characters of what is held as text."""
        text, start = self._held[:count], self._read - len(self._held)
        self._held = self._held[count:]
        if text:
            self._said = True
            self._pieces.append(TextPiece(text, start))

    def _take(self) -> list[Piece]:
        pieces, self._pieces = _joined(self._pieces), []
        return pieces


def _undecided(held: str, opening: str | None) -> str:
    """Return the end of a text that may be blanks before a call, and the beginning of its marker."""
    marker = ""
    if opening:
        lengths = range(min(len(held), len(opening) - 1), 0, -1)
        marker = next((held[-length:] for length in lengths if opening.startswith(held[-length:])), "")
    before = held[: len(held) - len(marker)]
    return held[len(before.rstrip(BLANK)) :]


def _joined(pieces: list[Piece]) -> list[Piece]:
    """Join neighbours of one kind."""
    joined: list[Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if isinstance(piece, TextPiece) and isinstance(last, TextPiece) and last.start + len(last.text) == piece.start:
            joined[-1] = TextPiece(last.text + piece.text, last.start)
        elif isinstance(piece, CallPiece) and isinstance(last, CallPiece) and piece.name is None:
            joined[-1] = last._replace(arguments=last.arguments + piece.arguments)
        else:
            joined.append(piece)
    return joined
