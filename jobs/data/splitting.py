"""Which examples are held out. Pure: by what is encoded of each, the share that is asked for, and a seed.

Whole examples are held out; copies of one lie on one side. Only a single text, or a few long ones, are cut. Where there
are too many examples to list (jobs/data/tally.py), each is held out or not by its own hash.
"""

from __future__ import annotations

import hashlib
import pickle
import random
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from cluster.errors import UserError
from jobs.data.permutation import mixed
from jobs.tasks import TaskError

FEW = 20
"""With fewer texts than this, all of them long, each is cut to hold its end out, instead of whole texts."""
LONG_BYTES = 20_000
"""A text of this size is long: a book's chapter, not a row of a table."""

Way = Literal["nothing", "whole", "cut"]


def way(examples: int, distinct: int, smallest: int, can_be_cut: bool, fraction: float) -> Way:
    """Decide how a share is held out.

    Args:
        examples: how many there are, `distinct` of them different.
        smallest: bytes of the smallest one.
        can_be_cut: True where each is a text.
    """
    if not fraction:
        return "nothing"
    few_and_long = examples < FEW and smallest >= LONG_BYTES
    return "cut" if can_be_cut and (distinct == 1 or few_and_long) else "whole"


def held_out(contents: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Choose which examples are held out: bool (N,), of contents, uint64 (N,), that are equal for copies.

    A group of copies stands or falls together; groups are drawn by the seed while the share has room for them.

    Raises:
        UserError: nothing would be left to train on.
    """
    count = len(contents)
    wanted = max(1, round(count * fraction))
    _, group, sizes = np.unique(contents, return_inverse=True, return_counts=True)
    if len(sizes) == count:  # no copies
        chosen = np.zeros(count, dtype=bool)
        chosen[random.Random(seed).sample(range(count), wanted)] = True
    else:
        chosen = _drawn(_by_first(group, sizes), sizes, wanted, seed)[group]
    if chosen.all():
        different = "" if len(sizes) == count else f" ({len(sizes)} different)"
        raise UserError(
            f"data.eval_fraction {fraction} leaves nothing of {count} example(s){different} to train on; give data.eval"
            " or set data.eval_fraction: 0"
        )
    return chosen


def taken(contents: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Choose by its own hash whether an example is held out: bool (N,), of contents, uint64 (N,).

    For examples that are too many to be listed: each is held out with a probability of `fraction`, whatever else there
    is. The hash is mixed with the seed's by the finaliser of SplitMix64 (Steele, Lea and Flood, 2014).
    """
    key = np.array([content_of(seed)], dtype=np.uint64)
    return mixed(contents ^ key) < np.uint64(min(int(fraction * 2**64), 2**64 - 1))


def check_taken(held: int, count: int, fraction: float) -> None:
    """Refuse a share of many examples by which none of them is held out, or all.

    Raises:
        UserError: it does.
    """
    if held in (0, count):
        raise UserError(
            f"data.eval_fraction {fraction} holds out {'none' if not held else 'all'} of {count} examples, each of "
            "which is held out by its own hash; set another, give data.eval, or set data.eval_fraction: 0"
        )


def content_of(value: Any) -> int:
    """Return what tells an example from others, 64 bits of a hash: equal for copies, white space in texts aside.

    Two of a billion different ones may be taken for copies: they then lie on the same side, which does no harm.

    Raises:
        TaskError: a text holds half a character, so that no tokenizer can read it.
    """
    digest = hashlib.blake2b(digest_size=8)
    _add(digest, value)
    return int.from_bytes(digest.digest(), "little")


def _by_first(group: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return the groups, int64 (G,), in the order of their first members: that of the data, not of hashes."""
    first = np.full(len(sizes), len(group))
    np.minimum.at(first, group, np.arange(len(group)))
    return np.argsort(first)


def _drawn(groups: np.ndarray, sizes: np.ndarray, wanted: int, seed: int) -> np.ndarray:
    """Return which groups are held out, bool (G,): drawn at random, the first that fits always."""
    chosen = np.zeros(len(sizes), dtype=bool)
    order = groups[np.random.Generator(np.random.PCG64(seed)).permutation(len(groups))]
    room = wanted
    for index in order:
        if sizes[index] <= room:
            chosen[index] = True
            room -= int(sizes[index])
        if not room:
            break
    if not chosen.any():  # each is larger than the share: the smallest one is the least evil
        chosen[order[np.argmin(sizes[order])]] = True
    return chosen


def _add(digest: Any, value: Any) -> None:
    """Add a value, its kind and its length, so that no two values give the same bytes."""
    if isinstance(value, str):
        kind, content = "s", _encoded(value if _is_plain(value) else " ".join(value.split()))
    elif isinstance(value, bytes):
        kind, content = "b", value
    elif isinstance(value, Mapping):
        digest.update(f"m{len(value)};".encode())
        for key in value:
            _add(digest, key)
            _add(digest, value[key])
        return
    elif isinstance(value, list | tuple):
        digest.update(f"l{len(value)};".encode())
        for entry in value:
            _add(digest, entry)
        return
    elif isinstance(value, np.ndarray) and value.dtype != object:
        kind, content = f"a{value.dtype}{value.shape}", np.ascontiguousarray(value).tobytes()
    else:
        kind, content = type(value).__name__, _bytes(value)
    digest.update(f"{kind}{len(content)};".encode() + content)


def _is_plain(text: str) -> bool:
    """Tell whether all white space in a text is single spaces between others; quick, and may miss some."""
    return text.isascii() and text.isprintable() and "  " not in text and text == text.strip()


def _bytes(value: Any) -> bytes:
    if value is None or isinstance(value, bool | int | float):
        return repr(value).encode()
    return value.tobytes() if hasattr(value, "tobytes") else pickle.dumps(value)


def _encoded(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])[1:-1]
        raise TaskError(
            f"half a character ({half}, a lone surrogate) in {text[:30]!r:.60}…: no text can hold it"
        ) from None
