"""Both ends show that they know the endpoint's secret, and neither sends it: a proof is an HMAC over both nonces.

It also covers the id of the replica, which the gateway knows beforehand: whoever listens in the place of a replica that
has gone learns nothing from a gateway that connects, and gets no calls, though it hands everything on to another one.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Callable
from typing import Any

from serve.channel.codec import SCHEMA
from serve.channel.frames import Frame, FrameError, Kind

PROTOCOL = 2
VERSION = f"{PROTOCOL}:{SCHEMA[:16]}"
"""Both ends must have the same one: that of the frames, and what the classes that cross look like."""
NONCE_BYTES = 16


class Denied(Exception):
    """The other end does not know the secret, means or is another replica, or speaks another version."""


def nonce() -> bytes:
    """Return random bytes that are used once."""
    return secrets.token_bytes(NONCE_BYTES)


def proof(secret: bytes, who: str, replica_id: str, replica_nonce: bytes, gateway_nonce: bytes) -> bytes:
    """Return what only an end that knows the secret can say of the connection between a gateway and this replica.

    `who` says it: one's proof is not the other's.
    """
    parts = (b"tandem", who.encode(), VERSION.encode(), replica_id.encode(), replica_nonce, gateway_nonce)
    said = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    return hmac.new(secret, said, hashlib.sha256).digest()


def answer_hello(frame: Frame, secret: bytes, replica_id: str, gateway_nonce: bytes) -> tuple[list[Any], bytes]:
    """Return the content of the gateway's PROOF, and the proof that it expects of the replica that it means.

    Raises:
        Denied: the replica speaks another version.
        FrameError: it is no HELLO.
    """
    version, replica_nonce = _content(frame, Kind.HELLO, str, bytes)
    _check_version(version)
    own = proof(secret, "gateway", replica_id, replica_nonce, gateway_nonce)
    return [VERSION, gateway_nonce, own], proof(secret, "replica", replica_id, replica_nonce, gateway_nonce)


def check_proof(frame: Frame, secret: bytes, replica_id: str, replica_nonce: bytes) -> bytes:
    """Return the proof of the replica itself, by its id.

    Raises:
        Denied: the gateway does not know the secret, means another replica, or speaks another version.
        FrameError: it is no PROOF.
    """
    version, gateway_nonce, shown = _content(frame, Kind.PROOF, str, bytes, bytes)
    _check_version(version)
    check(shown, proof(secret, "gateway", replica_id, replica_nonce, gateway_nonce))
    return proof(secret, "replica", replica_id, replica_nonce, gateway_nonce)


def check_welcome(frame: Frame, expected: bytes) -> tuple[int, bool]:
    """Return the replica's slots, and whether it leaves. Raises Denied or FrameError."""
    shown, slots, leaving = _content(frame, Kind.WELCOME, bytes, int, bool)
    check(shown, expected)
    return slots, leaving


def check(shown: bytes, expected: bytes) -> None:
    """Compare two proofs in constant time. Raises Denied."""
    if not hmac.compare_digest(shown, expected):
        raise Denied("the other end does not know the endpoint's secret, or means another replica")


def _content(frame: Frame, kind: Kind, *types: Callable[..., Any]) -> Any:
    content = frame.content
    if frame.kind != kind or not isinstance(content, list) or [type(each) for each in content] != list(types):
        raise FrameError(f"no {kind.name} where one is due")
    return content


def _check_version(version: str) -> None:
    if version != VERSION:
        raise Denied(f"the other end speaks version {version:.40}, this one {VERSION}")
