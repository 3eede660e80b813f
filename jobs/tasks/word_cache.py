r"""Token ids of texts by their words: a word that has been seen is looked up, not tokenised again.

Of a byte-level BPE (GPT-2's, and those of our own) no pre-token spans a place where a space follows another visible
character: in its pattern, ` ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+`, a space is the first of a pre-token, or is among
white space. So a text that is cut there has the tokens of its parts, one behind the other. It is cut next to visible
ASCII characters only, where all notions of white space agree; the parts are tokenised by the library.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

KEPT = 3 << 19
"""Characters of the words that are kept: about 250,000 words, some 60 MB."""
MOST_ADDED = 64
"""So many added tokens are looked for in each text."""
_SPACES = re.compile(r"(?<=[!-~]) (?=[!-~])")
_BESIDE_OTHERS = ("  ", "\n ", " \n")


_CACHES: WeakKeyDictionary[Any, tuple[int, WordCache | None]] = WeakKeyDictionary()
"""Tokenizer → how many tokens it had, and its cache."""


def of(tokenizer: Any) -> WordCache | None:
    """Return the cache of a tokenizer of transformers, which is made once; None where its words hang together."""
    size, made = _CACHES.get(tokenizer, (-1, None))
    if size != len(tokenizer):
        backend = tokenizer.backend_tokenizer
        said = json.loads(backend.to_str())
        added = tuple(token["content"] for token in said["added_tokens"])
        made = WordCache(backend, added) if _is_apart(said) and len(added) <= MOST_ADDED else None
        _CACHES[tokenizer] = len(tokenizer), made
    return made


def _is_apart(said: dict[str, Any]) -> bool:
    """Tell by tokenizer.json whether the tokens of a word are those that it has in any text."""
    cuts, model = said["pre_tokenizer"] or {}, said["model"]
    by_pattern = cuts.get("type") == "ByteLevel" and cuts.get("use_regex", True)
    return by_pattern and said["normalizer"] is None and model["type"] == "BPE" and not model.get("dropout")


class WordCache:
    """The token ids of words, for one tokenizer."""

    def __init__(self, backend: Any, added: tuple[str, ...]) -> None:
        """Take a tokenizer of the library `tokenizers`, and its added tokens, which may stand anywhere in a text."""
        self._backend, self._added = backend, added
        self._first: dict[str, bytes] = {}
        self._later: dict[str, bytes] = {}
        """Of a word behind a space, which is its own: the bytes of its ids, int32."""
        self._kept = 0

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the token ids of each text, int32 (n,), without special ones that are not written in it."""
        if self._kept > KEPT:
            self._first, self._later, self._kept = {}, {}, 0
        whole = {number for number, text in enumerate(texts) if any(token in text for token in self._added)}
        words = [words_of(text) for number, text in enumerate(texts) if number not in whole]
        self._learn(self._first, "", {each[0] for each in words})
        self._learn(self._later, " ", set(chain.from_iterable(islice(each, 1, None) for each in words)))
        first, later = self._first, self._later.__getitem__
        found = (first[each[0]] + b"".join(map(later, islice(each, 1, None))) for each in words)
        others = iter(self._by_library([texts[number] for number in sorted(whole)]))
        ids = (next(others) if number in whole else next(found) for number in range(len(texts)))
        return [np.frombuffer(each, dtype=np.int32) for each in ids]

    def _learn(self, known: dict[str, bytes], before: str, words: set[str]) -> None:
        new = list(words.difference(known))
        self._kept += sum(map(len, new))
        known.update(zip(new, self._by_library([before + word for word in new]), strict=True))

    def _by_library(self, texts: list[str]) -> Iterable[bytes]:
        found = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return (array("i", encoding.ids).tobytes() for encoding in found)


def words_of(text: str) -> list[str]:
    """Cut a text at single spaces between visible ASCII characters; these spaces are left out."""
    if text.isascii() and not any(pair in text for pair in _BESIDE_OTHERS) and text.replace("\n", "").isprintable():
        words = text.split(" ")
        if words[0] and words[-1]:
            return words
    return _SPACES.split(text)
