"""Keep secrets out of what is logged and told: decide by the setting's name, and by credentials inside URLs."""

import re
from collections.abc import Mapping
from typing import Any

MASK = "********"

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_ALWAYS = {"secret", "secrets", "password", "passwd", "passphrase", "credential", "credentials", "apikey"}
_KEY_OWNERS = {"api", "access", "private", "auth", "encryption", "signing", "ssh", "account", "service"}
_VOCABULARY = {"pad", "eos", "bos", "unk", "sep", "cls", "mask", "image", "audio", "decoder", "special", "per"}
_URL_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+(?=@)|(?<=[?&]password=)[^&\s]+|(?<=[?&]sslpassword=)[^&\s]+")


def is_secret(name: str) -> bool:
    """Tell whether a setting of this name holds a secret: `HF_TOKEN`, `api_key`; not `pad_token` or `max_tokens`."""
    last_part = re.split(r"[./]", name)[-1]
    words = [word.lower() for word in _WORD.findall(last_part)]
    if not words:
        return False
    owner = words[-2] if len(words) > 1 else ""
    if words[-1] == "token":
        return owner not in _VOCABULARY
    if words[-1] in {"key", "keys"}:
        return owner in _KEY_OWNERS or last_part.isupper()
    return bool(_ALWAYS.intersection(words))


def redacted(value: Any, name: str = "") -> Any:
    """Return `value` with the secrets in it masked, down through dicts and lists."""
    if isinstance(value, Mapping):
        return {key: redacted(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item, name) for item in value]
    if value is None or isinstance(value, bool):
        return value
    if is_secret(name):
        return MASK
    return _URL_CREDENTIALS.sub(MASK, value) if isinstance(value, str) else value
