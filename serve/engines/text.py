"""Turn a growing list of tokens into text that may be shown: whole characters only, nothing of a stop string."""

from __future__ import annotations

import codecs
import copy
import re
from collections.abc import Collection, Sequence
from typing import Any

REPLACEMENT = "\ufffd"
CONTEXT = 6
"""Tokens of a prompt that a text's first word is decoded with."""
WINDOW = 24
"""Tokens decoded again at each step, at most, before a window that will not end cleanly is split."""


class Decoder:
    """Token ids → text, special tokens skipped and spaces left alone.

    The Rust tokenizer is called directly where there is one: at 64 streams the wrapper's arguments cost more
    than the decoding.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._added = frozenset(added)
        self.special = frozenset(token_id for token_id, token in added.items() if token.special)
        """Tokens that never show in the text."""
        self._skips = True
        """Whether no special token shows."""
        self._tokens: dict[int, str] = {at: token for token, at in tokenizer.get_vocab().items()}
        kind = type(getattr(self._backend, "decoder", None)).__name__
        self.byte_level = kind == "ByteLevel"
        """Whether the text is the tokens' bytes, one after the other."""

    def token_bytes(self, token: int) -> bytes:
        """Return what one token stands for; a special token for its name, one outside the vocabulary for nothing."""
        text = self._tokens.get(token, "")
        if self.byte_level and token in self._added:
            return text.encode()
        if self.byte_level and all(char in BYTES for char in text):
            return bytes(BYTES[char] for char in text)
        byte = re.fullmatch("<0x([0-9A-F]{2})>", text)  # SentencePiece's bytes
        return bytes.fromhex(byte[1]) if byte else text.replace("\u2581", " ").encode()

    def __call__(self, ids: Sequence[int]) -> str:
        if self._backend is not None:
            return str(self._backend.decode(ids, skip_special_tokens=self._skips))
        return str(self._tokenizer.decode(ids, skip_special_tokens=self._skips, clean_up_tokenization_spaces=False))

    def showing(self, tokens: Collection[int]) -> Decoder:
        """Return the same decoder where these special tokens show by their names.

        It must not be given others: those that never show are left out before a text is decoded.
        """
        if not self.special.intersection(tokens):
            return self
        shown = copy.copy(self)
        shown.special, shown._skips = self.special.difference(tokens), False
        return shown


def _byte_characters() -> dict[str, int]:
    """Return the characters that stand for bytes in byte-level vocabularies (GPT-2): printable ones for themselves."""
    itself = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in itself]
    return {chr(byte): byte for byte in itself} | {chr(256 + at): byte for at, byte in enumerate(others)}


BYTES = _byte_characters()


class ByteDetokenizer:
    """Incremental decoding where a token is a run of bytes: a third of a microsecond a token, not ten."""

    def __init__(self, decode: Decoder) -> None:
        self._decode = decode
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Add a token; return the text that became certain."""
        return "" if token in self._decode.special else self._characters.decode(self._decode.token_bytes(token))

    def flush(self) -> str:
        """Return what is left, half characters included."""
        return self._characters.decode(b"", final=True)

    @property
    def pending(self) -> bool:
        """Whether the last token ended inside a character."""
        return bool(self._characters.getstate()[0])


class Detokenizer:
    """Incremental decoding with any decoder. What `push` and `flush` return joins to the decoding of all ids at once.

    A token may end inside a character, which decodes to U+FFFD until the rest has come, so trailing ones are held
    back. Each decoding covers a window that begins at a clean boundary one step before the text still to come,
    because decoders treat the first token of a text in a way of its own (SentencePiece drops its space).
    """

    def __init__(self, decode: Decoder, before: Sequence[int] = ()) -> None:
        """`before` are tokens that the text goes on from; they are not shown."""
        self._decode = decode
        self._window = [token for token in before if token not in decode.special][-CONTEXT:]
        text = decode(self._window)
        if text.endswith(REPLACEMENT):  # half a character: the text has to begin anew
            self._window, text = [], ""
        self._clean = len(self._window)
        """Tokens at the head of the window whose text ended in a whole character and is known to be shown."""
        self._shown = len(text)
        """Characters of the window's text already returned."""
        self.pending = False
        """Whether the last token may have ended inside a character."""

    def push(self, token: int) -> str:
        """Add a token; return the text that became certain."""
        if token in self._decode.special:
            return ""
        self._window.append(token)
        text = self._decode(self._window)
        certain = text.rstrip(REPLACEMENT)
        self.pending = len(certain) < len(text)
        if not self.pending:
            return self._advance(text)
        if len(self._window) - self._clean >= WINDOW:
            return self._split(text)
        return self._show(certain)

    def flush(self) -> str:
        """Return what is left, half characters included."""
        return self._show(self._decode(self._window))

    def _show(self, text: str) -> str:
        piece = text[self._shown :]
        self._shown = max(self._shown, len(text))
        return piece

    def _advance(self, text: str) -> str:
        """The window ends cleanly: return its text, and let the next window begin at the previous clean boundary.

        Without new text the window stays: it may hold all the context there is.
        """
        piece = self._show(text)
        if piece:
            self._window = self._window[self._clean :]
            self._clean = len(self._window)
            self._shown = len(self._decode(self._window))
        return piece

    def _split(self, text: str) -> str:
        """Bound the work for bytes that never form a character.

        An incomplete character decodes to one U+FFFD, so all but the last are final for byte-level tokenizers,
        and the window may be cut wherever its two parts decode to the same text as the whole.
        """
        piece = self._show(text[:-1])
        head, tail = self._window[:-4], self._window[-4:]
        head_text, tail_text = self._decode(head), self._decode(tail)
        if tail_text and head_text + tail_text == text:
            self._window, self._clean, self._shown = tail, 0, self._shown - len(head_text)
        return piece


class StopStrings:
    """Hold back text that may turn out to begin a stop string, and cut at the first that is complete.

    The first is the one that ends first, so the result does not depend on how the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Add text; return what may be shown. `stopped` says whether a stop string was met."""
        if not self._stops:
            return text
        self._held += text
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._take(min(found)[1])
        return self._take(len(self._held) - self._undecided())

    def flush(self) -> str:
        """Return the text still held back, when no more will come."""
        return self._take(len(self._held))

    def _take(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        return text

    def _undecided(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = max(len(stop) for stop in self._stops) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0


def detokenizer(decode: Decoder, before: Sequence[int] = ()) -> ByteDetokenizer | Detokenizer:
    """Return the fastest way to decode a text token by token; `before` are the tokens that it goes on from."""
    return ByteDetokenizer(decode) if decode.byte_level else Detokenizer(decode, before)


class TextStream:
    """The text of one completion: tokens in, text to show out."""

    def __init__(self, decode: Decoder, stops: Sequence[str], min_tokens: int = 0, before: Sequence[int] = ()) -> None:
        """Stop strings are looked for after `min_tokens` tokens. `before`: see Detokenizer."""
        self._detokenizer = detokenizer(decode, before)
        self._stops = StopStrings(stops)
        self._unstoppable = min_tokens

    @property
    def stopped(self) -> bool:
        return self._stops.stopped

    def push(self, token: int) -> str:
        text = self._detokenizer.push(token)
        self._unstoppable -= 1
        return text if self._unstoppable >= 0 else self._stops.push(text)

    def flush(self) -> str:
        """Return the rest when the completion ends without a stop string; a stop string in the rest still counts."""
        text = self._stops.push(self._detokenizer.flush())
        return text if self.stopped else text + self._stops.flush()
