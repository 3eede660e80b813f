"""Where tokens lie in a text: which characters each of them gave, however the text comes and wherever it is cut."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from serve.engines.protocol import TokenLogprobs
from serve.engines.text import REPLACEMENT, ByteDetokenizer, Decoder, Detokenizer, detokenizer
from serve.wire import ScoredToken


class Placed(NamedTuple):
    """A token in a text."""

    raw: bytes
    """What it gave to the text: its own bytes where they are not whole characters, none for one that does not show."""
    start: int
    """Characters before it; those before the character that it is a part of."""
    end: int


class Places:
    """Tokens in, places out, as soon as the characters that they are parts of are whole."""

    def __init__(self, decode: Decoder, before: Sequence[int] = ()) -> None:
        """`before` are the tokens that the text goes on from."""
        self._decode = decode
        self._detokenizer: ByteDetokenizer | Detokenizer = detokenizer(decode, before)
        self._tokens: list[int] = []
        self._text = ""
        """What the tokens gave that have no place yet."""
        self._end = 0

    def push(self, token: int) -> list[Placed]:
        """Add a token; return the places that became certain, in the order of the tokens."""
        self._text += self._detokenizer.push(token)
        self._tokens.append(token)
        return [] if self._detokenizer.pending else self._place()

    def flush(self) -> list[Placed]:
        """Return the places of the tokens whose characters never became whole."""
        self._text += self._detokenizer.flush()
        return self._place()

    def _place(self) -> list[Placed]:
        text, tokens = self._text, self._tokens
        self._text, self._tokens = "", []
        if not tokens:
            return []
        raws = [b"" if token in self._decode.special else self._decode.token_bytes(token) for token in tokens]
        if len(raws) == 1 and REPLACEMENT not in text:
            raws = [text.encode()]  # as it shows here: a text's first word may have lost its space
        starts = starts_of(raws, text)
        ends = [
            max(end, start + bool(raw)) for raw, start, end in zip(raws, starts, [*starts[1:], len(text)], strict=True)
        ]
        first, self._end = self._end, self._end + len(text)
        return [
            Placed(_as_shown(raw, text[start:end]), first + start, first + end)
            for raw, start, end in zip(raws, starts, ends, strict=True)
        ]


def _as_shown(raw: bytes, text: str) -> bytes:
    """Return a token's bytes, or its text's where a decoder made a U+FFFD of a whole character (ByteFallback)."""
    return raw if not raw or _is_partial(raw) or raw.decode() == text else text.encode()


def of_prompt(decode: Decoder, tokenizer: Any, prompt: str | None, tokens: Sequence[int]) -> tuple[str, list[Placed]]:
    """Return a prompt as text, and the places of its tokens in it. `prompt` is None for one that came as tokens."""
    places = Places(decode)
    placed = [place for token in tokens for place in places.push(token)] + places.flush()
    stream = detokenizer(decode)
    text = "".join(map(stream.push, tokens)) + stream.flush()
    if prompt is None or prompt == text or not getattr(tokenizer, "is_fast", False):
        return text if prompt is None else prompt, placed
    # the tokenizer changes texts (lower case, unknown characters, spaces): only itself knows where its tokens lie
    offsets = tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
    if len(offsets) != len(tokens):
        return prompt, placed
    raws = [decode.token_bytes(token) for token in tokens]
    return prompt, [
        Placed(raw if start < end and _is_partial(raw) else prompt[start:end].encode(), start, end)
        for raw, (start, end) in zip(raws, offsets, strict=True)
    ]


def starts_of(raws: Sequence[bytes], text: str) -> list[int]:
    """Return where in their text the bytes of each token begin: at the character that the first byte belongs to."""
    characters = codecs.getincrementaldecoder("utf-8")("replace")
    starts, decoded = [], ""
    for raw in raws:
        decoded += characters.decode(raw[:1])
        begun = bool(characters.getstate()[0])
        starts.append(len(decoded) - (1 if raw and not begun else 0))
        decoded += characters.decode(raw[1:])
    if decoded + characters.decode(b"", final=True) == text:
        return starts
    return _starts_of_invalid(raws, text)


def _starts_of_invalid(raws: Sequence[bytes], text: str) -> list[int]:
    """The same for decoders that make a U+FFFD of each byte that belongs to no character (ByteFallback)."""
    lengths = [len(raw) if _is_partial(raw) else len(raw.decode()) for raw in raws]
    if sum(lengths) == len(text):
        return [sum(lengths[:at]) for at in range(len(lengths))]
    starts = [0] * len(raws)
    last = raws[-1].decode(errors="replace") if raws else ""
    if text.endswith(last):
        starts[-1:] = [len(text) - len(last)]
    return starts


def _is_partial(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return True
    return False


def scored(entry: TokenLogprobs, place: Placed, first: int, decode: Decoder) -> ScoredToken:
    """Return a token's log-probabilities as they leave the replica; `first` is the offset of the text it lies in."""
    raw = decode.token_bytes
    top = tuple((place.raw if token == entry.token else raw(token), value) for token, value in entry.top)
    return ScoredToken(place.raw, entry.logprob, top, first + place.start)


class Scores:
    """The log-probabilities of a generated text, in step with the text that is returned.

    A token is told when the text it gave is settled: returned, or left out (a stop string, the call of a function).
    One of which a part was returned is told by that part.
    """

    def __init__(self, decode: Decoder, first: int = 0, before: Sequence[int] = ()) -> None:
        """`first` is the offset of the text, `before` are the tokens that it goes on from."""
        self._decode = decode
        self._first = first
        self._places = Places(decode, before)
        self._unplaced: list[TokenLogprobs] = []
        self._waiting: list[tuple[TokenLogprobs, Placed]] = []
        self._returned: list[tuple[int, int]] = []
        """Which of the characters that the tokens gave were returned."""

    def push(
        self, entries: Iterable[TokenLogprobs], returned: Iterable[tuple[int, int]], settled: int
    ) -> list[ScoredToken]:
        """Add tokens and the text that was returned meanwhile; return the tokens that can be told.

        Args:
            entries: the tokens that were chosen.
            returned: start and end of what was returned of the text that all tokens gave.
            settled: so many characters of that text were returned or left out for good.
        """
        for entry in entries:
            self._unplaced.append(entry)
            self._placed(self._places.push(entry.token))
        for start, end in returned:
            if self._returned and self._returned[-1][1] == start:
                start = self._returned.pop()[0]
            self._returned.append((start, end))
        told: list[ScoredToken] = []
        while self._waiting and self._waiting[0][1].end <= settled:
            told += self._told(*self._waiting.pop(0))
        return told

    def finish(self) -> list[ScoredToken]:
        """Return the rest, a token that ended the text included; nothing that lies behind what was returned."""
        self._placed(self._places.flush())
        told: list[ScoredToken] = []
        for entry, place in self._waiting:
            told += self._told(entry, place)
        self._waiting = []
        return told

    def _placed(self, places: list[Placed]) -> None:
        for place in places:
            self._waiting.append((self._unplaced.pop(0), place))

    def _told(self, entry: TokenLogprobs, place: Placed) -> list[ScoredToken]:
        for start, end in self._returned or [(0, 0)]:
            if not place.raw and start <= place.start <= end:
                return [scored(entry, place, self._first, self._decode)]
            if max(start, place.start) < min(end, place.end):
                return [scored(entry, _part(place, start, end), self._first, self._decode)]
        return []


def _part(place: Placed, start: int, end: int) -> Placed:
    """Return what lies between two characters of what a token gave."""
    raw, text = place.raw, place.raw.decode(errors="replace")
    if end < place.end:
        raw = raw[: len(raw) - len(text[end - place.end :].encode())]
    if start > place.start:
        raw = raw[len(text[: start - place.start].encode()) :]
    return Placed(raw, max(start, place.start), min(end, place.end))
