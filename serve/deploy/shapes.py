"""What crosses between processes of which one may run another version of Tandem: sealed, with the shape of its types.

Pickle fills whatever class of that name it finds, so a message of another version would be misread without a word. So a
message stays bytes until somebody has its shape, and is passed on as bytes to those who have.
"""

from __future__ import annotations

import hashlib
import pickle
from typing import Any, NamedTuple


class Stranger(NamedTuple):
    """The answer to a message whose shape is not known."""

    shape: str
    """The one that is known."""


def shape_of(*kinds: type) -> str:
    """Return a digest of the fields of these types and what they may hold: another one where a message differs.

    Args:
        kinds: dataclasses, named tuples or pydantic models, those inside others named too.
    """
    told = [(kind.__name__, [(name, str(each)) for name, each in kind.__annotations__.items()]) for kind in kinds]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


def seal(value: Any) -> bytes:
    """Return a message as bytes."""
    return pickle.dumps(value, pickle.HIGHEST_PROTOCOL)


def unseal(content: bytes) -> Any:
    """Return the message that `seal` was given; its shape must be known, and its sender be one of the endpoint's."""
    return pickle.loads(content)
