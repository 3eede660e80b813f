"""API keys as text: made from the system's randomness, shown once, kept as a digest.

`tandem-<id>-<secret>`: the id finds the row, the secret proves the caller. The secret has 256 random bits, so that a
plain SHA-256 is as good as a slow hash: there is nothing to guess.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass, field

PREFIX = "tandem"
_ID_BYTES = 6
_SHAPE = re.compile(rf"{PREFIX}-([0-9a-f]{{{2 * _ID_BYTES}}})-[A-Za-z0-9_-]{{43}}", re.ASCII)


@dataclass(frozen=True)
class NewSecret:
    """A key that was just made: the only time that its text exists on our side."""

    id: str
    """What is shown in lists and logs."""
    text: str = field(repr=False)
    """What the client sends."""

    @property
    def digest(self) -> str:
        """SHA-256 of the text in hexadecimal, which is what the store keeps."""
        return digest(self.text)


def make() -> NewSecret:
    """Make a key of 256 random bits."""
    number = secrets.token_hex(_ID_BYTES)
    return NewSecret(number, f"{PREFIX}-{number}-{secrets.token_urlsafe(32)}")


def id_of(text: str) -> str | None:
    """Return the id in a key's text, None for what is no key: another case, another length, anything round it."""
    match = _SHAPE.fullmatch(text)
    return match[1] if match else None


def digest(text: str) -> str:
    """Return the SHA-256 of a key's text in hexadecimal."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def matches(text: str, kept: str | None) -> bool:
    """Compare a key with a stored digest in a time that tells nothing; None, an unknown id, takes as long."""
    return hmac.compare_digest(digest(text), kept or digest("")) and kept is not None
