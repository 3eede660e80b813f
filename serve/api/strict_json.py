"""JSON that every parser reads alike, from bodies and from texts inside them (the arguments of calls). Pure.

Refused is what parsers read in different ways (a key given twice, NaN, numbers beyond measure), and what could not go
on from here: half a surrogate pair, nesting that some later step would fail on, and so many parts that whoever reads
them would be busy for seconds. Long lists of numbers, texts and nulls are quick to read, and may have any length.
"""

from __future__ import annotations

import json
import math
from typing import Any

from cluster.unique_keys import unique

MOST_DEPTH = 100
"""Most lists and objects inside each other. A schema of OpenAI's may have ten levels of objects."""
MOST_OF = {"{": (50_000, "objects"), ":": (250_000, "names"), "[": (500_000, "lists")}
"""Most parts of a text, by the character that each has one of."""
TOO_DEEP = f"it is nested too deeply: at most {MOST_DEPTH} lists and objects may be inside each other"


def read(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: says what is wrong, as the end of a sentence.
    """
    _check_parts(text)
    try:
        value = json.loads(text, parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=unique)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("half a surrogate pair (\\ud800 to \\udfff) is no text") from None
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    except ValueError as error:
        too_long = "integer string conversion" in str(error)  # Python's own bound, and its advice on how to lift it
        raise ValueError("a number has more than 4300 digits" if too_long else str(error)) from None
    if text.count("[") + text.count("{") > MOST_DEPTH and _depth(value) > MOST_DEPTH:
        raise ValueError(TOO_DEEP)
    return value


def _check_parts(text: str) -> None:
    """Raise ValueError for too many parts, before any of them is made."""
    if all(text.count(mark) <= most for mark, (most, _) in MOST_OF.items()):
        return
    outside = "".join(text.replace("\\\\", "").replace('\\"', "").split('"')[::2])  # of strings
    for mark, (most, name) in MOST_OF.items():
        if outside.count(mark) > most:
            raise ValueError(f"it has more than {most} {name}")


def _depth(value: Any) -> int:
    """Return how many lists and objects are inside each other. Level by level, for long lists of numbers are many."""
    depth, level = 0, [value]
    while level:
        level = [each for each in level if isinstance(each, list | dict)]
        depth += bool(level)
        insides = [list(each.values()) if isinstance(each, dict) else each for each in level]
        level = [each for inside in insides if {list, dict} & set(map(type, inside)) for each in inside]
    return depth


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not a JSON value")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:60]} is out of range")
    return value
