"""The text that a tokenizer is trained on: a sample of stated size, drawn by a hash of each text.

Which texts are in it depends neither on how the data was cut into chunks nor on where these were read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

SPARE = 2
"""So many times the sample is kept of much text, until all has been seen."""
PIECE = 1 << 20
"""Longer texts are drawn in pieces of so many characters, cut where a line begins."""


@dataclass(frozen=True)
class TextFindings:
    """What a tokenizer is trained on, out of one chunk or many."""

    limit: int
    """Bytes that the sample may hold."""
    texts: tuple[tuple[bytes, str], ...] = ()
    """(hash, text); those of the smallest hashes are the sample."""
    size: int = 0
    """Bytes of the texts kept."""
    characters: frozenset[str] = frozenset()
    seen_bytes: int = 0
    share: float = 1.0
    """Texts with hashes in the lowest share of all were kept, the others left out at once."""
    is_full: bool = False
    """True once there were more of these than the sample holds."""

    def merged(self, later: TextFindings) -> TextFindings:
        """Return the findings of both chunks."""
        texts, size = self.texts + later.texts, self.size + later.size
        is_full = self.is_full or later.is_full or size > 2 * self.limit
        if size > 2 * self.limit:  # now and then is enough: the sample is the same
            texts = _smallest(texts, self.limit)
            size = sum(len(text.encode()) for _, text in texts)
        seen_bytes = self.seen_bytes + later.seen_bytes
        share, characters = min(self.share, later.share), self.characters | later.characters
        return TextFindings(self.limit, texts, size, characters, seen_bytes, share, is_full)

    @property
    def suffices(self) -> bool:
        """True where no text that was left out at once belongs in the sample."""
        return self.share == 1.0 or self.is_full or self.size > self.limit

    @property
    def sample(self) -> list[str]:
        """The texts drawn."""
        return [text for _, text in _smallest(self.texts, self.limit)]


def _smallest(texts: tuple[tuple[bytes, str], ...], limit: int) -> tuple[tuple[bytes, str], ...]:
    """Return the texts of the smallest hashes, as many as fit: of a union it is that of the parts' own smallest."""
    ordered = sorted(texts)
    sizes = accumulate(len(text.encode()) for _, text in ordered)
    return tuple(entry for entry, size in zip(ordered, sizes, strict=True) if size <= limit)


def drawn(texts: Sequence[str], limit: int, seed: int, expected_bytes: int = 0) -> TextFindings:
    """Return what of some texts may be in a sample of `limit` bytes.

    Args:
        expected_bytes: see `tokenization.observe`.
    """
    pieces = [piece for text in texts for piece in _pieces(text)]
    salt, seen_bytes = seed.to_bytes(8, "little"), sum(len(text.encode()) for text in texts)
    share = min(1.0, SPARE * limit / expected_bytes) if expected_bytes > 4 * SPARE * limit else 1.0
    below = int(share * 2**128).to_bytes(17, "big")
    hashes = (hashlib.blake2b(piece.encode(), digest_size=16, salt=salt).digest() for piece in pieces)
    kept = tuple((hash_, piece) for hash_, piece in zip(hashes, pieces, strict=True) if b"\0" + hash_ < below)
    size = seen_bytes if share == 1.0 else sum(len(piece.encode()) for _, piece in kept)
    return TextFindings(limit, kept, size, frozenset(), seen_bytes, share)


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > PIECE:
        end = text.find("\n", start + PIECE // 2, start + PIECE)
        end = start + PIECE if end < 0 else end
        yield text[start:end]
        start = end
    yield text[start:]
