"""What was said, as symbols: transcripts read from columns or names of files, and the characters they are made of."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from jobs.tasks import TaskError, messages

BLANK, UNKNOWN = "", "\ufffd"
"""The symbols with the numbers 0 and 1: CTC's blank, and a character that no training transcript has."""
NEVER = "\ufffe"
"""What stands for the unknown in what an answer is compared with: a character that no text has."""
_FIELD = re.compile(r"\{(\w+)\}")


def tidy(text: Any, case: str = "kept") -> str:
    """Return a transcript in NFC, its white space single spaces, its letters as `case` says: kept, lower, upper.

    Raises:
        TaskError: it is no text, or empty.
    """
    if not isinstance(text, str):
        raise TaskError(f"the transcript is {text!r:.60}, and not a text")
    plain = " ".join(unicodedata.normalize("NFC", messages.text_of(text, "transcript")).split())
    if messages.is_blank(plain):
        raise TaskError("the transcript is empty")
    return {"lower": plain.lower, "upper": plain.upper}.get(case, plain.strip)()


def check_pattern(pattern: str) -> str:
    """Return a pattern of names of files.

    Raises:
        ValueError: it has no `{text}`, a field twice, or two fields with nothing between them.
    """
    fields = _FIELD.findall(pattern)
    if fields.count("text") != 1 or len(set(fields)) != len(fields):
        raise ValueError(f"{pattern!r} must have {{text}} once, and each other field once, as {{text}}_{{speaker}}")
    if "}{" in pattern:
        raise ValueError(f"{pattern!r}: something must stand between two fields")
    return pattern


def from_name(path: str, pattern: str, longest: bool = False) -> str:
    """Return what the name of a file says was said: `{text}_{speaker}` of `yes_anna.wav` is `yes`.

    The pattern is compared with the end of the path, as many parts as it has, without the suffix. A field takes as few
    characters as it can; with `longest` as many.

    Raises:
        TaskError: the name does not fit.
    """
    parts = PurePosixPath(path).with_suffix("").parts[-(pattern.count("/") + 1) :]
    pieces = _FIELD.split(pattern)
    most = "+" if longest else "+?"
    regex = "".join(f"(?P<{p}>[^/]{most})" if at % 2 else re.escape(p) for at, p in enumerate(pieces))
    found = re.fullmatch(regex, "/".join(parts))
    if found is None:
        raise TaskError(f"the name {'/'.join(parts)!r} does not fit task.transcript_from {pattern!r}")
    return found["text"]


def symbols_of(characters: Iterable[str]) -> list[str]:
    """Return the symbols by number: blank, unknown, and the characters in order."""
    return [BLANK, UNKNOWN, *sorted(set(characters) - {UNKNOWN})]


def numbers(text: str, symbols: Sequence[str]) -> tuple[np.ndarray, bool]:
    """Return a transcript's symbols (L,) int16, and whether a character is not among them, or was lost before.

    Raises:
        TaskError: one is not, and the symbols have none for what is unknown.
    """
    index = {symbol: number for number, symbol in enumerate(symbols) if symbol}
    unknown = sorted({character for character in text if character not in index})
    if unknown and UNKNOWN not in index:
        raise TaskError(
            f"the transcript has {unknown[0]!r}, which the model has no symbol for, nor one for the unknown"
        )
    label = np.array([index.get(character, index.get(UNKNOWN, 0)) for character in text], np.int16)
    return label, bool(unknown) or UNKNOWN in text


def frames_needed(label: np.ndarray) -> int:
    """Return how many frames CTC needs at least for symbols (L,): one each, and one between two that are equal."""
    return len(label) + int((label[1:] == label[:-1]).sum())


def text_of(path: Sequence[int], symbols: Sequence[str]) -> str:
    """Return the text of a best path, the most likely symbol of each frame: repeats are one, blanks nothing."""
    kept = [number for at, number in enumerate(path) if number and (at == 0 or number != path[at - 1])]
    return " ".join("".join(symbols[number] for number in kept).split())


def edits(references: Sequence[str], guesses: Sequence[str]) -> dict[str, int]:
    """Count words and characters of the references, and the fewest edits that make them of the guesses (jiwer)."""
    import jiwer

    words = jiwer.process_words(list(references), list(guesses))
    characters = jiwer.process_characters(list(references), list(guesses))
    return {
        "word_edits": _edits(words),
        "words": words.hits + words.substitutions + words.deletions,
        "character_edits": _edits(characters),
        "characters": characters.hits + characters.substitutions + characters.deletions,
    }


def _edits(found: Any) -> int:
    return int(found.substitutions + found.deletions + found.insertions)


def of_hub(vocabulary: Mapping[str, int], blank: int) -> list[str]:
    """Return the symbols by number of a CTC model of the hub, whose vocab.json is `vocabulary`.

    `|` is the space between words; marks such as `<s>` are never written. Blank and unknown keep the model's numbers.

    Raises:
        TaskError: its symbols are not single characters, or it has other numbers than 0 for the blank.
    """
    symbols = [BLANK] * (max(vocabulary.values()) + 1)
    for symbol, number in vocabulary.items():
        mark = number == blank or (symbol.startswith("<") and symbol.endswith(">") and symbol != "<unk>")
        symbols[number] = BLANK if mark else UNKNOWN if symbol == "<unk>" else " " if symbol == "|" else symbol
    if long := [symbol for symbol in symbols if len(symbol) > 1]:
        raise TaskError(f"the model's vocab.json has {long[0]!r}: only vocabularies of single characters are read")
    return symbols
